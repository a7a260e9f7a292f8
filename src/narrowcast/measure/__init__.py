"""Measuring on the deployed session: latency, throughput, memory, accuracy, and the statistics behind them."""
