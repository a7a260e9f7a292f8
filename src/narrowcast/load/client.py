"""What sends requests: one boundary, two protocols."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from narrowcast.load.log import Log

__all__ = ["Client"]


class Client(ABC):
    """Sends encoded requests from within an event loop, and logs when they were sent and how they ended.

    Args:
        payloads: Whole requests, by kind.
        connections: The most that may be open together.
        timeout: Seconds after which a request is given up, from when it was due.

    Attributes:
        log: Where requests are logged; a new one for each run.
        peak: Connections that were open together at most.
        waited: Requests that found all connections busy.
    """

    def __init__(self, payloads: Sequence[bytes], connections: int, timeout: float) -> None:
        self.payloads = payloads
        self.connections = connections
        self.timeout = timeout
        self.log: Log
        self.peak = 0
        self.waited = 0

    @abstractmethod
    async def open(self, count: int) -> None:
        """Open so many connections before they are needed.

        Raises:
            OSError: The server does not take them.
        """

    @abstractmethod
    def start(self, number: int) -> None:
        """Send a request that the log has; it ends in the log, in any case."""

    @abstractmethod
    def give_up(self, now: float) -> None:
        """End the requests whose time is up; called several times a second."""

    @abstractmethod
    def drop(self) -> None:
        """Leave what is under way without an end; the next run finds nothing of it."""

    @abstractmethod
    async def close(self) -> None:
        """Close all connections."""
