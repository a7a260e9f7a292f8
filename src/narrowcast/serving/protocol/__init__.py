"""The Open Inference Protocol, version 2: what requests, responses and documents look like."""
