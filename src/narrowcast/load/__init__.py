"""A load generator for servers that speak the Open Inference Protocol, version 2."""
