"""Where a model runs: in the event loop, in threads, or in processes of its own."""
