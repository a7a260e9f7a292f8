"""Statistics of several replicas as those of one server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import fields

from narrowcast.serving.ray.wire import Report
from narrowcast.serving.scheduling.statistics import BatchTimes, Duration, Statistics

__all__ = ["Ledger", "total"]

#: Plain sums.
_SUMS = (
    *("inferences", "executions", "padding", "queue_ns", "compute_count", "input_ns", "infer_ns", "output_ns"),
    *("expired", "cancelled", "overruns"),
)


def total(parts: Iterable[Statistics]) -> Statistics:
    """Return statistics that count what all parts count; of the moments the last."""
    known = list(parts)
    rejected: Counter[str] = Counter()
    for part in known:
        rejected.update(part.rejected)
    result = Statistics(
        last=max((part.last for part in known), default=0),
        success=_durations(part.success for part in known),
        fail=_durations(part.fail for part in known),
        batches={
            size: _batches([part.batches[size] for part in known if size in part.batches])
            for size in sorted({size for part in known for size in part.batches})
        },
        rejected=dict(rejected),
    )
    for name in _SUMS:
        setattr(result, name, sum(getattr(part, name) for part in known))
    if known:
        result.buckets = [sum(counts) for counts in zip(*(part.buckets for part in known), strict=True)]
    return result


def _durations(parts: Iterable[Duration]) -> Duration:
    result = Duration()
    for part in parts:
        result.count += part.count
        result.ns += part.ns
    return result


def _batches(parts: list[BatchTimes]) -> BatchTimes:
    """Return the executions of one batch size; their running means are weighted by their counts."""
    count = sum(part.count for part in parts)
    return BatchTimes(
        count,
        sum(part.input_ns for part in parts),
        sum(part.infer_ns for part in parts),
        sum(part.output_ns for part in parts),
        sum(part.mean_ns * part.count for part in parts) / count if count else 0.0,
    )


class Ledger:
    """What the replicas of one model version have counted, those that ended included, so that counts never fall."""

    def __init__(self) -> None:
        self._known: dict[str, Statistics] = {}
        self._ended: set[str] = set()
        self._past = Statistics()  # of those that have ended

    def note(self, report: Report, *, ended: bool = False) -> None:
        """Take what a replica has counted; its last words stand, whatever was under way when it spoke them."""
        if report.replica in self._ended:
            return
        if not ended:
            self._known[report.replica] = report.statistics
            return
        self._known.pop(report.replica, None)
        self._ended.add(report.replica)
        self._past = total([self._past, report.statistics])

    def write(self, statistics: Statistics) -> None:
        """Let statistics count what all replicas have counted."""
        summed = total([self._past, *self._known.values()])
        for field in fields(Statistics):
            setattr(statistics, field.name, getattr(summed, field.name))
