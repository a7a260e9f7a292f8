"""What happened to the requests of one model version, as Triton's statistics extension counts it."""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import dataclass, field

__all__ = ["BUCKETS", "BatchTimes", "Duration", "Statistics"]

#: Upper ends of the latency histogram, in seconds.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
#: Weight of the newest time in the running mean for a batch size.
_NEWEST = 0.2


@dataclass(slots=True)
class Duration:
    """How often something happened, and how long it took in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        self.count += count
        self.ns += ns


@dataclass(slots=True)
class BatchTimes:
    """Executions of one batch size: cumulative times, and a running mean of what one takes from start to end."""

    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    mean_ns: float = 0.0


@dataclass(slots=True)
class Statistics:
    """Counts since the version was loaded.

    Attributes:
        inferences: Rows of successful requests.
        executions: Batches that ran successfully.
        last: Time of the last request, in milliseconds since the epoch.
        success: Requests that succeeded, from arrival to answer.
        fail: Requests that were executed or accepted and failed.
        queue: Time in the queue.
        compute_input: Time of gathering inputs; each request is charged its batch's, as Triton does.
        compute_infer: Time of the model.
        compute_output: Time of moving outputs.
        batches: Times by batch size.
        rejected: Requests that were refused before they were queued, by reason.
        expired: Requests whose deadline passed in the queue.
        cancelled: Requests whose client went away while they were queued.
        buckets: Successful requests by the first of :data:`BUCKETS` that they stayed within; the last beyond all.
    """

    inferences: int = 0
    executions: int = 0
    last: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    batches: dict[int, BatchTimes] = field(default_factory=dict[int, BatchTimes])
    rejected: dict[str, int] = field(default_factory=dict[str, int])
    expired: int = 0
    cancelled: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))

    def executed(self, rows: int, requests: int, input_ns: int, infer_ns: int, output_ns: int, total_ns: int) -> None:
        """Count a batch that ran."""
        self.executions += 1
        self.inferences += rows
        self.compute_input.add(input_ns * requests, requests)
        self.compute_infer.add(infer_ns * requests, requests)
        self.compute_output.add(output_ns * requests, requests)
        times = self.batches.get(rows)
        if times is None:
            times = self.batches[rows] = BatchTimes(mean_ns=total_ns)
        times.compute_input.add(input_ns)
        times.compute_infer.add(infer_ns)
        times.compute_output.add(output_ns)
        times.mean_ns += _NEWEST * (total_ns - times.mean_ns)

    def succeeded(self, queue_ns: int, total_ns: int) -> None:
        """Count a request that succeeded."""
        self.queue.add(queue_ns)
        self.success.add(total_ns)
        self.buckets[bisect_left(BUCKETS, total_ns * 1e-9)] += 1
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
