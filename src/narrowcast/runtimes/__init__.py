"""One adapter per runtime, found by name."""

from narrowcast.runtimes.base import OperatorTime, Runtime, Session, get_runtime, runtime_names

__all__ = ["OperatorTime", "Runtime", "Session", "get_runtime", "runtime_names"]
