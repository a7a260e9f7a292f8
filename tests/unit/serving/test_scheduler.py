"""Who runs when, with whom, and who never does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from serving_models import FOURS, Gate, doubled, spec

from narrowcast.errors import RuntimeFailedError
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.scheduling.queue import Batching, Job
from narrowcast.serving.scheduling.scheduler import Scheduler, Settings
from narrowcast.serving.signature import Signature, Tensors
from narrowcast.serving.workers.base import Batch, Done, Result, Worker
from narrowcast.serving.workers.inline import InlineWorker, ThreadWorker
from narrowcast.serving.workers.loading import FunctionModel


class StepWorker(Worker):
    """Runs a batch when it is told to."""

    def __init__(self, signature: Signature = FOURS) -> None:
        self.signature = signature
        self.batches: list[Batch] = []
        self.ran: list[list[float]] = []
        self._done: Done | None = None

    async def start(self) -> None: ...

    def submit(self, batch: Batch, done: Done) -> None:
        assert self._done is None, "one batch at a time"
        self.batches.append(batch)
        self.ran.append([float(value) for part in batch.parts for value in part["x"][:, 0]])
        self._done = done

    def step(self) -> None:
        assert self._done is not None
        done, self._done = self._done, None
        done(Result(doubled({"x": np.concatenate([part["x"] for part in self.batches[-1].parts])}), None, 1, 2, 3))

    def fail(self, error: Exception) -> None:
        assert self._done is not None
        done, self._done = self._done, None
        done(Result(error=error))

    async def close(self) -> None: ...


def rows(*values: float, width: int = 4) -> Tensors:
    array = np.zeros((len(values), width), np.float32)
    array[:, 0] = values
    return {"x": array}


def submit(scheduler: Scheduler, *values: float, **more: Any) -> Job:
    return scheduler.submit(rows(*values), len(values), **more)


def drive(test: Callable[[Scheduler, StepWorker], Awaitable[None]], **settings: Any) -> None:
    """Run a test on a scheduler with one worker."""

    async def main() -> None:
        worker = StepWorker()
        scheduler = Scheduler([worker], Settings(**({"batching": Batching(8)} | settings)))
        await test(scheduler, worker)

    asyncio.run(main())


def test_what_waits_runs_together_and_each_gets_its_own_rows() -> None:
    async def test(scheduler: Scheduler, worker: StepWorker) -> None:
        first = submit(scheduler, 1)
        waiting = [
            submit(scheduler, 2, 3),
            submit(scheduler, 4),
            submit(scheduler, 5, 6, 7, 8),
            submit(scheduler, 9, 10),
        ]
        worker.step()
        assert first.outputs is not None
        assert worker.ran[1:] == [[2, 3, 4, 5, 6, 7, 8]], "the next would be the ninth row"
        worker.step()
        worker.step()
        assert [job.outputs["y"][:, 0].tolist() for job in waiting if job.outputs] == [
            [4, 6],
            [8],
            [10, 12, 14, 16],
            [18, 20],
        ]
        assert scheduler.statistics.executions == 3
        assert scheduler.statistics.inferences == 10
        assert scheduler.statistics.success.count == 5

    drive(test)


def test_different_shapes_never_share_a_batch() -> None:
    signature = Signature((spec("x", -1, -1),), (spec("y", -1, -1),), batched=True)

    async def main() -> None:
        worker = StepWorker(signature)
        scheduler = Scheduler([worker], Settings(Batching(8)))
        scheduler.submit(rows(0), 1)
        for value, width in ((1, 4), (2, 5), (3, 4), (4, 5)):
            scheduler.submit(rows(value, width=width), 1)
        for _ in range(3):
            worker.step()
        assert worker.ran == [[0], [1, 3], [2, 4]]

    asyncio.run(main())


def test_models_without_a_batch_axis_run_one_request_at_a_time() -> None:
    async def main() -> None:
        worker = StepWorker(Signature(FOURS.inputs, FOURS.outputs, batched=False))
        scheduler = Scheduler([worker], Settings(Batching(8)))
        for value in range(3):
            submit(scheduler, value)
        for _ in range(3):
            worker.step()
        assert worker.ran == [[0], [1], [2]]
        assert scheduler.largest_batch == 0

    asyncio.run(main())


def test_priorities_go_first_and_equals_in_order() -> None:
    async def test(scheduler: Scheduler, worker: StepWorker) -> None:
        submit(scheduler, 0)
        for value, priority in ((1, 0), (2, 3), (3, 1), (4, 1), (5, 0)):
            submit(scheduler, value, priority=priority)
        for _ in range(4):
            worker.step()
        assert worker.ran == [[0], [3, 4], [2], [1, 5]]

    drive(test)


def test_the_delay_bounds_the_wait_of_the_oldest() -> None:
    async def test(scheduler: Scheduler, worker: StepWorker) -> None:
        submit(scheduler, 1)
        assert worker.ran == [], "a worker is free, but company may come"
        submit(scheduler, 2)
        await asyncio.sleep(0.1)
        assert worker.ran == [[1, 2]]
        worker.step()
        submit(scheduler, *range(8))
        assert len(worker.ran) == 2, "a full batch does not wait"

    drive(test, batching=Batching(8, delay_ns=30_000_000))


def test_a_preferred_size_does_not_wait() -> None:
    async def test(scheduler: Scheduler, worker: StepWorker) -> None:
        submit(scheduler, 1)
        submit(scheduler, 2)
        submit(scheduler, 3)
        assert worker.ran == []
        submit(scheduler, 4)
        assert worker.ran == [[1, 2, 3, 4]]

    drive(test, batching=Batching(8, delay_ns=10**12, preferred=(4,)))


def test_more_rows_than_a_batch_may_have_are_refused() -> None:
    async def test(scheduler: Scheduler, worker: StepWorker) -> None:
        with pytest.raises(Refusal, match="9 rows; allowed: 8") as caught:
            submit(scheduler, *range(9))
        assert caught.value.status == 400

    drive(test)


def test_the_queue_is_bounded() -> None:
    async def test(scheduler: Scheduler, worker: StepWorker) -> None:
        for value in range(4):
            submit(scheduler, value)
        with pytest.raises(Refusal, match="3 requests wait already") as caught:
            submit(scheduler, 9)
        assert caught.value.status == 503
        assert caught.value.retry_after is not None
        worker.step()
        submit(scheduler, 5)
        assert scheduler.pending == 1

    drive(test, queue=3)


def test_expired_requests_are_told_and_never_run() -> None:
    async def test(scheduler: Scheduler, worker: StepWorker) -> None:
        told: list[Job] = []
        submit(scheduler, 0)
        late = submit(scheduler, 1, timeout=0.02)
        late.done = told.append
        patient = submit(scheduler, 2, timeout=30)
        await asyncio.sleep(0.1)
        assert told == [late], "while the worker is still busy"
        assert isinstance(late.error, Refusal)
        assert late.error.status == 504
        worker.step()
        worker.step()
        assert worker.ran == [[0], [2]]
        assert patient.outputs is not None
        assert scheduler.statistics.expired == 1

    drive(test)


def test_a_deadline_that_has_passed_when_the_worker_is_free_counts_too() -> None:
    async def test(scheduler: Scheduler, worker: StepWorker) -> None:
        job = submit(scheduler, 1, timeout=0.0)
        assert isinstance(job.error, Refusal)
        assert worker.ran == []

    drive(test)


def test_the_server_has_a_timeout_of_its_own() -> None:
    async def test(scheduler: Scheduler, worker: StepWorker) -> None:
        submit(scheduler, 0)
        job = submit(scheduler, 1)
        await asyncio.sleep(0.1)
        assert isinstance(job.error, Refusal)

    drive(test, timeout=0.02)


def test_cancelled_requests_never_run() -> None:
    async def test(scheduler: Scheduler, worker: StepWorker) -> None:
        submit(scheduler, 0)
        gone, stays = submit(scheduler, 1), submit(scheduler, 2)
        scheduler.cancel(gone)
        worker.step()
        worker.step()
        assert worker.ran == [[0], [2]]
        assert stays.outputs is not None
        assert scheduler.statistics.cancelled == 1
        assert not scheduler.busy

    drive(test)


def test_a_request_that_cannot_meet_its_deadline_is_refused_at_once() -> None:
    async def test(scheduler: Scheduler, worker: StepWorker) -> None:
        submit(scheduler, 0)
        await asyncio.sleep(0.05)
        worker.step()  # one row takes 50 ms, as measured
        submit(scheduler, 1)
        for value in range(20):
            submit(scheduler, value)
        with pytest.raises(Refusal, match="the answer would take about") as caught:
            submit(scheduler, 9, timeout=0.04)
        assert caught.value.status == 429
        assert submit(scheduler, 9, timeout=3600).error is None
        assert scheduler.statistics.rejected == {"deadline": 1}

    drive(test)


def test_a_measured_time_never_shuts_the_door_for_good() -> None:
    """However slow the last batch was, a request that finds everything free is tried."""

    async def test(scheduler: Scheduler, worker: StepWorker) -> None:
        submit(scheduler, 0)
        await asyncio.sleep(0.05)
        worker.step()
        assert submit(scheduler, 1, timeout=0.01).error is None
        assert worker.ran == [[0], [1]]

    drive(test)


def test_a_poisoned_request_fails_alone() -> None:
    async def main() -> None:
        def picky(inputs: Tensors) -> Tensors:
            if (inputs["x"] == 666).any():
                raise RuntimeFailedError("poison")
            gate.ran.append(inputs["x"][:, 0].tolist())
            return doubled(inputs)

        gate = Gate()
        worker = InlineWorker(lambda: FunctionModel(FOURS, picky))
        await worker.start()
        scheduler = Scheduler([worker], Settings(Batching(8, delay_ns=10**6)))
        jobs = [submit(scheduler, value) for value in (1, 666, 3)]
        await scheduler.drained()
        assert [job.outputs is not None for job in jobs] == [True, False, True]
        assert isinstance(jobs[1].error, RuntimeFailedError)
        assert sorted(gate.ran) == [[1], [3]]

    asyncio.run(main())


def test_workers_share_the_load() -> None:
    async def main() -> None:
        gate = Gate()
        workers = [ThreadWorker(lambda: FunctionModel(FOURS, gate)) for _ in range(2)]
        for worker in workers:
            await worker.start()
        scheduler = Scheduler(workers, Settings(Batching(1)))
        jobs = [submit(scheduler, value) for value in range(4)]
        loop = asyncio.get_running_loop()
        for _ in range(2):
            assert await loop.run_in_executor(None, gate.entered.acquire, True, 30)
        assert sorted(gate.ran) == [[0], [1]], "two run at a time"
        for _ in range(4):
            gate.open.release()
        await scheduler.drained()
        assert all(job.outputs is not None for job in jobs)
        await scheduler.close()

    asyncio.run(main())


def test_when_the_last_worker_dies_everybody_is_told_and_new_requests_are_refused() -> None:
    async def test(scheduler: Scheduler, worker: StepWorker) -> None:
        running, waiting = submit(scheduler, 0), submit(scheduler, 1)
        worker.on_down(worker)
        worker.fail(RuntimeFailedError("gone"))
        assert running.error is not None
        assert isinstance(waiting.error, Refusal)
        assert waiting.error.status == 503
        with pytest.raises(Refusal, match="no worker of the model is alive"):
            submit(scheduler, 2)
        worker.on_up(worker)
        again = submit(scheduler, 3)
        worker.step()
        assert again.outputs is not None

    drive(test)


def test_closing_refuses_what_waits() -> None:
    async def test(scheduler: Scheduler, worker: StepWorker) -> None:
        submit(scheduler, 0)
        waiting = submit(scheduler, 1)
        await scheduler.close("over")
        assert isinstance(waiting.error, Refusal)
        assert waiting.error.message == "over"

    drive(test)


def test_a_model_that_breaks_its_promise_of_rows_fails_its_requests() -> None:
    async def main() -> None:
        worker = InlineWorker(lambda: FunctionModel(FOURS, lambda inputs: {"y": inputs["x"].sum(0)}))
        await worker.start()
        scheduler = Scheduler([worker], Settings(Batching(8, delay_ns=10**6)))
        jobs = [submit(scheduler, value) for value in (1, 2)]
        await scheduler.drained()
        return [job.error is None for job in jobs]

    asyncio.run(main())


# A batch that fails, and those who do not wait any more ---------------------------------------------------------------


def test_who_left_while_a_batch_ran_is_not_run_again_when_it_fails() -> None:
    async def test(scheduler: Scheduler, worker: StepWorker) -> None:
        submit(scheduler, 1)
        left, stays = submit(scheduler, 2), submit(scheduler, 3)
        worker.step()
        scheduler.cancel(left)
        worker.fail(ValueError("poisoned"))
        assert worker.ran[2:] == [[3]]
        worker.step()
        assert stays.outputs is not None
        assert left.finished
        assert not scheduler.busy

    drive(test)


def test_who_waits_to_run_again_alone_is_told_when_its_time_is_over() -> None:
    async def test(scheduler: Scheduler, worker: StepWorker) -> None:
        submit(scheduler, 1)
        patient, hurried = submit(scheduler, 2), submit(scheduler, 3, timeout=0.05)
        worker.step()
        worker.fail(ValueError("poisoned"))
        assert worker.ran[2:] == [[2]]
        told = asyncio.Event()
        hurried.done = lambda _: told.set()
        await asyncio.wait_for(told.wait(), 10)
        assert isinstance(hurried.error, Refusal)
        assert hurried.error.status == 504
        assert scheduler.statistics.expired == 1
        worker.step()
        assert patient.outputs is not None
        assert worker.ran[3:] == []

    drive(test)
