"""The command line: one file per command; the only place that prints."""

from narrowcast.cli.app import main

__all__ = ["main"]
