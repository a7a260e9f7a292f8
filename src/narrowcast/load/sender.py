"""Sends the requests of one run from one event loop, when they are due (open loop) or as answers come (closed loop)."""

from __future__ import annotations

import asyncio
import math
import select
import selectors
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic, process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrowcast.load.client import Client
from narrowcast.load.log import Log
from narrowcast.measure.load.progress import Progress
from narrowcast.measure.load.records import Outcome, Records

__all__ = ["ClosedJob", "OpenJob", "Sender", "Sent", "new_loop"]

Floats = NDArray[np.float64]

#: Requests sent in one turn of the event loop at most, so that answers are read in time while senders catch up.
_BURST = 32
#: Connections that an open loop begins with.
_FIRST = 16
#: Seconds between two looks at what is overdue, and between two heartbeats.
_SWEEP = 0.05
_BEAT = 0.02
#: Seconds between two reports of progress.
_REPORT = 0.25
#: Seconds that a stream of a closed loop waits after a request without an answer.
_CALM = 0.02


class _PreciseSelector(selectors.DefaultSelector):
    """Waits to the microsecond: epoll rounds up to whole milliseconds, select does not."""

    def select(self, timeout: float | None = None) -> Any:
        if timeout is not None and timeout > 0:
            select.select((self,), (), (), timeout)
            timeout = 0
        return super().select(timeout)


def new_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop whose timers are precise to well under a millisecond."""
    precise = isinstance(selectors.DefaultSelector(), selectors.EpollSelector)
    return asyncio.SelectorEventLoop(_PreciseSelector() if precise else selectors.DefaultSelector())


@dataclass(frozen=True)
class OpenJob:
    """Requests that are due at given times.

    Attributes:
        due: Seconds after the start, in order, shape [n].
        kinds: Which encoded request each one is, shape [n].
        end: Seconds after the start when the run ends.
    """

    due: Floats
    kinds: NDArray[np.int64]
    end: float


@dataclass(frozen=True)
class ClosedJob:
    """Streams that each send their next query when the last one is answered.

    Attributes:
        streams: How many.
        group: Requests of a query, sent together; a query is answered when all of them are.
        kinds: Encoded requests to go through in turn, shape [n].
        end: Seconds after the start when no more are sent.
    """

    streams: int
    group: int
    kinds: NDArray[np.int64]
    end: float


@dataclass(frozen=True)
class Sent:
    """What a sender leaves.

    Attributes:
        records: Of its requests.
        cpu_share: CPU time of its process, as a share of the time that the run took.
        lag: 99th percentile of how late the event loop woke up, in seconds.
        connections: Connections that were open together at most.
        waited: Requests that found all connections busy.
        end: Seconds after the start when it stopped sending.
    """

    records: Records
    cpu_share: float
    lag: float
    connections: int
    waited: int
    end: float


class Sender:
    """Runs jobs one after the other on one client.

    Args:
        client: What sends.
        rows: Rows of the requests of each kind.
        bodies: Bytes of their bodies.
    """

    def __init__(self, client: Client, rows: Sequence[int], bodies: Sequence[int]) -> None:
        self._client = client
        self._rows = rows
        self._bodies = bodies
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """End the run under way: nothing more is sent, and what is under way is cut."""
        self._stopped.set()

    async def prepare(self, job: OpenJob | ClosedJob) -> None:
        """Open the connections that a job needs at first.

        Raises:
            OSError: The server takes no connection.
        """
        self._stopped.clear()
        await self._client.open(_FIRST if isinstance(job, OpenJob) else job.streams * job.group)

    async def run(self, job: OpenJob | ClosedJob, start: float, report: Callable[[Progress], None]) -> Sent:
        """Return what became of a job's requests.

        Args:
            job: What to send.
            start: When it begins, by the monotonic clock.
            report: Called a few times a second.
        """
        client = self._client
        client.waited = 0
        course = _Open(job, client, start) if isinstance(job, OpenJob) else _Closed(job, client, start)
        beat = _Heartbeat(client, course, start, report)
        await asyncio.sleep(max(0.0, start - monotonic()))
        begun, cpu = monotonic(), process_time()
        beat.begin()
        course.begin()
        ended = asyncio.ensure_future(course.finished.wait())
        stopped = asyncio.ensure_future(self._stopped.wait())
        await asyncio.wait((ended, stopped), return_when=asyncio.FIRST_COMPLETED)
        cut = not course.finished.is_set()
        ended.cancel()
        stopped.cancel()
        course.stop()
        beat.stop()
        now = monotonic()
        records = client.log.records(start, self._rows, self._bodies)
        if cut:
            client.drop()
        return Sent(
            records=records,
            cpu_share=(process_time() - cpu) / max(now - begun, 1e-9),
            lag=beat.lag(),
            connections=client.peak,
            waited=client.waited,
            end=min(job.end, now - start),
        )


class _Open:
    """Sends requests when they are due."""

    def __init__(self, job: OpenJob, client: Client, start: float) -> None:
        self.finished = asyncio.Event()
        self._due = (job.due + start).tolist()
        self._kinds = job.kinds.tolist()
        self._client = client
        self._under_way = 0
        self._next = 0
        self._timer: asyncio.Handle | None = None
        client.log = self._log = Log(self._ended)

    def begin(self) -> None:
        self._tick()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _tick(self) -> None:
        due, kinds, log, start = self._due, self._kinds, self._log, self._client.start
        loop = asyncio.get_running_loop()
        place, last = self._next, min(len(due), self._next + _BURST)
        while place < last and due[place] <= monotonic():
            self._under_way += 1
            start(log.begin(due[place], kinds[place], place))
            place += 1
        self._next = place
        if place < len(due):
            self._timer = loop.call_soon(self._tick) if place == last else loop.call_at(due[place], self._tick)
        else:
            self._timer = None
            if not self._under_way:
                self.finished.set()

    def _ended(self, number: int) -> None:
        self._under_way -= 1
        if not self._under_way and self._next == len(self._due):
            self.finished.set()


class _Closed:
    """Sends the next query of a stream when the last one is answered."""

    def __init__(self, job: ClosedJob, client: Client, start: float) -> None:
        self.finished = asyncio.Event()
        self._job = job
        self._kinds = job.kinds.tolist()
        self._client = client
        self._end = start + job.end
        self._stopped = False
        self._left: dict[int, int] = {}  # requests of a query without an answer yet, by query
        self._queries = 0
        self._requests = 0
        client.log = self._log = Log(self._ended)

    def begin(self) -> None:
        for _ in range(self._job.streams):
            self._query()

    def stop(self) -> None:
        self._stopped = True

    def _query(self) -> None:
        now = monotonic()
        if self._stopped or now >= self._end:
            if not self._left:
                self.finished.set()
            return
        query = self._queries
        self._queries += 1
        self._left[query] = self._job.group
        numbers: list[int] = []
        for _ in range(self._job.group):
            kind = self._kinds[self._requests % len(self._kinds)]
            self._requests += 1
            numbers.append(self._log.begin(now, kind, query))
        for number in numbers:
            self._client.start(number)

    def _ended(self, number: int) -> None:
        query = self._log.query[number]
        self._left[query] -= 1
        if self._left[query]:
            return
        del self._left[query]
        loop = asyncio.get_running_loop()
        if self._log.outcome[number] == Outcome.BROKEN:
            loop.call_later(_CALM, self._query)
        else:  # not from within the parser's callback
            loop.call_soon(self._query)


class _Heartbeat:
    """Gives up what is overdue, reports progress, and measures how late the event loop wakes up."""

    def __init__(
        self, client: Client, course: _Open | _Closed, start: float, report: Callable[[Progress], None]
    ) -> None:
        self._client = client
        self._start = start
        self._report = report
        self._lags: list[float] = []
        self._timer: asyncio.TimerHandle | None = None
        self._seen = 0
        self._reported = self._swept = start
        self._ok = self._failed = 0
        self._open: list[int] = []

    def begin(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(monotonic() + _BEAT, self._beat, monotonic() + _BEAT)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def lag(self) -> float:
        """Return the 99th percentile of the lags in seconds."""
        return float(np.percentile(self._lags, 99)) if self._lags else 0.0

    def _beat(self, due: float) -> None:
        now = monotonic()
        self._lags.append(now - due)
        if now - self._swept >= _SWEEP:
            self._swept = now
            self._client.give_up(now)
        if now - self._reported >= _REPORT:
            since, self._reported = self._reported, now
            self._tell(now, since)
        self._timer = asyncio.get_running_loop().call_at(now + _BEAT, self._beat, now + _BEAT)

    def _tell(self, now: float, since: float) -> None:
        log, start = self._client.log, self._start
        latencies: list[float] = []
        failures: list[float] = []
        still: list[int] = []
        total = len(log.intended)
        for number in (*self._open, *range(self._seen, total)):
            if math.isnan(log.done[number]):
                still.append(number)
            elif log.outcome[number] == Outcome.OK:
                self._ok += 1
                latencies.append(log.done[number] - log.intended[number])
            else:
                self._failed += 1
                failures.append(log.done[number] - log.intended[number])
        self._open, self._seen = still, total
        ended = tuple(latencies), tuple(failures)
        self._report(Progress(now - start, total, self._ok, self._failed, *ended, since - start))
