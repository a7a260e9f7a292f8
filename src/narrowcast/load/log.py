"""The log that a sender keeps: lists, because they cost a tenth of an array's time per element."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from narrowcast.measure.load.records import RECORD, Outcome, Records

__all__ = ["Log"]


class Log:
    """What became of each request of one sender, by its number; times are those of the monotonic clock.

    Args:
        on_end: Called with the number of each request that ends.
    """

    def __init__(self, on_end: Callable[[int], None]) -> None:
        self._on_end = on_end
        self.intended: list[float] = []
        self.sent: list[float] = []
        self.first: list[float] = []
        self.done: list[float] = []
        self.status: list[int] = []
        self.outcome: list[int] = []
        self.kind: list[int] = []
        self.query: list[int] = []
        self.received: list[int] = []

    def begin(self, intended: float, kind: int, query: int) -> int:
        """Return the number of a request that is due; ``kind`` says which of the encoded requests it is."""
        self.intended.append(intended)
        self.sent.append(math.nan)
        self.first.append(math.nan)
        self.done.append(math.nan)
        self.status.append(-1)
        self.outcome.append(Outcome.CUT)
        self.kind.append(kind)
        self.query.append(query)
        self.received.append(0)
        return len(self.intended) - 1

    def end(self, number: int, outcome: int, status: int = -1) -> None:
        """Take note that a request has ended now."""
        self.done[number] = monotonic()
        self.outcome[number] = outcome
        self.status[number] = status
        self._on_end(number)

    def records(self, start: float, rows: Sequence[int], bodies: Sequence[int]) -> Records:
        """Return the log as records.

        Args:
            start: When the run began.
            rows: Rows of the requests of each kind.
            bodies: Bytes of their bodies.
        """
        kinds: NDArray[np.int64] = np.array(self.kind, np.int64)
        records = np.zeros(len(kinds), RECORD)
        times = {"intended": self.intended, "sent": self.sent, "first": self.first, "done": self.done}
        for name, values in times.items():
            records[name] = np.array(values, np.float64) - start
        records["status"] = self.status
        records["outcome"] = self.outcome
        records["query"] = self.query
        records["rows"] = np.array(rows)[kinds]
        records["bytes_sent"] = np.array(bodies)[kinds]
        records["bytes_received"] = self.received
        return records
