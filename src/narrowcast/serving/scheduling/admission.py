"""Which requests are accepted, by what waits already and by the measured time of each batch size."""

from __future__ import annotations

from dataclasses import dataclass, field

from narrowcast.serving.refusals import Refusal
from narrowcast.serving.scheduling.queue import Batching, Job
from narrowcast.serving.scheduling.statistics import Statistics

__all__ = ["Admission", "Load", "Settings"]


@dataclass(frozen=True)
class Settings:
    """How the requests of a model are scheduled.

    Attributes:
        batching: How they are put together.
        queue: Requests that may wait; one more is refused.
        timeout: Seconds that a request waits where its client gave no time, or None for ever.
        batch_timeout: Seconds that a batch may run before its worker is ended, or None for ever.
        priority_levels: Highest number that a request may give as its priority; 1 goes first.
        default_priority: Priority of requests that give none.
    """

    batching: Batching = field(default_factory=Batching)
    queue: int = 1024
    timeout: float | None = None
    batch_timeout: float | None = None
    priority_levels: int = 64
    default_priority: int = 8


@dataclass(frozen=True, slots=True)
class Load:
    """What a request finds when it comes.

    Attributes:
        waiting: Requests that wait.
        rows: Rows in the queue that go before it.
        batches: Batches that lie ready at a worker.
        workers: Workers that can run a batch.
    """

    waiting: int
    rows: int
    batches: int
    workers: int


class Admission:
    """Refuses requests that cannot be served in time.

    Args:
        settings: What is allowed.
        batching: How requests are put together.
        statistics: Has the measured times, and counts what is refused.
    """

    def __init__(self, settings: Settings, batching: Batching, statistics: Statistics) -> None:
        self._settings = settings
        self._batching = batching
        self._statistics = statistics

    def check(self, job: Job, load: Load, *, free: bool) -> None:
        """Return if a request is accepted.

        Args:
            job: The request.
            load: What it finds.
            free: Whether a worker is free; a measured time never refuses what finds one.

        Raises:
            Refusal: No worker is alive or the queue is full (503), or the answer would come after the deadline (429).
        """
        if not load.workers:
            self._statistics.reject("unavailable")
            raise Refusal(503, "no worker of the model is alive; one is being started", retry_after=1)
        wait = self._expected_wait(job, load)
        if load.waiting >= self._settings.queue:
            self._statistics.reject("queue_full")
            raise Refusal(503, f"{load.waiting} requests wait already, which is the bound", retry_after=wait * 1e-9)
        if job.deadline is not None and not free and job.arrived + wait > job.deadline:
            self._statistics.reject("deadline")
            raise Refusal(
                429,
                f"the answer would take about {wait * 1e-6:.0f} ms, and the client waits "
                f"{(job.deadline - job.arrived) * 1e-6:.0f} ms",
                retry_after=wait * 1e-9,
            )

    def _expected_wait(self, job: Job, load: Load) -> float:
        """Return the nanoseconds until a request would be answered, by the measured time of each batch size."""
        largest = max(self._batching.largest, job.rows)
        whole, rest = divmod(load.rows + job.rows, largest)
        expected = self._statistics.expected_ns
        before = (whole + load.batches) * expected(largest)
        before += expected(self._batching.padded(rest)) if rest else 0.0
        # What runs now is half done on average.
        return before / load.workers + expected(largest) / 2
