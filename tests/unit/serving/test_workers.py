"""Workers in processes, and the memory that they share with the server."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nst
from serving_models import FOURS, doubled, write_artifact

from narrowcast.artifacts.manifest import Manifest
from narrowcast.errors import ArtifactError, NarrowcastError, RuntimeFailedError
from narrowcast.recipes.target import Target
from narrowcast.serving.datatypes import DATATYPES
from narrowcast.serving.refusals import WorkerLostError
from narrowcast.serving.workers.arena import Arena, anonymous_file
from narrowcast.serving.workers.base import Batch, Result
from narrowcast.serving.workers.frames import Frames, pack
from narrowcast.serving.workers.inline import InlineWorker, ThreadWorker
from narrowcast.serving.workers.loading import FunctionModel, open_artifact
from narrowcast.serving.workers.process import ProcessWorker

ManifestOf = Callable[..., Manifest]


async def run(worker: ProcessWorker, *parts: np.ndarray) -> Result:
    """Run a batch and return what became of it."""
    came: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
    worker.submit(Batch([{"x": part} for part in parts], sum(len(part) for part in parts)), came.set_result)
    return await asyncio.wait_for(came, 30)


def with_worker(folder: Path, test: Callable[[ProcessWorker], Awaitable[None]]) -> None:
    async def main() -> None:
        worker = ProcessWorker(folder)
        await worker.start()
        try:
            await test(worker)
        finally:
            await worker.close()

    asyncio.run(main())


@pytest.fixture
def folder(tmp_path: Path, manifest_of: ManifestOf) -> Path:
    return write_artifact(tmp_path / "double", manifest_of())


def ones(rows: int, value: float = 1.0) -> np.ndarray:
    return np.full((rows, 4), value, np.float32)


def test_batches_of_any_size_come_back_in_order(folder: Path) -> None:
    async def test(worker: ProcessWorker) -> None:
        first = await run(worker, ones(1, 1), ones(2, 2))
        assert first.outputs is not None
        kept = first.outputs["y"]
        large = await run(worker, ones(100_000, 3))  # far beyond the memory there is at first
        assert large.outputs is not None
        np.testing.assert_array_equal(large.outputs["y"], ones(100_000, 6))
        small = await run(worker, ones(1, 5))
        assert small.outputs is not None
        np.testing.assert_array_equal(small.outputs["y"], ones(1, 10))
        np.testing.assert_array_equal(kept, [[2] * 4, [4] * 4, [4] * 4], "later batches do not reach earlier answers")
        assert min(first.infer_ns, first.input_ns, first.output_ns) > 0

    with_worker(folder, test)


def test_a_batch_that_the_model_refuses_leaves_the_worker_alive(folder: Path) -> None:
    async def test(worker: ProcessWorker) -> None:
        wrong = await run(worker, np.ones((1, 5), np.float32))
        assert isinstance(wrong.error, NarrowcastError)
        assert (await run(worker, ones(1))).outputs is not None

    with_worker(folder, test)


def test_a_worker_that_is_killed_fails_its_batch_and_comes_back(folder: Path) -> None:
    async def test(worker: ProcessWorker) -> None:
        down, up = asyncio.Event(), asyncio.Event()
        worker.on_down, worker.on_up = (lambda _: down.set()), (lambda _: up.set())
        pid = worker.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)  # in the middle of its batch, whenever that is
        running = asyncio.create_task(run(worker, ones(1)))
        await asyncio.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        assert isinstance((await running).error, WorkerLostError)
        assert down.is_set()
        assert isinstance((await run(worker, ones(1))).error, WorkerLostError), "nobody is there yet"
        await asyncio.wait_for(up.wait(), 60)
        assert worker.pid != pid
        assert (await run(worker, ones(1))).outputs is not None

    with_worker(folder, test)


def test_closing_leaves_no_process_and_no_descriptor(folder: Path) -> None:
    async def main() -> None:
        before = set(map(str, Path("/proc/self/fd").iterdir()))
        for _ in range(2):
            worker = ProcessWorker(folder)
            await worker.start()
            pid = worker.pid
            await worker.close()
            assert pid is not None
            assert not psutil.pid_exists(pid)
        left = set(map(str, Path("/proc/self/fd").iterdir())) - before
        assert len(left) <= 1, "the event loop may keep one to hear of children"

    asyncio.run(main())


def test_an_artifact_that_was_changed_is_refused_by_name(folder: Path) -> None:
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes() + b"x")

    async def main() -> None:
        with pytest.raises(ArtifactError, match=r"damaged: file model\.onnx"):
            await ProcessWorker(folder).start()

    asyncio.run(main())


def test_a_process_that_dies_while_it_loads_is_a_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")

    async def main() -> None:
        with pytest.raises(RuntimeFailedError, match="ended while it loaded"):
            await ProcessWorker(folder).start()

    asyncio.run(main())


def test_a_process_that_cannot_be_started_is_a_failure_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/no/such/program")

    async def main() -> None:
        before = set(map(str, Path("/proc/self/fd").iterdir()))
        with pytest.raises(RuntimeFailedError, match="cannot be started: No such file"):
            await ProcessWorker(folder).start()
        assert len(set(map(str, Path("/proc/self/fd").iterdir())) - before) <= 1

    asyncio.run(main())


# Shared memory --------------------------------------------------------------------------------------------------------

SHAPES = nst.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["FP32", "INT8", "BOOL", "FP64", "FP16"]), SHAPES), max_size=4), st.data())
def test_tensors_come_out_of_an_arena_as_they_went_in(
    plan: list[tuple[str, tuple[int, ...]]], data: st.DataObject
) -> None:
    descriptor = anonymous_file()
    writer, reader = Arena(descriptor), Arena(os.dup(descriptor))
    try:
        given_ = {
            str(index): data.draw(nst.arrays(DATATYPES[name].dtype, shape)) for index, (name, shape) in enumerate(plan)
        }
        tensors = [(key, DATATYPES[name], [given_[key]]) for key, (name, _) in zip(given_, plan, strict=True)]
        read = reader.read(writer.write(tensors))
        for key, array in given_.items():
            assert read[key].dtype == array.dtype
            np.testing.assert_array_equal(read[key], array)
            assert read[key].ctypes.data % array.dtype.itemsize == 0
        del read
    finally:
        writer.close()
        reader.close()


def test_texts_and_parts_go_through_an_arena() -> None:
    arena = Arena(anonymous_file())
    texts = np.array([[b"a"], [b"long" * 50_000]], object)
    numbers = [np.arange(3, dtype=np.int16), np.arange(2, dtype=np.int16)]
    placed = arena.write([("t", DATATYPES["BYTES"], [texts, texts]), ("n", DATATYPES["INT16"], numbers)])
    read = arena.read(placed)
    assert read["t"].tolist() == [*texts.tolist(), *texts.tolist()]
    assert read["n"].tolist() == [0, 1, 2, 0, 1]
    del read
    arena.close()


@given(st.lists(st.dictionaries(st.text(max_size=3), st.integers(0, 9)), max_size=5), st.integers(1, 7))
def test_frames_come_out_of_any_pieces(documents: list[dict[str, int]], step: int) -> None:
    stream = b"".join(map(pack, documents))
    frames = Frames()
    found = [document for at in range(0, len(stream), step) for document in frames.feed(stream[at : at + step])]
    assert found == documents


def test_an_arena_that_keeps_its_views_follows_every_change_of_shape_and_size() -> None:
    descriptor = anonymous_file()
    writer, reader = Arena(descriptor), Arena(os.dup(descriptor))
    fp32, int32 = DATATYPES["FP32"], DATATYPES["INT32"]
    plans: list[list[tuple[str, np.ndarray]]] = []
    for rows in (1, 1, 3, 3, 100_000, 100_000, 1, 1):  # the sixth is beyond the memory there is at first
        plans.append([("x", np.full((rows, 4), len(plans), np.float32))])
        plans.append([("x", np.full((rows, 4), len(plans), np.int32))])
        plans.append([("y", np.full((4, rows), len(plans), np.float32)), ("x", np.ones((0, 2), np.float32))])
        plans.append([("b", np.full((rows, 4), len(plans), np.float32)), ("a", np.zeros((rows, 4), np.float32))])
        plans.append(plans[-1])
    for plan in plans:
        for halves in (1, 2):
            tensors = [
                (
                    name,
                    int32 if array.dtype == np.int32 else fp32,
                    np.array_split(array, halves) if len(array) else [array],
                )
                for name, array in plan
            ]
            read = reader.read(writer.write(tensors))
            assert list(read) == [name for name, _ in plan]
            for name, array in plan:
                assert read[name].dtype == array.dtype
                np.testing.assert_array_equal(read[name], array)
            del read
    writer.close()
    reader.close()


def test_threads_of_a_served_model_give_up_their_cores_between_batches(
    tmp_path: Path, manifest_of: ManifestOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_artifact(tmp_path / "double", manifest_of(target=Target(threads=2)))
    opened: list[ort.SessionOptions] = []
    session = ort.InferenceSession

    def open_session(path: str, options: ort.SessionOptions, providers: list[str]) -> ort.InferenceSession:
        opened.append(options)
        return session(path, options, providers=providers)

    monkeypatch.setattr(ort, "InferenceSession", open_session)
    model = open_artifact(folder)
    np.testing.assert_array_equal(model.run({"x": ones(2)})["y"], ones(2, 2))
    model.close()
    assert [options.intra_op_num_threads for options in opened] == [2]
    assert opened[0].get_session_config_entry("session.intra_op.allow_spinning") == "0"


# Loads that come too late ---------------------------------------------------------------------------------------------


class Counted(FunctionModel):
    """Says when it is closed."""

    def __init__(self) -> None:
        super().__init__(FOURS, doubled)
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


@pytest.mark.parametrize("kind", [InlineWorker, ThreadWorker])
def test_a_model_that_nobody_waits_for_any_more_is_closed_and_holds_nobody_up(
    kind: type[InlineWorker] | type[ThreadWorker],
) -> None:
    model, begun, may = Counted(), threading.Event(), threading.Event()

    def load() -> Counted:
        begun.set()
        assert may.wait(60)
        return model

    async def main() -> None:
        worker = kind(load)
        start = asyncio.create_task(worker.start())
        assert await asyncio.to_thread(begun.wait, 60)
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        await worker.close()

    asyncio.run(main())  # ends, which waits for every thread of the loop's own
    assert not model.closed.is_set()
    may.set()
    assert model.closed.wait(60)
