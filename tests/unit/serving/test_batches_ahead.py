"""A worker has its next batch while it runs one, and a batch that has not begun can still be anybody's."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving_models import FOURS, doubled, write_artifact

from narrowcast.artifacts.manifest import Manifest
from narrowcast.errors import RuntimeFailedError
from narrowcast.serving.refusals import Refusal, WorkerLostError
from narrowcast.serving.scheduling.queue import Batching, Job
from narrowcast.serving.scheduling.scheduler import Scheduler, Settings
from narrowcast.serving.signature import Tensors
from narrowcast.serving.workers.base import Batch, Done, Result, Worker
from narrowcast.serving.workers.marks import SLOTS, Marks
from narrowcast.serving.workers.process import ProcessWorker

ManifestOf = Callable[..., Manifest]


class TwoStepWorker(Worker):
    """Has a batch and the next; the first runs until it is told to end, the next then begins unseen."""

    def __init__(self) -> None:
        self.signature = FOURS
        self.has: list[tuple[Batch, Done | None]] = []
        self.began: list[list[float]] = []

    @property
    def takes_ahead(self) -> bool:
        return len(self.has) < 2

    async def start(self) -> None: ...

    def submit(self, batch: Batch, done: Done) -> None:
        assert len(self.has) < 2
        self.has.append((batch, done))
        self._begin()

    def _begin(self) -> None:
        """Begin the first batch; one that was taken back is answered without a word."""
        while self.has and self.has[0][1] is None:
            self.has.pop(0)
        if self.has and len(self.has) == 1:
            self.began.append([float(value) for part in self.has[0][0].parts for value in part["x"][:, 0]])

    def recall(self) -> bool:
        if len(self.has) < 2 or self.has[1][1] is None:
            return False
        self.has[1] = (self.has[1][0], None)
        return True

    def ready(self) -> list[float]:
        """What lies ready."""
        if len(self.has) < 2 or self.has[1][1] is None:
            return []
        return [float(value) for part in self.has[1][0].parts for value in part["x"][:, 0]]

    def step(self) -> None:
        batch, done = self.has.pop(0)
        assert done is not None
        self._begin()
        done(Result(doubled({"x": np.concatenate([part["x"] for part in batch.parts])}), None, 1, 2, 3))

    def die(self) -> None:
        """End as a process does: the first is lost, the next never began."""
        had, self.has = self.has, []
        self.on_down(self)
        for index, (_, done) in enumerate(had):
            if done is not None:
                done(Result(error=WorkerLostError("gone")) if not index else Result(began=False))

    async def close(self) -> None: ...


def rows(*values: float) -> Tensors:
    return {"x": np.repeat(np.array(values, np.float32)[:, None], 4, axis=1)}


def submit(scheduler: Scheduler, *values: float, **more: Any) -> Job:
    return scheduler.submit(rows(*values), len(values), **more)


def drive(test: Callable[..., Awaitable[None]], workers: int = 1, **settings: Any) -> None:
    async def main() -> None:
        its = [TwoStepWorker() for _ in range(workers)]
        options: dict[str, Any] = {"batching": Batching(2)} | settings
        await test(Scheduler(its, Settings(**options)), *its)

    asyncio.run(main())


# What the scheduler does ----------------------------------------------------------------------------------------------


def test_a_full_batch_lies_ready_and_begins_without_the_server() -> None:
    async def test(scheduler: Scheduler, worker: TwoStepWorker) -> None:
        jobs = [submit(scheduler, 0)]
        jobs.append(submit(scheduler, 1))
        assert worker.ready() == [], "another may join it"
        jobs += [submit(scheduler, value) for value in (2, 3, 4, 5)]
        assert worker.ready() == [1, 2]
        assert (scheduler.pending, scheduler.running) == (5, 1)
        worker.step()
        assert worker.began == [[0], [1, 2]]
        assert worker.ready() == [3, 4]
        worker.step()
        worker.step()
        worker.step()
        assert [job.outputs["y"][0, 0] for job in jobs if job.outputs] == [0, 2, 4, 6, 8, 10]
        assert scheduler.statistics.executions == 4
        assert not scheduler.busy
        assert jobs[1].begun <= jobs[0].ended, "it ran from when the one before was through"
        assert jobs[1].begun > jobs[0].begun

    drive(test)


def test_who_goes_away_is_taken_out_of_a_batch_that_lies_ready() -> None:
    async def test(scheduler: Scheduler, worker: TwoStepWorker) -> None:
        submit(scheduler, 0)
        one, two, three = (submit(scheduler, value) for value in (1, 2, 3))
        assert worker.ready() == [1, 2]
        scheduler.cancel(one)
        assert scheduler.statistics.cancelled == 1
        assert one.finished
        worker.step()
        assert worker.began == [[0], [2, 3]]
        worker.step()
        assert two.outputs is not None
        assert three.outputs is not None
        assert not scheduler.busy

    drive(test)


def test_a_deadline_holds_for_a_batch_that_lies_ready() -> None:
    async def test(scheduler: Scheduler, worker: TwoStepWorker) -> None:
        submit(scheduler, 0)
        hurried, patient = submit(scheduler, 1, timeout=0.05), submit(scheduler, 2, timeout=60)
        assert worker.ready() == [1, 2]
        assert worker.has[1][0].before == hurried.deadline
        told = asyncio.Event()
        hurried.done = lambda _: told.set()
        await asyncio.wait_for(told.wait(), 10)
        assert isinstance(hurried.error, Refusal)
        assert hurried.error.status == 504
        worker.step()
        assert worker.began == [[0], [2]]
        worker.step()
        assert patient.outputs is not None

    drive(test)


def test_a_deadline_says_nothing_about_a_batch_that_has_begun() -> None:
    async def test(scheduler: Scheduler, worker: TwoStepWorker) -> None:
        submit(scheduler, 0)
        hurried, other = submit(scheduler, 1, timeout=0.02), submit(scheduler, 2)
        worker.recall = lambda: False  # it began, and the server has not heard of it yet
        await asyncio.sleep(0.1)
        assert not hurried.finished
        worker.step()
        worker.step()
        assert hurried.outputs is not None
        assert other.outputs is not None

    drive(test)


def test_better_priorities_go_before_what_lies_ready() -> None:
    async def test(scheduler: Scheduler, worker: TwoStepWorker) -> None:
        submit(scheduler, 0)
        for value in (1, 2):
            submit(scheduler, value, priority=5)
        assert worker.ready() == [1, 2]
        for value in (3, 4):
            submit(scheduler, value, priority=1)
        assert worker.ready() == [], "what was taken back takes room until the worker has seen it"
        for _ in range(3):
            worker.step()
        assert worker.began == [[0], [3, 4], [1, 2]]

    drive(test)


def test_a_worker_that_is_free_takes_what_lies_ready_at_another() -> None:
    async def test(scheduler: Scheduler, one: TwoStepWorker, other: TwoStepWorker) -> None:
        submit(scheduler, 0)
        submit(scheduler, 1)
        last = [submit(scheduler, value) for value in (2, 3)]
        assert one.ready() == [2, 3], "it began first, and so is likely to end first"
        other.step()
        assert other.began == [[1], [2, 3]]
        other.step()
        assert all(job.outputs is not None for job in last)
        assert one.began == [[0]]
        one.step()
        assert not scheduler.busy

    drive(test, workers=2)


def test_what_lies_ready_at_a_worker_that_dies_runs_elsewhere() -> None:
    async def test(scheduler: Scheduler, one: TwoStepWorker, other: TwoStepWorker) -> None:
        lost, kept = submit(scheduler, 0), submit(scheduler, 1)
        others = [submit(scheduler, value) for value in (2, 3)]
        one.die()
        assert isinstance(lost.error, WorkerLostError)
        other.step()
        other.step()
        assert kept.outputs is not None
        assert all(job.outputs is not None for job in others)
        assert not scheduler.busy

    drive(test, workers=2)


def test_what_lies_ready_at_the_last_worker_that_dies_is_refused() -> None:
    async def test(scheduler: Scheduler, worker: TwoStepWorker) -> None:
        submit(scheduler, 0)
        waiting = [submit(scheduler, value) for value in (1, 2, 3)]
        worker.die()
        assert [job.error.status for job in waiting if isinstance(job.error, Refusal)] == [503] * 3
        assert not scheduler.busy

    drive(test)


def test_what_lies_ready_counts_among_what_waits() -> None:
    async def test(scheduler: Scheduler, worker: TwoStepWorker) -> None:
        jobs = [submit(scheduler, value) for value in range(5)]
        with pytest.raises(Refusal, match="4 requests wait already"):
            submit(scheduler, 9)
        await scheduler.close("over")
        for _ in range(2):
            worker.step()
        told = [job.error.message for job in jobs if isinstance(job.error, Refusal)]
        assert told == ["over"] * 5, "answers after the end reach nobody"
        assert not any(job.outputs for job in jobs)

    drive(test, queue=4)


def test_a_batch_that_cannot_be_handed_over_fails() -> None:
    async def test(scheduler: Scheduler, worker: TwoStepWorker) -> None:
        def full(batch: Batch, done: Done) -> None:
            raise MemoryError

        submit(scheduler, 0)
        submit(scheduler, 1)
        worker.submit = full
        failed = submit(scheduler, 2)
        worker.step()
        assert isinstance(failed.error, MemoryError)
        assert not scheduler.busy

    drive(test)


def test_an_overrun_ends_its_own_batch_alone() -> None:
    async def test(scheduler: Scheduler, one: TwoStepWorker, other: TwoStepWorker) -> None:
        one.abort = one.die
        slow, _ = submit(scheduler, 0), submit(scheduler, 1)
        ready = [submit(scheduler, value) for value in (2, 3)]
        assert one.ready() == [2, 3]
        await asyncio.sleep(0.03)
        other.recall = lambda: False
        other.step()
        other.step()
        assert all(job.outputs is not None for job in ready)
        while not slow.finished:
            await asyncio.sleep(0.01)
        assert isinstance(slow.error, Refusal)
        assert slow.error.status == 504
        assert not scheduler.busy

    drive(test, workers=2, batch_timeout=0.1)


def test_a_batch_behind_a_worker_that_hangs_is_taken_elsewhere() -> None:
    async def test(scheduler: Scheduler, hung: TwoStepWorker, other: TwoStepWorker) -> None:
        submit(scheduler, 0)
        submit(scheduler, 1)
        ready = [submit(scheduler, value) for value in (2, 3)]
        later = [submit(scheduler, value) for value in range(4, 24)]
        assert hung.ready() == [2, 3]
        for _ in range(8):
            other.step()
        assert all(job.outputs is not None for job in ready), "younger ones have passed it, but not many"
        assert not later[-1].finished
        assert hung.began == [[0]]

    drive(test, workers=2)


def test_one_who_goes_before_what_lies_ready_does_not_count_it() -> None:
    async def test(scheduler: Scheduler, worker: TwoStepWorker) -> None:
        submit(scheduler, 0)
        await asyncio.sleep(0.1)
        worker.step()  # a row takes 100 ms, as measured
        for value in range(3):
            submit(scheduler, value, priority=9)
        assert worker.ready() == [1, 2]
        assert submit(scheduler, 3, priority=1, timeout=0.3).error is None
        with pytest.raises(Refusal, match="the answer would take about"):
            submit(scheduler, 4, priority=9, timeout=0.3)

    drive(test)


def test_batches_that_come_back_one_by_one_keep_the_order_of_arrival() -> None:
    async def test(scheduler: Scheduler, one: TwoStepWorker, other: TwoStepWorker) -> None:
        jobs = [submit(scheduler, value) for value in range(8)]
        assert [one.ready(), other.ready()] == [[2, 3], [4, 5]]
        scheduler.cancel(jobs[2])
        scheduler.cancel(jobs[4])
        for _ in range(3):
            one.step()
        assert one.began == [[0], [3, 5], [6, 7]]

    drive(test, workers=2)


def test_who_found_a_worker_free_has_a_place_to_come_back_to() -> None:
    async def test(scheduler: Scheduler, one: TwoStepWorker, other: TwoStepWorker) -> None:
        told = [submit(scheduler, value) for value in (0, 1)]
        for worker in (one, other):
            batch, done = worker.has.pop()
            assert done is not None
            done(Result(began=False))
            assert batch.rows == 1
        for _ in range(2):
            for worker in (one, other):
                if worker.has:
                    worker.step()
        assert all(job.outputs is not None for job in told)
        assert not scheduler.busy

    drive(test, workers=2)


# What a process does --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, manifest_of: ManifestOf) -> Path:
    return write_artifact(tmp_path / "double", manifest_of())


class Held:
    """A worker process that stands still, and batches that it has."""

    def __init__(self, worker: ProcessWorker) -> None:
        self.worker = worker
        self.results: list[tuple[float, Result]] = []
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGSTOP)

    def submit(self, value: float, before: int | None = None) -> None:
        self.worker.submit(Batch([rows(value)], 1, before), lambda result: self.results.append((value, result)))

    async def go_on(self, count: int) -> dict[float, Result]:
        """Return so many results by value."""
        assert self.worker.pid is not None
        os.kill(self.worker.pid, signal.SIGCONT)
        return await self.until(count)

    async def until(self, count: int) -> dict[float, Result]:
        async with asyncio.timeout(60):
            while len(self.results) < count:
                await asyncio.sleep(0.005)
        return dict(self.results)


def with_process(folder: Path, test: Callable[[Held], Awaitable[None]]) -> None:
    async def main() -> None:
        worker = ProcessWorker(folder)
        await worker.start()
        try:
            await test(Held(worker))
        finally:
            await worker.close()

    asyncio.run(main())


def test_a_process_runs_its_next_batch_by_itself(folder: Path) -> None:
    async def test(held: Held) -> None:
        held.submit(1)
        assert held.worker.takes_ahead
        held.submit(2)
        assert not held.worker.takes_ahead
        found = await held.go_on(2)
        assert [found[value].outputs["y"].tolist() for value in (1, 2)] == [[[2] * 4], [[4] * 4]]  # type: ignore[index]
        assert not held.worker.recall(), "it has run"

    with_process(folder, test)


def test_a_batch_that_was_taken_back_never_runs(folder: Path) -> None:
    async def test(held: Held) -> None:
        held.submit(1)
        held.submit(2)
        assert held.worker.recall()
        assert not held.worker.recall(), "once"
        assert held.worker.takes_ahead
        held.submit(3)
        assert not held.worker.takes_ahead, "it has its next"
        assert held.worker.recall()
        assert not held.worker.takes_ahead, "the process has seen neither yet"
        found = await held.go_on(1)
        assert found[1].outputs is not None
        held.submit(4)
        held.submit(5)
        found = await held.until(3)
        assert set(found) == {1, 4, 5}
        assert [found[value].outputs["y"][0, 0] for value in (4, 5)] == [8, 10]  # type: ignore[index]

    with_process(folder, test)


def test_a_batch_whose_time_is_over_never_runs(folder: Path) -> None:
    async def test(held: Held) -> None:
        held.submit(1)
        held.submit(2, before=time.monotonic_ns() + 1_000_000)
        await asyncio.sleep(0.01)
        found = await held.go_on(2)
        assert found[1].outputs is not None
        assert (found[2].began, found[2].outputs, found[2].error) == (False, None, None)

    with_process(folder, test)


def test_a_batch_that_cannot_be_told_of_is_as_if_it_had_not_been(folder: Path) -> None:
    async def test(held: Held) -> None:
        held.submit(1)
        with pytest.raises(TypeError):
            held.submit(2, before=1 << 70)
        held.submit(3)
        found = await held.go_on(2)
        assert {value: result.outputs["y"][0, 0] for value, result in found.items() if result.outputs} == {1: 2, 3: 6}

    with_process(folder, test)


def test_a_client_may_wait_for_longer_than_there_are_numbers(folder: Path) -> None:
    async def main() -> None:
        worker = ProcessWorker(folder)
        await worker.start()
        scheduler = Scheduler([worker], Settings(Batching(1)))
        jobs = [submit(scheduler, value, timeout=2.0**60) for value in range(4)]
        async with asyncio.timeout(30):
            await scheduler.drained()
        assert [job.outputs["y"][0, 0] for job in jobs if job.outputs is not None] == [0, 2, 4, 6]
        await scheduler.close()

    asyncio.run(main())


def test_a_process_that_dies_loses_its_batch_and_gives_the_next_back(folder: Path) -> None:
    async def test(held: Held) -> None:
        held.submit(1)
        held.submit(2)
        assert held.worker.pid is not None
        os.kill(held.worker.pid, signal.SIGKILL)
        found = await held.until(2)
        assert isinstance(found[1].error, WorkerLostError)
        assert not found[2].began

    with_process(folder, test)


def test_of_two_who_mark_a_batch_at_the_same_moment_one_sees_the_other() -> None:
    """A batch that was seen not to have begun never runs, whoever comes first."""
    server = Marks.create()
    process = Marks(os.dup(server.descriptor))
    begins, taken = threading.Barrier(2), list[bool]()

    def take_back() -> None:
        for number in range(1, 2001):
            begins.wait()
            taken.append(server.recall(number))

    thread = threading.Thread(target=take_back)
    thread.start()
    ran: list[bool] = []
    for number in range(1, 2001):
        begins.wait()
        ran.append(process.begin(number))
    thread.join()
    assert not any(may and gone for may, gone in zip(ran, taken, strict=True))
    server.close()
    process.close()


def test_marks_of_one_slot_leave_the_other_alone() -> None:
    marks = Marks.create()
    assert marks.begin(1)
    assert marks.recall(2)
    assert marks.begin(3), "taken back was the one before"
    assert marks.recall(4)
    assert not marks.begin(4)
    assert marks.begin(4 + SLOTS)
    marks.close()


# All of it ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("requests", "largest"), [(300, 1), (300, 3)])
def test_everybody_hears_once_and_the_right_thing(folder: Path, requests: int, largest: int) -> None:
    """Two processes, of which one is killed at times, under requests that leave, expire and overtake each other."""
    rng = random.Random(largest)

    async def main() -> None:
        workers = [ProcessWorker(folder) for _ in range(2)]
        await asyncio.gather(*(worker.start() for worker in workers))
        scheduler = Scheduler(workers, Settings(Batching(largest), queue=requests, batch_timeout=30))
        told: dict[int, int] = {}
        jobs: dict[int, Job] = {}
        for number in range(requests):
            timeout = rng.choice((None, None, None, 0.005, 0.05, 5.0))
            try:
                job = submit(
                    scheduler, *[number] * rng.randint(1, largest), priority=rng.randint(1, 3), timeout=timeout
                )
            except Refusal as refusal:
                if refusal.status not in {429, 503}:
                    raise
                continue
            jobs[number] = job
            if job.finished:
                told[number] = 1
            else:
                job.done = lambda _, number=number: told.update({number: told.get(number, 0) + 1})
            leaves = jobs[rng.choice(list(jobs))] if rng.random() < 0.1 else None
            if leaves is not None and not leaves.finished:
                scheduler.cancel(leaves)
            if number in {requests // 3, requests // 2} and workers[0].pid is not None:
                os.kill(workers[0].pid, signal.SIGKILL)
            if rng.random() < 0.3:
                await asyncio.sleep(rng.random() * 0.003)
        async with asyncio.timeout(60):
            await scheduler.drained()
        for number, job in jobs.items():
            assert job.finished
            assert told.get(number, 0) == (0 if job.left else 1), number
            if job.outputs is not None:
                assert (job.outputs["y"] == 2 * number).all()
            else:
                assert isinstance(job.error, Refusal | WorkerLostError | RuntimeFailedError), job.error
        assert sum(job.outputs is not None for job in jobs.values()) > len(jobs) / 3
        await scheduler.close()

    asyncio.run(main())
