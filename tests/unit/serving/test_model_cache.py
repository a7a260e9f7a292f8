"""Models within a budget of memory: who is loaded when, who makes room, and who is refused."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from hypothesis import given
from hypothesis import strategies as st
from serving_models import FOURS, Gate, doubled, request, write_artifact
from tritonclient.utils import InferenceServerException

from narrowcast.artifacts.manifest import Manifest
from narrowcast.errors import ConfigError, RuntimeFailedError
from narrowcast.serving.catalogue import Catalogue, Hosting
from narrowcast.serving.hosting import ColdError
from narrowcast.serving.memory import Ledger, read_bytes, spelled_bytes
from narrowcast.serving.refusals import MemoryBudgetError, Refusal
from narrowcast.serving.repository import Repository, VersionPolicy
from narrowcast.serving.scheduling.queue import Job
from narrowcast.serving.scheduling.scheduler import Settings
from narrowcast.serving.signature import Tensors
from narrowcast.serving.workers.base import LoadedModel
from narrowcast.serving.workers.loading import FunctionModel
from narrowcast.serving.workers.sources import FunctionSource, Placement

ManifestOf = Callable[..., Manifest]
DEMAND = Hosting(Placement.THREAD, on_demand=True)


class Sized:
    """Models that each take 10 bytes of an imagined memory, and count how often they are loaded and closed."""

    def __init__(self, *names: str, size: int = 10, stated: int | None = None) -> None:
        self.loads: list[str] = []
        self.open: list[str] = []
        self.calls: dict[str, Callable[[Tensors], Tensors]] = dict.fromkeys(names, doubled)
        self.size = size
        self.seconds = 0.0
        self.broken: set[str] = set()
        stated = size if stated is None else stated
        self.sources = {name: FunctionSource(lambda name=name: self._load(name), bytes=stated) for name in names}

    def _load(self, name: str) -> LoadedModel:
        time.sleep(self.seconds)
        self.loads.append(name)
        if name in self.broken:
            raise RuntimeFailedError(f"{name} is broken")
        models = self

        class Counted(FunctionModel):
            size = models.size

            def close(self) -> None:
                models.open.remove(name)

        self.open.append(name)
        return Counted(FOURS, lambda inputs: self.calls[name](inputs))


def with_models(
    models: Sized, budget: int | None, test: Callable[[Catalogue], Coroutine[Any, Any, None]], hosting: Hosting = DEMAND
) -> None:
    async def main() -> None:
        catalogue = Catalogue(Repository(sources=models.sources), hosting, memory_budget=budget)
        try:
            await catalogue.load_all()
            await test(catalogue)
        finally:
            await catalogue.close()

    asyncio.run(main())
    end = time.monotonic() + 10
    while models.open and time.monotonic() < end:
        time.sleep(0.01)
    assert models.open == [], "every model that was loaded is closed"


async def ask(catalogue: Catalogue, name: str) -> Job:
    served = await catalogue.get(name)
    job = served.scheduler.submit({"x": np.ones((1, 4), np.float32)}, 1)
    while not job.finished:
        await asyncio.sleep(0.001)
    return job


async def sooner_or_later(catalogue: Catalogue, name: str) -> None:
    """Ask again while all that is loaded is in use."""
    refused: set[int] = set()
    for _ in range(500):
        try:
            assert (await ask(catalogue, name)).outputs is not None
        except Refusal as refusal:
            refused.add(refusal.status)
            await asyncio.sleep(0.002)
        else:
            assert refused <= {503}
            return
    raise AssertionError("it was never its turn")


def loaded(catalogue: Catalogue) -> list[str]:
    return [served.name for served in catalogue.served()]


# The ledger -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 100), st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=60), st.integers(0, 63))
def test_a_ledger_never_exceeds_its_budget_and_lets_the_oldest_go_first(
    budget: int, steps: list[tuple[int, int]], pinned: int
) -> None:
    ledger: Ledger[int] = Ledger(budget)
    held: dict[int, Any] = {}
    order: list[int] = []
    for key, size in steps:
        if key in held:
            ledger.touch(held[key])
            order.remove(key)
            order.append(key)
            continue
        movable = sum(held[other].size for other in order if not pinned >> other & 1)
        if size > budget:
            with pytest.raises(MemoryBudgetError, match="more than the whole budget"):
                ledger.admit(size, "it")
            continue
        ledger.admit(size, "it")
        if ledger.used - movable + size > budget:
            with pytest.raises(MemoryBudgetError, match="does not fit"):
                ledger.room(size, "it", lambda other: not pinned >> other & 1)
            continue
        going = ledger.room(size, "it", lambda other: not pinned >> other & 1)
        gone = [holding.owner for holding in going]
        assert gone == [key for key in order if not pinned >> key & 1][: len(gone)], "the least recently used"
        for holding in going:
            ledger.release(holding, evicted=True)
            order.remove(holding.owner)
            del held[holding.owner]
        held[key] = ledger.hold(size, key)
        order.append(key)
        assert ledger.used == sum(holding.size for holding in held.values()) <= budget


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("512 MiB", 1 << 29), ("1.5GiB", 3 << 29), ("2KiB", 2048), ("7B", 7), ("1TiB", 1 << 40)],
)
def test_sizes_of_memory_are_read(text: str, size: int) -> None:
    assert read_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "4GB", "4g", "GiB", "1e9", "4 Gi B", "0.0GiB", "nan"])
def test_what_is_no_size_of_memory_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size of memory"):
        read_bytes(text)


def test_sizes_of_memory_are_written_for_people() -> None:
    assert [spelled_bytes(size) for size in (7, 2048, 3 << 29)] == ["7 B", "2.0 KiB", "1.5 GiB"]


# Loading at the first request -----------------------------------------------------------------------------------------


def test_a_model_is_loaded_at_its_first_request_and_says_so_before() -> None:
    models = Sized("a", "b")

    async def test(catalogue: Catalogue) -> None:
        assert models.loads == []
        assert catalogue.names == ["a", "b"]
        assert catalogue.can_answer("a")
        assert catalogue.ready
        assert {entry.reason for entry in catalogue.index()} == {"its first request loads it"}
        with pytest.raises(ColdError):
            catalogue.find("a")
        assert (await ask(catalogue, "a")).outputs is not None
        assert catalogue.find("a").version == "1"
        assert models.loads == ["a"]
        with pytest.raises(Refusal, match="unknown"):
            await catalogue.get("c")
        with pytest.raises(Refusal, match="no version '2'"):
            await catalogue.get("a", "2")

    with_models(models, None, test)


def test_simultaneous_cold_requests_load_once() -> None:
    models = Sized("a", "b")
    models.seconds = 0.05

    async def test(catalogue: Catalogue) -> None:
        jobs = await asyncio.gather(*(ask(catalogue, name) for name in "ab" * 50))
        assert all(job.outputs is not None for job in jobs)
        assert sorted(models.loads) == ["a", "b"]

    with_models(models, None, test)


def test_who_leaves_does_not_break_the_load_of_those_who_stay() -> None:
    models = Sized("a")
    models.seconds = 0.1

    async def test(catalogue: Catalogue) -> None:
        leaving = asyncio.create_task(ask(catalogue, "a"))
        staying = asyncio.create_task(ask(catalogue, "a"))
        await asyncio.sleep(0.02)
        leaving.cancel()
        assert (await staying).outputs is not None
        assert models.loads == ["a"]

    with_models(models, None, test)


def test_a_load_that_fails_is_told_to_all_who_wait_and_not_tried_for_each() -> None:
    models = Sized("a", "b")
    models.broken.add("a")

    async def test(catalogue: Catalogue) -> None:
        outcomes = await asyncio.gather(*(ask(catalogue, "a") for _ in range(20)), return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {Refusal}
        assert all(isinstance(outcome, Refusal) and outcome.status == 503 for outcome in outcomes)
        with pytest.raises(Refusal, match="cannot be loaded: a is broken"):
            await catalogue.get("a")
        assert models.loads == ["a"], "a moment later nobody tries again"
        assert (await ask(catalogue, "b")).outputs is not None
        models.broken.clear()
        await asyncio.sleep(0.25)
        assert (await ask(catalogue, "a")).outputs is not None

    with_models(models, None, test)


def test_a_model_that_keeps_failing_is_tried_less_and_less_often() -> None:
    models = Sized("a")
    models.broken.add("a")

    async def test(catalogue: Catalogue) -> None:
        end = time.monotonic() + 1.7
        while time.monotonic() < end:
            with pytest.raises(Refusal):
                await catalogue.get("a")
            await asyncio.sleep(0.005)
        assert 2 <= len(models.loads) <= 4  # after 0, 0.2, 0.6 and 1.4 seconds

    with_models(models, None, test)


def test_waiting_for_a_load_is_bounded_in_number_and_time() -> None:
    models = Sized("a")
    models.seconds = 0.3
    hosting = Hosting(Placement.THREAD, settings=Settings(queue=3, timeout=0.05), on_demand=True)

    async def test(catalogue: Catalogue) -> None:
        outcomes = await asyncio.gather(*(catalogue.get("a") for _ in range(5)), return_exceptions=True)
        assert sorted(outcome.status for outcome in outcomes if isinstance(outcome, Refusal)) == [
            503,
            503,
            504,
            504,
            504,
        ]
        await asyncio.sleep(0.4)
        assert catalogue.find("a").version == "1", "the load went on"

    with_models(models, None, test, hosting)


def test_the_wait_for_the_load_counts_towards_the_deadline() -> None:
    models = Sized("a")

    async def test(catalogue: Catalogue) -> None:
        served = await catalogue.get("a")
        long_ago = time.monotonic_ns() - 10**9
        late = served.scheduler.submit({"x": np.ones((1, 4), np.float32)}, 1, timeout=0.5, arrived=long_ago)
        assert isinstance(late.error, Refusal)
        assert late.error.status == 504

    with_models(models, None, test)


# Making room ----------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_makes_room_and_comes_back_when_it_is_asked_for() -> None:
    models = Sized("a", "b", "c")

    async def test(catalogue: Catalogue) -> None:
        await ask(catalogue, "a")
        await ask(catalogue, "b")
        await ask(catalogue, "a")
        await ask(catalogue, "c")
        assert loaded(catalogue) == ["a", "c"]
        assert catalogue.memory.used == 20
        assert catalogue.memory.evictions == 1
        states = {entry.name: entry.reason for entry in catalogue.index()}
        assert states["b"] == "unloaded to make room; its next request loads it"
        await ask(catalogue, "b")
        assert loaded(catalogue) == ["b", "c"]
        assert models.loads == ["a", "b", "c", "b"]

    with_models(models, 25, test)


def test_many_requests_for_more_models_than_fit_are_all_answered() -> None:
    models = Sized(*"abcdef")
    rng = np.random.default_rng(0)

    async def test(catalogue: Catalogue) -> None:
        async def client(names: list[str]) -> None:
            for name in names:
                await sooner_or_later(catalogue, name)
                assert catalogue.memory.used <= 30

        await asyncio.gather(*(client(list(rng.choice(list("abcdef"), 25))) for _ in range(8)))
        assert catalogue.memory.evictions > 10
        assert len(catalogue.served()) <= 3

    with_models(models, 30, test)


def test_what_is_in_use_is_never_unloaded() -> None:
    models = Sized("a", "b")
    gate = Gate()
    models.calls["a"] = gate

    async def test(catalogue: Catalogue) -> None:
        running = asyncio.create_task(ask(catalogue, "a"))
        while not gate.ran:
            await asyncio.sleep(0.001)
        with pytest.raises(Refusal, match="what is loaded is in use") as caught:
            await catalogue.get("b")
        assert caught.value.status == 503
        assert loaded(catalogue) == ["a"]
        gate.open.release()
        assert (await running).outputs is not None
        assert (await ask(catalogue, "b")).outputs is not None
        assert loaded(catalogue) == ["b"]

    with_models(models, 10, test)


def test_a_model_over_the_budget_is_refused_without_unloading_others() -> None:
    models = Sized("a", "b")
    large = Sized("large", size=31)
    models.sources |= large.sources

    async def test(catalogue: Catalogue) -> None:
        await ask(catalogue, "a")
        await ask(catalogue, "b")
        with pytest.raises(Refusal, match="more than the whole budget") as caught:
            await catalogue.get("large")
        assert caught.value.status == 507
        assert loaded(catalogue) == ["a", "b"]
        assert large.loads == []
        with pytest.raises(MemoryBudgetError):
            await catalogue.load("large")

    with_models(models, 30, test)


def test_a_model_that_proves_to_be_larger_than_it_said_is_refused_and_remembered() -> None:
    models = Sized("a")
    liar = Sized("liar", size=100, stated=5)
    models.sources |= liar.sources

    async def test(catalogue: Catalogue) -> None:
        await ask(catalogue, "a")
        for _ in range(2):
            with pytest.raises(Refusal) as caught:
                await catalogue.get("liar")
            assert caught.value.status == 507
        assert liar.loads == ["liar"], "the second time its size is known"
        assert loaded(catalogue) == ["a"]
        assert catalogue.memory.used == 10

    with_models(models, 30, test)
    assert liar.open == []


def test_a_model_that_proves_to_be_larger_makes_others_go_when_it_fits() -> None:
    models = Sized("a")
    larger = Sized("larger", size=25, stated=5)
    models.sources |= larger.sources

    async def test(catalogue: Catalogue) -> None:
        await ask(catalogue, "a")
        await ask(catalogue, "larger")
        assert loaded(catalogue) == ["larger"]
        assert catalogue.memory.used == 25

    with_models(models, 30, test)


def test_a_load_that_fails_gives_its_room_back_and_keeps_the_copy_before() -> None:
    models = Sized("a", "b")

    async def test(catalogue: Catalogue) -> None:
        await ask(catalogue, "a")
        models.broken.add("a")
        with pytest.raises(RuntimeFailedError):
            await catalogue.load("a")
        assert (await ask(catalogue, "a")).outputs is not None
        assert catalogue.memory.used == 10
        models.broken.clear()
        await catalogue.load("a")
        await ask(catalogue, "b")
        assert catalogue.memory.used == 20, "the copy before has gone"

    with_models(models, 20, test)


def test_versions_that_are_replaced_are_room_for_those_that_replace_them() -> None:
    models = Sized("a")

    async def test(catalogue: Catalogue) -> None:
        await ask(catalogue, "a")
        await catalogue.load("a")
        assert catalogue.memory.used <= 20
        assert (await ask(catalogue, "a")).outputs is not None
        while catalogue.memory.used > 10:
            await asyncio.sleep(0.01)

    with_models(models, 10, test)


def test_models_that_find_no_room_at_the_start_wait_for_a_request() -> None:
    models = Sized("a", "b", "c")

    async def test(catalogue: Catalogue) -> None:
        assert loaded(catalogue) == ["a", "b"]
        assert models.loads == ["a", "b"]
        assert catalogue.memory.evictions == 0
        await ask(catalogue, "c")
        assert loaded(catalogue) == ["b", "c"]

    with_models(models, 25, test, Hosting(Placement.THREAD))


def test_a_model_that_can_never_fit_is_an_error_at_the_start() -> None:
    async def test(catalogue: Catalogue) -> None:
        raise AssertionError("it was started")

    with pytest.raises(MemoryBudgetError, match="model a version 1 takes 10 B"):
        with_models(Sized("a"), 5, test, Hosting(Placement.THREAD))


# Artifacts and clients ------------------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path, manifest_of: ManifestOf) -> Path:
    """Models ``scale`` with versions 1 and 3, and ``other``."""
    for name, version in (("scale", 1), ("scale", 3), ("other", 5)):
        write_artifact(tmp_path / "models" / name / str(version) / "artifact", manifest_of(), float(version))
    return tmp_path / "models"


def test_worker_processes_are_measured_and_the_budget_holds(models: Path) -> None:
    async def main() -> None:
        first = Catalogue(Repository([models]), Hosting(on_demand=True), memory_budget=1 << 40)
        await first.load_all()
        await first.get("scale")
        one = first.memory.used
        assert 1 << 20 < one < 1 << 30, "a Python process with a runtime in it"
        await first.get("other")
        await first.close()
        assert first.memory.used == 0
        second = Catalogue(Repository([models]), Hosting(on_demand=True), memory_budget=int(1.6 * one))
        await second.load_all()
        await second.get("scale")
        await second.get("other")
        assert [served.name for served in second.served()] == ["other"]
        await second.close()
        third = Catalogue(Repository([models]), Hosting(), memory_budget=1 << 20)
        with pytest.raises(MemoryBudgetError, match="takes"):
            await third.load_all()
        await third.close()

    asyncio.run(main())


def test_clients_wait_for_models_that_are_loaded_on_demand(models: Path, serve: Any) -> None:
    running = serve(places=(models,), hosting=Hosting(Placement.INLINE, policy=VersionPolicy(latest=0), on_demand=True))
    assert running.ask("GET", "/v2/models/scale/ready").status == 200
    assert running.ask("GET", "/v2/models/scale/stats").json == {"model_stats": []}
    assert running.ask("GET", "/v2/models/other").json["versions"] == ["5"]
    answer = running.infer("scale", request(1))
    assert (answer.status, answer.json["model_version"]) == (200, "3")
    assert running.infer("scale/versions/1", request(1)).json["outputs"][0]["data"][0] == 1.0
    assert running.infer("scale/versions/2", request(1)).status == 404
    change = running.ask(
        "POST",
        "/v2/repository/models/scale/traffic",
        b'{"weights": {"1": 1, "3": 1}}',
        Authorization="Bearer s3cret",
    )
    assert change.status == 200
    assert {running.infer("scale", request(1)).json["model_version"] for _ in range(40)} == {"1", "3"}


def test_grpc_clients_wait_for_models_too_and_no_longer_than_their_deadline(serve: Any) -> None:
    models = Sized("a", "b")
    models.seconds = 0.3
    running = serve(models.sources, hosting=DEMAND, grpc_port=0)
    given = grpcclient.InferInput("x", [1, 4], "FP32")
    given.set_data_from_numpy(np.ones((1, 4), np.float32))
    with grpcclient.InferenceServerClient(running.grpc_address) as client:
        assert client.is_model_ready("a")
        assert client.get_inference_statistics("a", as_json=True) == {}
        assert client.infer("a", [given]).as_numpy("y").tolist() == [[2.0] * 4]
        assert client.get_model_metadata("a").versions == ["1"]
        with pytest.raises(InferenceServerException, match=r"(?i)deadline"):
            client.infer("b", [given], client_timeout=0.05)
        with pytest.raises(InferenceServerException, match="unknown"):
            client.infer("c", [given])
        assert client.infer("b", [given]).get_response().model_version == "1"
    assert models.loads == ["a", "b"], "the load that nobody waited for any more went on"


def test_a_cold_model_that_is_damaged_is_refused_with_words(models: Path, serve: Any) -> None:
    graph = models / "scale" / "3" / "artifact" / "model.onnx"
    graph.write_bytes(graph.read_bytes() + b"x")
    running = serve(places=(models,), hosting=Hosting(Placement.INLINE, on_demand=True))
    answer = running.infer("scale", request(1))
    assert answer.status == 503
    assert "damaged" in answer.error
    assert running.infer("other", request(1)).status == 200


def test_a_model_over_the_budget_is_refused_with_507(models: Path, serve: Any) -> None:
    running = serve(places=(models,), hosting=Hosting(Placement.INLINE, on_demand=True), memory_budget=10)
    assert running.infer("scale", request(1)).status == 507
    assert running.admin("scale/load").status == 507
    assert "more than the whole budget of 10 B" in running.admin("scale/load").error


def test_a_server_that_ends_while_a_model_loads_ends(serve: Any) -> None:
    models = Sized("a")
    models.seconds = 0.2
    running = serve(models.sources, hosting=DEMAND, grace=5.0)
    statuses: list[int] = []
    client = threading.Thread(target=lambda: statuses.append(running.infer("a", request(1)).status))
    client.start()
    time.sleep(0.05)
    running.stop()
    client.join(20)
    assert statuses in ([200], [503])
