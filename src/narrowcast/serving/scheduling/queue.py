"""Requests that wait: in order of priority and arrival, grouped by what can run together."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from narrowcast.serving.signature import Tensors

__all__ = ["Batching", "Job", "JobQueue"]


@dataclass(frozen=True)
class Batching:
    """How requests are put together.

    Attributes:
        largest: Rows of one batch at most; 1 runs each request alone.
        delay_ns: How long the oldest request may wait for company while a worker is free.
        preferred: Sizes that run at once, without waiting; empty for none but the largest.
        pad: Whether a batch is filled up to the next preferred size, or to the largest, so that the model sees no other.
    """

    largest: int = 1
    delay_ns: int = 0
    preferred: tuple[int, ...] = ()
    pad: bool = False

    @classmethod
    def static(cls, size: int, delay_ns: int) -> Batching:
        """Return batches that all have one size: full, or filled up when the oldest request has waited long enough."""
        return cls(size, delay_ns, (size,), pad=True)

    @property
    def is_static(self) -> bool:
        """Whether the model sees batches of one size alone."""
        return self.pad and self.preferred == (self.largest,)

    def count(self, rows: Iterable[int], waited: bool) -> int:
        """Return how many of the requests that wait run together now, the oldest first; 0 to wait for more.

        Args:
            rows: Rows of each, the oldest first; the next is asked for only while there is room for it.
            waited: Whether the oldest has waited as long as it may.
        """
        count = together = fitting = 0
        for more in rows:
            if count and together + more > self.largest:
                return count
            count += 1
            together += more
            if together >= self.largest:
                return count
            if together in self.preferred:
                fitting = count
        return fitting or (count if waited or not self.delay_ns else 0)

    def full(self, rows: Iterable[int]) -> int:
        """Return how many of the requests that wait, the oldest first, leave no room for the next of them; 0 for none yet."""
        together = 0
        for count, more in enumerate(rows):
            together += more
            if together >= self.largest:
                return count + (together == self.largest or not count)
        return 0

    def padded(self, rows: int) -> int:
        """Return how many rows the model is given where so many are asked for."""
        if not self.pad or rows >= self.largest:
            return rows
        return min((size for size in self.preferred if size >= rows), default=self.largest)


@dataclass(slots=True, eq=False)
class Job:
    """One request on its way through the scheduler.

    Attributes:
        inputs: Its tensors.
        rows: Rows of its batch axis.
        done: Called once, when ``outputs`` or ``error`` is there; it may be set until then.
        priority: Lower goes first.
        arrived: When it came, in nanoseconds of the monotonic clock.
        key: Requests with equal keys can share a batch; set when it has to wait.
        deadline: When its client stops waiting, on the same clock, or None.
        outputs: What the model gave, its own rows alone.
        error: Why there are no outputs.
        timer: Ends its wait at the deadline.
        begun: When the batch that it is part of was begun, on the same clock; 0 before.
        ended: When it had its outputs or its error.
        left: Whether its client went away while it ran.
    """

    inputs: Tensors
    rows: int
    priority: int
    arrived: int
    key: Hashable = None
    deadline: int | None = None
    done: Callable[[Job], None] | None = None
    outputs: Tensors | None = None
    error: Exception | None = None
    timer: asyncio.TimerHandle | None = None
    begun: int = 0
    ended: int = 0
    left: bool = False
    number: int = 0

    @property
    def finished(self) -> bool:
        """Whether it has its outputs or its error."""
        return self.outputs is not None or self.error is not None


@dataclass(slots=True)
class _Group:
    """Jobs that can run together, the oldest first."""

    jobs: OrderedDict[int, Job] = field(default_factory=OrderedDict[int, Job])
    rows: int = 0


@dataclass(slots=True)
class JobQueue:
    """Jobs that wait. All operations take constant time, but for a scan over the kinds of jobs that wait and one batch.

    Attributes:
        count: How many wait.
    """

    _groups: dict[tuple[int, Hashable], _Group] = field(default_factory=dict[tuple[int, Hashable], _Group])
    count: int = 0
    _arrivals: int = 0

    def add(self, job: Job) -> None:
        """Put a job behind the others of its kind."""
        self.number(job)
        self._group(job).jobs[job.number] = job

    def number(self, job: Job) -> None:
        """Give a job that has none yet its place in the order of arrival."""
        if not job.number:
            self._arrivals += 1
            job.number = self._arrivals

    def _group(self, job: Job) -> _Group:
        """Return the group that a job joins, with its rows counted."""
        group = self._groups.get((job.priority, job.key))
        if group is None:
            group = self._groups[job.priority, job.key] = _Group()
        group.rows += job.rows
        self.count += 1
        return group

    def remove(self, job: Job) -> bool:
        """Take a job out of its turn; return whether it was there."""
        group = self._groups.get((job.priority, job.key))
        if group is None or group.jobs.pop(job.number, None) is None:
            return False
        self._took(group, job)
        return True

    def _took(self, group: _Group, job: Job) -> None:
        group.rows -= job.rows
        self.count -= 1
        if not group.jobs:
            self._groups.pop((job.priority, job.key), None)

    def rows_before(self, priority: int) -> int:
        """Return how many rows go before a job of this priority that came now."""
        return sum(group.rows for (level, _), group in self._groups.items() if level <= priority)

    def take(self, batching: Batching, now: int) -> tuple[list[Job], int | None]:
        """Return the jobs to run next, or when to ask again.

        Of the groups that need not wait for more rows, that one is the next whose oldest job has the best priority, and came
        first among those.
        """
        if not self._groups:
            return [], None
        again: list[int] = []
        for kind in sorted(self._groups, key=self._turn):
            group = self._groups[kind]
            due = next(iter(group.jobs.values())).arrived + batching.delay_ns
            count = batching.count((job.rows for job in group.jobs.values()), waited=now >= due)
            if count:
                break
            again.append(due)
        else:
            return [], min(again)
        return self._first(group, count), None

    def _turn(self, kind: tuple[int, Hashable]) -> tuple[int, int]:
        """Return what the groups are ordered by: their priority, and when the oldest of each came."""
        return kind[0], next(iter(self._groups[kind].jobs))

    def _first(self, group: _Group, count: int) -> list[Job]:
        """Take the oldest jobs out of a group."""
        jobs = [group.jobs.popitem(last=False)[1] for _ in range(count)]
        for job in jobs:
            self._took(group, job)
        return jobs

    def take_full(self, batching: Batching) -> list[Job]:
        """Return the jobs to run next if no other could join them, else none."""
        if not self._groups:
            return []
        group = self._groups[min(self._groups, key=self._turn)]
        count = batching.full(job.rows for job in group.jobs.values())
        return self._first(group, count)

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Put jobs that were taken back to their places."""
        for job in reversed(jobs):
            group = self._group(job)
            first = next(iter(group.jobs), job.number)
            group.jobs[job.number] = job
            group.jobs.move_to_end(job.number, last=False)
            if first < job.number:  # an older one came back before
                group.jobs = OrderedDict(sorted(group.jobs.items()))

    def drain(self) -> list[Job]:
        """Take all jobs out."""
        jobs = [job for group in self._groups.values() for job in group.jobs.values()]
        self._groups.clear()
        self.count = 0
        return jobs
