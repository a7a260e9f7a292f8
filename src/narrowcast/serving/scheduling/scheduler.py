"""One scheduler per model version: who is accepted, who runs when and with whom, and who is told what."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from narrowcast.serving.refusals import Refusal, WorkerLostError
from narrowcast.serving.scheduling.queue import Batching, Job, JobQueue
from narrowcast.serving.scheduling.statistics import Statistics
from narrowcast.serving.signature import Signature, Tensors
from narrowcast.serving.workers.base import Batch, Result, Worker

__all__ = ["Scheduler", "Settings"]

_GONE = Refusal(499, "the client went away")


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


class Scheduler:
    """Queues requests and runs them on workers.

    Args:
        workers: Workers that were started; all have the same signature.
        settings: How to schedule.
        statistics: What is counted so far, where the version was loaded before.
    """

    def __init__(self, workers: Sequence[Worker], settings: Settings, statistics: Statistics | None = None) -> None:
        self.signature: Signature = workers[0].signature
        self.settings = settings
        self.statistics = statistics or Statistics()
        self._loop = asyncio.get_running_loop()
        self._batching = settings.batching if self.signature.batched else Batching()
        self._eager = not self._batching.delay_ns  # a request that finds a worker free does not wait for company
        self._workers = tuple(workers)
        self._live = {worker for worker in workers if worker.up}  # one may have died while others still loaded
        self._idle = deque(worker for worker in workers if worker.up)
        self._queue = JobQueue()
        self._alone: deque[Job] = deque()  # of batches that failed: each runs again by itself
        self._running: dict[Worker, list[Job]] = {}
        self._dispatching = False
        self._wake: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None  # looks for batches that run too long; one for all of them
        for worker in workers:
            worker.on_up, worker.on_down = self._up, self._down

    # what the outside sees --------------------------------------------------------------------------------------------

    @property
    def largest_batch(self) -> int:
        """Rows of one batch at most, or 0 where the model has no batch axis."""
        return self._batching.largest if self.signature.batched else 0

    @property
    def pending(self) -> int:
        """Requests that wait."""
        return self._queue.count + len(self._alone)

    @property
    def running(self) -> int:
        """Batches that run."""
        return len(self._running)

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._running or self.pending)

    @property
    def workers_alive(self) -> int:
        """Workers that can run a batch."""
        return len(self._live)

    def memory(self) -> int | None:
        """Return the bytes of memory that end with the workers, or None where nobody knows; takes a while."""
        sizes = [worker.memory() for worker in self._workers]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def submit(
        self,
        inputs: Tensors,
        rows: int,
        *,
        priority: int = 0,
        timeout: float | None = None,
        arrived: int | None = None,
    ) -> Job:
        """Accept a request; the job may have finished when this returns, else its ``done`` is called when it has.

        Args:
            inputs: Tensors that fit the signature.
            rows: Length of their batch axis.
            priority: 1 goes first; 0 is the default.
            timeout: Seconds that the client waits; a request that has waited so long never runs.
            arrived: When it came, in nanoseconds of the monotonic clock; None for now.

        Raises:
            Refusal: There are more rows than a batch may have (400), no worker is alive or the queue is full (503),
                or what is measured says that the answer would come after the deadline (429).
        """
        now = time.monotonic_ns()
        if self.signature.batched and rows > self._batching.largest:
            raise Refusal(400, f"the request has {rows} rows; allowed: {self._batching.largest}")
        if priority > self.settings.priority_levels:
            raise Refusal(400, f"priority {priority} is none here; allowed: 1 to {self.settings.priority_levels}")
        job = Job(inputs, rows, priority or self.settings.default_priority, now if arrived is None else arrived)
        timeout = self.settings.timeout if timeout is None else timeout
        if timeout is not None:
            job.deadline = job.arrived + int(timeout * 1e9)
        if self._running or self._queue.count or not self._live:
            self._admit(job)
        if self._idle and not self._queue.count and (self._eager or rows == self._batching.largest):
            self._run([job], now)
            return job
        self._time(job, now)
        if self.signature.batched:
            job.key = tuple([inputs[spec.name].shape[1:] for spec in self.signature.inputs])
        self._queue.add(job)
        self._dispatch()
        return job

    def cancel(self, job: Job) -> None:
        """Take a request out of the queue; one that runs already runs on, and its outputs are dropped."""
        job.done = None
        if self._take_out(job):
            self.statistics.cancelled += 1
            self._settle(job, time.monotonic_ns(), error=_GONE)
        job.left = True

    async def drained(self) -> None:
        """Return when no request waits or runs."""
        while self.busy:
            await asyncio.sleep(0.005)

    async def close(self, reason: str = "the model was unloaded") -> None:
        """Refuse what waits and what has not come back yet, and end the workers."""
        for timer in (self._wake, self._watch):
            if timer is not None:
                timer.cancel()
        refusal = Refusal(503, reason, retry_after=1)
        self._refuse_all(refusal)
        now = time.monotonic_ns()
        for jobs in list(self._running.values()):
            for job in jobs:
                self._settle(job, now, error=refusal)
        await asyncio.gather(*(worker.close() for worker in self._workers))

    # admission --------------------------------------------------------------------------------------------------------

    def _admit(self, job: Job) -> None:
        if not self._live:
            self.statistics.reject("unavailable")
            raise Refusal(503, "no worker of the model is alive; one is being started", retry_after=1)
        wait = self._expected_wait(job)
        if self._queue.count >= self.settings.queue:
            self.statistics.reject("queue_full")
            raise Refusal(
                503, f"{self._queue.count} requests wait already, which is the bound", retry_after=wait * 1e-9
            )
        if job.deadline is not None and not self._idle and job.arrived + wait > job.deadline:
            self.statistics.reject("deadline")
            raise Refusal(
                429,
                f"the answer would take about {wait * 1e-6:.0f} ms, and the client waits "
                f"{(job.deadline - job.arrived) * 1e-6:.0f} ms",
                retry_after=wait * 1e-9,
            )

    def _expected_wait(self, job: Job) -> float:
        """Return the nanoseconds until a request would be answered, by the measured time of each batch size."""
        largest = max(self._batching.largest, job.rows)
        rows = self._queue.rows_before(job.priority) + job.rows
        whole, rest = divmod(rows, largest)
        expected = self.statistics.expected_ns
        ahead = whole * expected(largest) + (expected(self._batching.padded(rest)) if rest else 0.0)
        # What runs now is half done on average.
        return ahead / len(self._live) + expected(largest) / 2

    # running ----------------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Hand batches to workers until there is no worker or no batch."""
        if self._dispatching:
            return
        self._dispatching = True
        try:
            while self._idle and (self._alone or self._queue.count):
                if self._alone:
                    self._run([self._alone.popleft()], time.monotonic_ns())
                    continue
                now = time.monotonic_ns()
                jobs, again = self._queue.take(self._batching, now)
                if not jobs:
                    self._wake_at(again)
                    return
                self._run(jobs, now)
        finally:
            self._dispatching = False

    def _wake_at(self, moment: int | None) -> None:
        if moment is None:
            return
        when = self._loop.time() + max(0, moment - time.monotonic_ns()) * 1e-9
        if self._wake is not None:
            if self._wake.when() <= when:
                return
            self._wake.cancel()
        self._wake = self._loop.call_at(when, self._woken)

    def _woken(self) -> None:
        self._wake = None
        self._dispatch()

    def _run(self, jobs: list[Job], now: int) -> None:
        """Run jobs as one batch on a worker that is free, those that have expired left out."""
        ready: list[Job] = []
        rows = 0
        for job in jobs:
            if job.deadline is not None and self._expired(job, now):
                continue
            job.begun = now
            if job.timer is not None:
                job.timer.cancel()
                job.timer = None
            rows += job.rows
            ready.append(job)
        if not ready:
            return
        worker = self._idle.popleft()
        self._running[worker] = ready
        if self._watch is None and self.settings.batch_timeout is not None:
            self._watch = self._loop.call_later(self.settings.batch_timeout, self._end_overruns)
        batch = self._batch(ready, rows) if self._batching.pad else Batch([job.inputs for job in ready], rows)
        done = partial(self._finished, worker, ready, rows, batch.rows)
        try:
            worker.submit(batch, done)
        except Exception as error:  # whatever it is, who waits must hear of it, and the worker is free
            done(Result(error=error))

    def _batch(self, jobs: list[Job], rows: int) -> Batch:
        """Return a batch that is filled up with copies of its last row, which the model takes as surely as the row itself."""
        parts = [job.inputs for job in jobs]
        whole = self._batching.padded(rows)
        if whole > rows:
            last = parts[-1].items()
            parts.append({name: np.broadcast_to(array[-1:], (whole - rows, *array.shape[1:])) for name, array in last})
        return Batch(parts, whole)

    def _finished(self, worker: Worker, jobs: list[Job], rows: int, padded: int, result: Result) -> None:
        if self._running.pop(worker, None) is None:
            return  # it ran too long, and its requests were told so
        if worker in self._live:
            self._idle.append(worker)
        now = time.monotonic_ns()
        outputs = result.outputs
        if outputs is None:
            self._failed(jobs, result.error or RuntimeError("the worker gave neither outputs nor an error"))
        elif (len(jobs) > 1 or padded > rows) and not _has_rows(outputs, padded):
            self._failed(jobs, Refusal(500, "the model gave an output whose first axis is not the batch axis"))
        else:
            times = (result.input_ns, result.infer_ns, result.output_ns)
            self.statistics.executed(padded, len(jobs), times, now - jobs[0].begun, padding=padded - rows)
            self._hand_out(jobs, outputs, now, whole=len(jobs) == 1 and padded == rows)
        if self._queue.count or self._alone:
            self._dispatch()

    def _hand_out(self, jobs: list[Job], outputs: Tensors, now: int, *, whole: bool) -> None:
        """Give each job its own rows of the outputs of a batch, or the one job the whole of them."""
        if whole:
            self._settle(jobs[0], now, outputs=outputs)
            return
        at = 0
        for job in jobs:
            part = slice(at, at + job.rows)
            at += job.rows
            self._settle(job, now, outputs={name: array[part] for name, array in outputs.items()})

    def _failed(self, jobs: list[Job], error: Exception) -> None:
        """Tell the jobs of a failed batch; where there are several, each runs again alone, so that one cannot spoil all."""
        now = time.monotonic_ns()
        again = len(jobs) > 1 and not isinstance(error, WorkerLostError)
        for job in jobs:
            if not again or job.finished:
                self._settle(job, now, error=error)
            elif job.left:
                self._settle(job, now, error=_GONE)
            elif not self._expired(job, now):
                self._time(job, now)
                self._alone.append(job)

    def _settle(self, job: Job, now: int, *, outputs: Tensors | None = None, error: Exception | None = None) -> None:
        """Give a job its end, count it, and tell who waits for it."""
        if job.finished:
            return
        job.outputs, job.error, job.ended = outputs, error, now
        if job.timer is not None:
            job.timer.cancel()
            job.timer = None
        if error is None:
            self.statistics.succeeded(job.begun - job.arrived, now - job.arrived)
        else:
            self.statistics.failed(now - job.arrived)
        if job.done is not None:
            job.done(job)

    # deadlines and workers --------------------------------------------------------------------------------------------

    def _expired(self, job: Job, now: int) -> bool:
        """End a job whose deadline has passed, and return whether it has."""
        if job.deadline is None or now < job.deadline:
            return False
        self.statistics.expired += 1
        waited = (now - job.arrived) * 1e-6
        late = Refusal(504, f"the request waited {waited:.0f} ms, longer than its client; it never ran")
        self._settle(job, now, error=late)
        return True

    def _time(self, job: Job, now: int) -> None:
        """Have the wait of a job end at its deadline, if it has one."""
        if job.deadline is not None:
            job.timer = self._loop.call_later((job.deadline - now) * 1e-9, self._expire, job)

    def _expire(self, job: Job) -> None:
        job.timer = None
        if self._take_out(job):
            self._expired(job, max(time.monotonic_ns(), job.deadline or 0))

    def _take_out(self, job: Job) -> bool:
        """Take a job out of those that wait; return whether it was there."""
        if job in self._alone:
            self._alone.remove(job)
            return True
        return self._queue.remove(job)

    def _end_overruns(self) -> None:
        """End the batches that run longer than they may, and look again when the next one could."""
        self._watch = None
        limit = self.settings.batch_timeout
        if limit is None:
            return
        now = time.monotonic_ns()
        latest = now - int(limit * 1e9)
        for worker, jobs in list(self._running.items()):
            if jobs[0].begun > latest:
                continue
            del self._running[worker]
            self.statistics.overruns += 1
            refusal = Refusal(504, f"the model ran longer than {limit:g} s, and was ended")
            for job in jobs:
                self._settle(job, now, error=refusal)
            worker.abort()
        if self._running:
            oldest = min(jobs[0].begun for jobs in self._running.values())
            self._watch = self._loop.call_later((oldest - latest) * 1e-9, self._end_overruns)

    def _up(self, worker: Worker) -> None:
        self._live.add(worker)
        self._idle.append(worker)
        self._dispatch()

    def _down(self, worker: Worker) -> None:
        self._live.discard(worker)
        if worker in self._idle:
            self._idle.remove(worker)
        if not self._live:
            self._refuse_all(Refusal(503, "the last worker of the model has died", retry_after=1))

    def _refuse_all(self, refusal: Refusal) -> None:
        """Refuse what waits."""
        now = time.monotonic_ns()
        waiting = [*self._queue.drain(), *self._alone]
        self._alone.clear()
        for job in waiting:
            self._settle(job, now, error=refusal)


def _has_rows(outputs: Mapping[str, object], rows: int) -> bool:
    """Return whether all outputs, of a model that may give anything, are arrays with a row for each that was run."""
    return all(isinstance(array, np.ndarray) and array.shape[:1] == (rows,) for array in outputs.values())
