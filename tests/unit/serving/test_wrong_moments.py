"""What clients, models and workers do at the wrong moment: nobody is left without an answer, and no change stays half done."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving_models import FOURS, Gate, doubled, function, spec, until

from narrowcast.errors import ConfigError, RuntimeFailedError
from narrowcast.serving.catalogue import Catalogue, Hosting
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.repository import Repository
from narrowcast.serving.scheduling.queue import Batching, Job
from narrowcast.serving.scheduling.scheduler import Scheduler, Settings
from narrowcast.serving.settings import read_options
from narrowcast.serving.signature import Signature, Tensors
from narrowcast.serving.traffic import Traffic
from narrowcast.serving.workers.base import Batch, Done, LoadedModel, Result, Worker
from narrowcast.serving.workers.loading import FunctionModel
from narrowcast.serving.workers.sources import FunctionSource, Placement


class Held(Worker):
    """Keeps batches until they are let go; down if it is told so."""

    def __init__(self, signature: Signature = FOURS, *, up: bool = True) -> None:
        self.signature = signature
        self.batches: list[tuple[Batch, Done]] = []
        self._up = up

    @property
    def up(self) -> bool:
        return self._up

    async def start(self) -> None: ...

    def submit(self, batch: Batch, done: Done) -> None:
        self.batches.append((batch, done))

    async def close(self) -> None: ...


class Refuses(Held):
    def submit(self, batch: Batch, done: Done) -> None:
        raise OSError("no space left")


def rows(*numbers: float) -> Tensors:
    return {"x": np.array([[number, 0, 0, 0] for number in numbers], np.float32)}


def run(test: Any) -> None:
    asyncio.run(test())


def test_requests_that_name_their_inputs_in_another_order_are_told_apart_by_shape():
    two = Signature((spec("x", -1, -1), spec("y", -1, -1)), (spec("z", -1, 1),), batched=True)

    async def main() -> None:
        worker = Held(two)
        scheduler = Scheduler([worker], Settings(Batching(8)))
        short, long = np.zeros((1, 3), np.float32), np.zeros((1, 5), np.float32)
        scheduler.submit({"x": short, "y": short}, 1)
        scheduler.submit({"x": short, "y": long}, 1)
        scheduler.submit({"y": short, "x": long}, 1)
        (_, done) = worker.batches[0]
        done(Result({"z": np.zeros((1, 1), np.float32)}))
        assert len(worker.batches[1][0].parts) == 1
        await scheduler.close()

    run(main)


def test_a_worker_that_cannot_take_a_batch_fails_it_and_takes_others():
    async def main() -> None:
        scheduler = Scheduler([Refuses()], Settings(Batching(8)))
        for _ in range(2):
            job = scheduler.submit(rows(1), 1)
            assert job.finished
            assert isinstance(job.error, OSError)
        await scheduler.close()

    run(main)


def test_a_worker_that_died_before_the_others_were_ready_gets_no_requests():
    async def main() -> None:
        dead, alive = Held(up=False), Held()
        scheduler = Scheduler([dead, alive], Settings(Batching(1)))
        for number in range(3):
            scheduler.submit(rows(number), 1)
        assert scheduler.workers_alive == 1
        assert not dead.batches
        dead.on_up(dead)
        assert len(dead.batches) == 1
        await scheduler.close()

    run(main)


def test_a_full_batch_does_not_wait_behind_one_that_waits_for_company():
    async def main() -> None:
        worker = Held()
        scheduler = Scheduler([worker], Settings(Batching.static(2, round(60e9))))
        first = scheduler.submit(rows(1), 1, priority=1)
        scheduler.submit(rows(2), 1)
        scheduler.submit(rows(3), 1)
        assert [part["x"][0, 0] for batch, _ in worker.batches for part in batch.parts] == [2, 3]
        assert not first.finished
        await scheduler.close()

    run(main)


def test_a_model_that_gives_no_arrays_fails_its_requests_alone():
    async def main() -> None:
        worker = Held()
        scheduler = Scheduler([worker], Settings(Batching(8)))
        scheduler.submit(rows(0), 1)
        jobs: list[Job] = [scheduler.submit(rows(number), 1) for number in (1, 2)]
        worker.batches[0][1](Result(doubled(rows(0))))
        wrong: Any = {"y": [1.0, 2.0]}
        worker.batches[1][1](Result(wrong))
        assert not any(job.finished for job in jobs), "each runs again alone"
        await scheduler.close()

    run(main)


def test_an_unload_whose_client_has_gone_away_lets_the_model_finish():
    gate = Gate()

    async def main() -> None:
        catalogue = Catalogue(Repository(sources={"m": function(gate)}), Hosting(Placement.THREAD))
        await catalogue.load_all()
        job = catalogue.find("m").scheduler.submit(rows(1), 1)
        asked = asyncio.create_task(catalogue.unload("m"))
        await asyncio.sleep(0.01)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        gate.open.release()
        await until(lambda: job.finished)
        assert job.outputs is not None
        with pytest.raises(Refusal, match="not found"):
            catalogue.find("m")
        await catalogue.close()

    run(main)


def test_a_model_whose_code_fails_as_it_loads_is_a_clear_error():
    def load() -> LoadedModel:
        raise FileNotFoundError("weights.bin")

    async def main() -> None:
        catalogue = Catalogue(Repository(sources={"m": FunctionSource(load)}), Hosting(Placement.THREAD))
        with pytest.raises(
            RuntimeFailedError, match=r"model 'm' version 1 cannot be loaded: FileNotFoundError: weights\.bin"
        ):
            await catalogue.load_all()
        await catalogue.close()

    run(main)


def test_a_version_with_more_digits_than_a_number_is_not_found():
    async def main() -> None:
        catalogue = Catalogue(Repository(sources={"m": function()}), Hosting(Placement.INLINE))
        await catalogue.load_all()
        with pytest.raises(Refusal, match="no version") as caught:
            catalogue.find("m", "9" * 5000)
        assert caught.value.status == 404
        await catalogue.close()

    run(main)


@pytest.mark.parametrize("weight", [1e308, float("inf"), float("nan"), 0.0, -1.0])
def test_weights_that_make_no_shares_are_refused(weight: float):
    with pytest.raises(Refusal, match="allowed: positive numbers up to 1e"):
        Traffic.of({1: weight, 2: weight})


@pytest.mark.parametrize("name", ["timeout", "batch_timeout", "delay"])
def test_times_that_are_no_numbers_are_refused(name: str):
    with pytest.raises(ConfigError):
        read_options({name: float("inf")}, "serve")


def test_padding_alone_makes_batches_not_static():
    hosting = read_options({"pad": True}, "serve").over(Hosting())
    assert read_options({}, "serving.json").over(hosting).settings.batching.pad


def test_a_version_that_was_mended_and_loaded_is_not_held_back_by_its_failures(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("narrowcast.serving.model._FIRST_BACKOFF", 1000.0)
    broken = True

    def load() -> LoadedModel:
        if broken:
            raise ConfigError("not yet")
        return FunctionModel(FOURS, doubled)

    async def main() -> None:
        nonlocal broken
        sources = {"a": FunctionSource(load, bytes=10), "b": FunctionSource(partial(FunctionModel, FOURS, doubled), 10)}
        catalogue = Catalogue(Repository(sources=sources), Hosting(Placement.INLINE, on_demand=True), memory_budget=10)
        await catalogue.load_all()
        with pytest.raises(Refusal, match="not yet"):
            await catalogue.get("a")
        broken = False
        with pytest.raises(Refusal, match="not yet"):
            await catalogue.get("a")
        await catalogue.load("a")
        await catalogue.get("b")
        assert not catalogue.served("a"), "it made room"
        assert (await catalogue.get("a")).scheduler.workers_alive
        await catalogue.close()

    run(main)


def test_folders_that_go_away_while_they_are_read_hold_no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = tmp_path / "models"
    (root / "m" / "1" / "artifact").mkdir(parents=True)
    repository = Repository([root])
    assert repository.names() == ["m"]
    iterdir = Path.iterdir

    def removed_meanwhile(self: Path) -> Iterator[Path]:
        if self.name == "m":
            raise FileNotFoundError(self)
        return iterdir(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", removed_meanwhile)
        assert repository.names() == []
        assert repository.versions("m") == {}
    (root / "m" / "1" / "artifact").rmdir()
    (root / "m" / "1").rmdir()
    (root / "m").rmdir()
    root.rmdir()
    assert repository.names() == []
    assert repository.versions("m") == {}
