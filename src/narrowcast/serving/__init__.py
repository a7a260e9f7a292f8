"""Artifacts as a long-running service that speaks the Open Inference Protocol, version 2."""
