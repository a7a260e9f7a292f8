"""What happened to the requests of one model version, as Triton's statistics extension counts it."""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import dataclass, field

__all__ = ["BUCKETS", "BatchTimes", "Duration", "Statistics"]

#: Upper ends of the latency histogram, in seconds.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BUCKETS_NS = tuple(round(bound * 1e9) for bound in BUCKETS)
#: Weight of the newest time in the running mean for a batch size.
_NEWEST = 0.2


@dataclass(slots=True)
class Duration:
    """How often something happened, and how long it took in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns


@dataclass(slots=True)
class BatchTimes:
    """Executions of one batch size: cumulative times, and a running mean of what one takes from start to end."""

    count: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0
    mean_ns: float = 0.0


@dataclass(slots=True)
class Statistics:
    """Counts since the version was loaded.

    Attributes:
        inferences: Rows of successful requests.
        executions: Batches that ran successfully.
        padding: Rows that batches were filled up with.
        last: Time of the last request, in milliseconds since the epoch.
        success: Requests that succeeded, from arrival to answer.
        fail: Requests that were executed or accepted and failed.
        queue_ns: Time that the successful ones waited.
        compute_count: Requests that ran.
        input_ns: Time of gathering inputs; each request is charged its batch's, as Triton does.
        infer_ns: Time of the model, charged alike.
        output_ns: Time of moving outputs, charged alike.
        batches: Times by batch size.
        rejected: Requests that were refused before they were queued, by reason.
        expired: Requests whose deadline passed in the queue.
        cancelled: Requests whose client went away while they were queued.
        overruns: Batches that were ended because they ran too long.
        buckets: Successful requests by the first of :data:`BUCKETS` that they stayed within; the last beyond all.
    """

    inferences: int = 0
    executions: int = 0
    padding: int = 0
    last: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue_ns: int = 0
    compute_count: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0
    batches: dict[int, BatchTimes] = field(default_factory=dict[int, BatchTimes])
    rejected: dict[str, int] = field(default_factory=dict[str, int])
    expired: int = 0
    cancelled: int = 0
    overruns: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))

    def executed(self, rows: int, requests: int, times: tuple[int, int, int], total_ns: int, padding: int = 0) -> None:
        """Count a batch that ran.

        Args:
            rows: Its size.
            requests: Requests in it.
            times: Nanoseconds for its inputs, the model and its outputs.
            total_ns: From its start to its end.
            padding: How many of its rows nobody asked for.
        """
        self.executions += 1
        self.inferences += rows - padding
        self.padding += padding
        batch = self.batches.get(rows)
        if batch is None:
            batch = self.batches[rows] = BatchTimes(mean_ns=total_ns)
        batch.mean_ns += _NEWEST * (total_ns - batch.mean_ns)
        batch.count += 1
        batch.input_ns += times[0]
        batch.infer_ns += times[1]
        batch.output_ns += times[2]
        self.compute_count += requests
        self.input_ns += times[0] * requests
        self.infer_ns += times[1] * requests
        self.output_ns += times[2] * requests

    def succeeded(self, queue_ns: int, total_ns: int) -> None:
        """Count a request that succeeded."""
        self.queue_ns += queue_ns
        self.success.count += 1
        self.success.ns += total_ns
        self.buckets[bisect_left(_BUCKETS_NS, total_ns)] += 1
        self.last = time.time_ns() // 1_000_000

    def failed(self, total_ns: int) -> None:
        """Count a request that failed after it was accepted."""
        self.fail.add(total_ns)
        self.last = time.time_ns() // 1_000_000

    def reject(self, reason: str) -> None:
        """Count a request that was refused before it was queued."""
        self.rejected[reason] = self.rejected.get(reason, 0) + 1

    def expected_ns(self, rows: int) -> float:
        """Return the time that a batch is expected to take: that of the nearest size that ran, 0 where none did."""
        known = self.batches.get(rows)
        if known is not None:
            return known.mean_ns
        nearest = min(self.batches, key=lambda size: abs(size - rows), default=None)
        if nearest is None:
            return 0.0
        return self.batches[nearest].mean_ns * max(1.0, rows / nearest)
