"""How a model version stands now, in numbers that go up and down."""

from __future__ import annotations

from dataclasses import dataclass

from narrowcast.serving.hosting import ServedVersion

__all__ = ["Gauges"]


@dataclass(frozen=True)
class Gauges:
    """A version now.

    Attributes:
        workers: Workers that are alive.
        workers_wanted: How many there should be at least.
        pending: Requests that wait.
        running: Batches that workers run.
        memory: Bytes that the version takes; None where nobody knows.
    """

    workers: int
    workers_wanted: int
    pending: int
    running: int
    memory: int | None

    @staticmethod
    def of(served: ServedVersion) -> Gauges:
        """Return how a version stands that runs on this machine."""
        scheduler = served.scheduler
        return Gauges(
            scheduler.workers_alive,
            served.hosting.workers,
            scheduler.pending,
            scheduler.running,
            served.holding.size,
        )
