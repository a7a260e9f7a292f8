"""One scheduler per model version: who is accepted, who runs when and with whom, and who is told what."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from narrowcast.serving.refusals import Refusal, WorkerLostError
from narrowcast.serving.scheduling.admission import Admission, Load, Settings
from narrowcast.serving.scheduling.ahead import Ahead
from narrowcast.serving.scheduling.queue import Batching, Job, JobQueue
from narrowcast.serving.scheduling.statistics import Statistics
from narrowcast.serving.signature import Signature, Tensors
from narrowcast.serving.workers.base import Batch, Result, Worker

__all__ = ["Scheduler", "Settings"]

#: A client may give any number; one of 64 bits has to do for its deadline.
_LONGEST_SECONDS = 1e9
_GONE = Refusal(499, "the client went away")


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
        self._ahead = Ahead()
        self._admission = Admission(settings, self._batching, self.statistics)
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
        return self._queue.count + len(self._alone) + self._ahead.requests

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
            job.deadline = job.arrived + int(min(timeout, _LONGEST_SECONDS) * 1e9)
        if self._running or self._queue.count or not self._live:
            self._admission.check(job, self._load(job), free=bool(self._idle))
        if self._idle and not self._queue.count and (self._eager or rows == self._batching.largest):
            self._queue.number(job)  # it may have to wait yet, if the worker ends before it begins
            self._run([job], now)
            return job
        self._time(job, now)
        if self.signature.batched:
            job.key = tuple([inputs[spec.name].shape[1:] for spec in self.signature.inputs])
        self._queue.add(job)
        if self._ahead.behind(job.priority):
            self._take_back(self._ahead.recall())
        self._dispatch()
        return job

    def _load(self, job: Job) -> Load:
        waiting = self._queue.count + self._ahead.requests
        return Load(waiting, self._queue.rows_before(job.priority), self._ahead.before(job.priority), len(self._live))

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
        for jobs in (*self._running.values(), list(self._ahead.all())):
            for job in jobs:
                self._settle(job, now, error=refusal)
        await asyncio.gather(*(worker.close() for worker in self._workers))

    # running ----------------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Hand batches to workers until there is no worker or no batch."""
        if self._dispatching:
            return
        self._dispatching = True
        try:
            if self._idle and self._ahead:
                self._take_back(self._ahead.recall())
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
            self._lay_ahead()
        finally:
            self._dispatching = False

    def _lay_ahead(self) -> None:
        """Give workers that run a batch the next one already, where it is full and nothing else would have to run first."""
        late = self._ahead.overtaken(2 * len(self._live))
        if late:
            self._take_back(late)
        while self._queue.count and not self._alone:
            able = [worker for worker in self._running if worker.takes_ahead and not self._ahead.has(worker)]
            jobs = self._queue.take_full(self._batching) if able else []
            if not jobs:
                return
            soonest = min(able, key=lambda worker: self._running[worker][0].begun)
            self._ahead.lay(soonest, jobs)
            before = min((job.deadline for job in jobs if job.deadline is not None), default=None)
            self._hand(soonest, jobs, before)

    def _take_back(self, jobs: list[Job]) -> None:
        """Have jobs that were to run next wait again, in their old place; those that nobody wants any more end."""
        now = time.monotonic_ns()
        waiting: list[Job] = []
        for job in jobs:
            if job.left or job.finished:
                self._settle(job, now, error=_GONE)
            elif not self._live:
                self._settle(job, now, error=_last_died())
            elif not self._expired(job, now):
                job.begun = 0
                self._time(job, now)
                waiting.append(job)
        self._queue.put_back(waiting)

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
        ready = [job for job in jobs if job.deadline is None or not self._expired(job, now)]
        if not ready:
            return
        worker = self._idle.popleft()
        self._begun(worker, ready, now)
        self._hand(worker, ready)

    def _begun(self, worker: Worker, jobs: list[Job], now: int) -> None:
        """Take note that jobs run from now on, so that their deadlines do not matter any more."""
        for job in jobs:
            job.begun = now
            if job.timer is not None:
                job.timer.cancel()
                job.timer = None
        self._running[worker] = jobs
        self._ahead.count_begun()
        if self._watch is None and self.settings.batch_timeout is not None:
            self._watch = self._loop.call_later(self.settings.batch_timeout, self._end_overruns)

    def _hand(self, worker: Worker, jobs: list[Job], before: int | None = None) -> None:
        """Give a worker jobs as one batch."""
        rows = sum([job.rows for job in jobs])
        batch = self._batch(jobs, rows) if self._batching.pad else Batch([job.inputs for job in jobs], rows)
        batch.before = before
        done = partial(self._finished, worker, jobs, rows, batch.rows)
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
        if self._running.get(worker) is not jobs:
            self._never_began(worker, jobs, result)
            return
        now = time.monotonic_ns()
        del self._running[worker]
        following = self._ahead.pop(worker)
        if following is not None:
            self._begun(worker, following, now)
        elif worker in self._live:
            self._idle.append(worker)
        outputs = result.outputs
        if not result.began:
            self._take_back(jobs)
        elif outputs is None:
            self._failed(jobs, result.error or RuntimeError("the worker gave neither outputs nor an error"))
        elif (len(jobs) > 1 or padded > rows) and not _has_rows(outputs, padded):
            self._failed(jobs, Refusal(500, "the model gave an output whose first axis is not the batch axis"))
        else:
            times = (result.input_ns, result.infer_ns, result.output_ns)
            self.statistics.executed(padded, len(jobs), times, now - jobs[0].begun, padding=padded - rows)
            self._hand_out(jobs, outputs, now, whole=len(jobs) == 1 and padded == rows)
        if self._queue.count or self._alone or self._ahead:
            self._dispatch()

    def _never_began(self, worker: Worker, jobs: list[Job], result: Result) -> None:
        """End a batch that was to run next, and could not; one that ran too long is none, and its requests were told so."""
        if not self._ahead.has(worker, jobs):
            return
        self._ahead.pop(worker)
        if result.began:
            self._failed(jobs, result.error or RuntimeError("the worker gave neither outputs nor an error"))
        else:
            self._take_back(jobs)
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
        if job.deadline is not None and job.timer is None:
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
        if self._queue.remove(job):
            return True
        others = self._ahead.recall_with(job)
        self._queue.put_back([other for other in others if other is not job])
        return bool(others)

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
            self._refuse_all(_last_died())

    def _refuse_all(self, refusal: Refusal) -> None:
        """Refuse what waits."""
        now = time.monotonic_ns()
        waiting = [*self._queue.drain(), *self._alone]
        self._alone.clear()
        for job in waiting:
            self._settle(job, now, error=refusal)


def _last_died() -> Refusal:
    return Refusal(503, "the last worker of the model has died", retry_after=1)


def _has_rows(outputs: Mapping[str, object], rows: int) -> bool:
    """Return whether all outputs, of a model that may give anything, are arrays with a row for each that was run."""
    return all(isinstance(array, np.ndarray) and array.shape[:1] == (rows,) for array in outputs.values())
