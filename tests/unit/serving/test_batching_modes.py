"""Preferred sizes, padding, and static batches beside dynamic ones."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_models import FOURS, doubled, function, spec, until
from test_scheduler import StepWorker, drive, rows, submit

from narrowcast.serving.catalogue import Catalogue, Hosting
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.repository import Repository
from narrowcast.serving.scheduling.queue import Batching
from narrowcast.serving.scheduling.scheduler import Scheduler, Settings
from narrowcast.serving.signature import Signature, Tensors
from narrowcast.serving.workers.inline import InlineWorker
from narrowcast.serving.workers.loading import FunctionModel
from narrowcast.serving.workers.sources import Placement

LONG = 30_000_000_000  # a delay that no test lives to see the end of
SHORT = 500_000_000  # one that ends, but not between two requests of a test on a machine that does other things


def sizes(worker: StepWorker) -> list[int]:
    return [batch.rows for batch in worker.batches]


# Sizes ----------------------------------------------------------------------------------------------------------------


def test_a_preferred_size_runs_at_once_and_the_rest_waits() -> None:
    async def test(scheduler: Scheduler, worker: StepWorker) -> None:
        for value in range(3):
            submit(scheduler, value)
        assert worker.ran == []
        submit(scheduler, 3)
        assert worker.ran == [[0, 1, 2, 3]]
        for value in range(4, 9):
            submit(scheduler, value)
        worker.step()
        assert worker.ran[1:] == [[4, 5, 6, 7]], "the fifth waits for company"
        worker.step()
        assert scheduler.pending == 1

    drive(test, batching=Batching(16, LONG, (4, 8)))


def test_rows_count_and_not_requests() -> None:
    async def test(scheduler: Scheduler, worker: StepWorker) -> None:
        submit(scheduler, 1, 2, 3)
        assert worker.ran == []
        submit(scheduler, 4)
        assert sizes(worker) == [4]

    drive(test, batching=Batching(16, LONG, (4,)))


def test_nothing_is_padded_unless_asked() -> None:
    async def test(scheduler: Scheduler, worker: StepWorker) -> None:
        submit(scheduler, 1)
        await asyncio.sleep(0.05)
        assert sizes(worker) == [1]
        worker.step()
        assert scheduler.statistics.padding == 0

    drive(test, batching=Batching(8, 10_000_000, (4,)))


@given(
    st.integers(1, 64),
    st.lists(st.integers(1, 64), max_size=4),
    st.integers(1, 64),
    st.booleans(),
)
def test_padding_goes_to_the_next_preferred_size(largest: int, preferred: list[int], asked: int, pad: bool) -> None:
    fitting = tuple(sorted({size for size in preferred if size <= largest}))
    given_rows = Batching(largest, 0, fitting, pad).padded(asked)
    if not pad or asked >= largest:
        assert given_rows == asked
    else:
        assert given_rows in (*fitting, largest)
        assert not any(asked <= size < given_rows for size in fitting)


# Padding --------------------------------------------------------------------------------------------------------------


def test_padded_rows_are_copies_and_are_cut_off_again() -> None:
    async def test(scheduler: Scheduler, worker: StepWorker) -> None:
        first, second = submit(scheduler, 1, 2), submit(scheduler, 3)
        await until(lambda: bool(worker.ran))
        assert worker.ran == [[1, 2, 3, 3]]
        worker.step()
        assert first.outputs is not None
        assert second.outputs is not None
        assert first.outputs["y"][:, 0].tolist() == [2, 4]
        assert second.outputs["y"][:, 0].tolist() == [6]
        counted = scheduler.statistics
        assert (counted.inferences, counted.padding, counted.executions) == (3, 1, 1)
        assert list(counted.batches) == [4]

    drive(test, batching=Batching(8, SHORT, (4,), pad=True))


def test_a_single_padded_request_gets_its_own_rows_alone() -> None:
    async def test(scheduler: Scheduler, worker: StepWorker) -> None:
        job = submit(scheduler, 5)
        assert sizes(worker) == [8], "to the largest, where no size is preferred"
        worker.step()
        assert job.outputs is not None
        assert job.outputs["y"].shape == (1, 4)

    drive(test, batching=Batching(8, pad=True))


def test_texts_and_wide_tensors_are_padded_too() -> None:
    inputs = (spec("t", -1, datatype="BYTES"), spec("x", -1, 2, 3, datatype="INT16"))
    signature = Signature(inputs, (spec("n", -1, datatype="INT64"),), batched=True)
    seen: list[Tensors] = []

    def lengths(given_: Tensors) -> Tensors:
        seen.append(given_)
        return {"n": np.array([len(text) for text in given_["t"]], np.int64)}

    async def main() -> None:
        worker = InlineWorker(lambda: FunctionModel(signature, lengths))
        await worker.start()
        scheduler = Scheduler([worker], Settings(Batching.static(4, 0)))
        texts = np.array([b"one", b"seven"], object)
        job = scheduler.submit({"t": texts, "x": np.arange(12, dtype=np.int16).reshape(2, 2, 3)}, 2)
        assert job.outputs is not None
        assert job.outputs["n"].tolist() == [3, 5]
        assert seen[0]["t"].tolist() == [b"one", b"seven", b"seven", b"seven"]
        assert seen[0]["x"].shape == (4, 2, 3)
        assert (seen[0]["x"][1:] == seen[0]["x"][1]).all()

    asyncio.run(main())


def test_padding_does_not_hide_a_model_that_breaks_its_promise_of_rows() -> None:
    async def main() -> None:
        worker = InlineWorker(lambda: FunctionModel(FOURS, lambda inputs: {"y": inputs["x"][:1]}))
        await worker.start()
        scheduler = Scheduler([worker], Settings(Batching.static(4, 0)))
        job = submit(scheduler, 1)
        assert isinstance(job.error, Refusal)
        assert job.error.status == 500

    asyncio.run(main())


def test_a_poisoned_request_fails_alone_in_padded_batches() -> None:
    async def main() -> None:
        def picky(inputs: Tensors) -> Tensors:
            if (inputs["x"] == 666).any():
                raise ValueError("poison")
            return doubled(inputs)

        worker = InlineWorker(lambda: FunctionModel(FOURS, picky))
        await worker.start()
        scheduler = Scheduler([worker], Settings(Batching.static(4, 10_000_000)))
        jobs = [submit(scheduler, value) for value in (1, 666, 3)]
        await scheduler.drained()
        assert [job.outputs is not None for job in jobs] == [True, False, True]

    asyncio.run(main())


# Static batches -------------------------------------------------------------------------------------------------------


def test_static_batches_have_one_size_and_a_bounded_wait() -> None:
    async def test(scheduler: Scheduler, worker: StepWorker) -> None:
        for value in range(5):
            submit(scheduler, value)
        assert worker.ran == [[0, 1, 2, 3]]
        worker.step()
        assert len(worker.ran) == 1, "the fifth waits for three others"
        await until(lambda: len(worker.ran) > 1)
        assert worker.ran[1:] == [[4, 4, 4, 4]], "and no longer than the delay"
        worker.step()
        assert set(sizes(worker)) == {4}
        assert scheduler.statistics.padding == 3

    drive(test, batching=Batching.static(4, SHORT))


def test_static_batches_of_different_shapes_are_padded_each_by_itself() -> None:
    signature = Signature((spec("x", -1, -1),), (spec("y", -1, -1),), batched=True)

    async def main() -> None:
        worker = StepWorker(signature)
        scheduler = Scheduler([worker], Settings(Batching.static(2, SHORT)))
        for value, width in ((1, 4), (2, 5), (3, 4)):
            scheduler.submit(rows(value, width=width), 1)
        assert worker.ran == [[1, 3]]
        worker.step()
        await until(lambda: len(worker.ran) == 2)
        worker.step()
        assert worker.ran[1:] == [[2, 2]]

    asyncio.run(main())


def test_a_model_without_a_batch_axis_is_never_padded() -> None:
    async def main() -> None:
        worker = StepWorker(Signature(FOURS.inputs, FOURS.outputs, batched=False))
        scheduler = Scheduler([worker], Settings(Batching.static(8, 10_000_000)))
        submit(scheduler, 1)
        assert sizes(worker) == [1]

    asyncio.run(main())


@pytest.mark.parametrize("batching", [Batching(4, 2_000_000), Batching.static(4, 2_000_000)], ids=["dynamic", "static"])
def test_both_give_the_same_answers(batching: Batching) -> None:
    async def main() -> None:
        hosting = Hosting(Placement.THREAD, settings=Settings(batching))
        catalogue = Catalogue(Repository(sources={"model": function()}), hosting)
        await catalogue.load_all()
        scheduler = catalogue.find("model").scheduler
        jobs = [submit(scheduler, *range(value, value + 1 + value % 3)) for value in range(30)]
        await scheduler.drained()
        for value, job in enumerate(jobs):
            assert job.outputs is not None
            expected: Any = [2 * number for number in range(value, value + 1 + value % 3)]
            assert job.outputs["y"][:, 0].tolist() == expected
        if batching.is_static:
            assert set(scheduler.statistics.batches) == {4}
        await catalogue.close()

    asyncio.run(main())


@pytest.mark.parametrize("pad", [False, True])
def test_rows_that_make_up_no_preferred_size_wait_for_company(pad: bool) -> None:
    async def test(scheduler: Scheduler, worker: StepWorker) -> None:
        submit(scheduler, 1, 2, 3)
        submit(scheduler, 4, 5, 6)
        assert worker.ran == [], "no requests of them have four rows together"
        submit(scheduler, 7, 8)
        assert worker.ran == [[1, 2, 3, 4, 5, 6, 7, 8]]

    drive(test, batching=Batching(16, LONG, (4, 8), pad))


def test_a_batch_that_the_next_request_does_not_fit_into_is_full() -> None:
    async def test(scheduler: Scheduler, worker: StepWorker) -> None:
        submit(scheduler, 1, 2, 3)
        submit(scheduler, 4, 5)
        submit(scheduler, 6, 7, 8, 9)
        assert worker.ran == [[1, 2, 3, 4, 5]]

    drive(test, batching=Batching(8, LONG, (4,)))
