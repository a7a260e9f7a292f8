"""Loads, unloads, promotions, rollbacks, failures and requests, all at the same time; and a thousand of them in a row."""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from scipy import stats
from serving_models import write_artifact

from narrowcast.artifacts.manifest import Manifest
from narrowcast.errors import NarrowcastError
from narrowcast.serving.catalogue import Catalogue, Hosting
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.repository import Repository, VersionPolicy
from narrowcast.serving.scheduling.queue import Batching
from narrowcast.serving.scheduling.scheduler import Settings
from narrowcast.serving.workers.sources import Placement

ManifestOf = Callable[..., Manifest]
#: What a request may be told while models come and go: it has an answer, there is no such model now, or no worker.
FAIR = {200, 404, 503}


@pytest.fixture
def models(tmp_path: Path, manifest_of: ManifestOf) -> Path:
    """Models ``scale`` and ``other`` with versions 1, 2 and 3, which multiply by their numbers, and a damaged version 4."""
    for name in ("scale", "other"):
        for version in (1, 2, 3):
            write_artifact(tmp_path / name / str(version) / "artifact", manifest_of(), float(version))
        damaged = write_artifact(tmp_path / name / "4" / "artifact", manifest_of(), 4.0) / "model.onnx"
        damaged.write_bytes(damaged.read_bytes() + b"x")
    return tmp_path


async def ask(catalogue: Catalogue, name: str, took: Counter[int]) -> None:
    """Ask for a few rows, and count what came; what comes is of one version and right."""
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)
    try:
        served = await catalogue.get(name)
        job = served.scheduler.submit({"x": rows}, 2)
    except Refusal as refusal:
        took[refusal.status] += 1
        return
    while not job.finished:
        await asyncio.sleep(0.001)
    if isinstance(job.error, Refusal):
        took[job.error.status] += 1
        return
    assert job.outputs is not None, job.error
    np.testing.assert_array_equal(job.outputs["y"], rows * int(served.version))
    took[200] += 1


async def change(catalogue: Catalogue, kind: str, name: str, version: int) -> None:
    match kind:
        case "load":
            await catalogue.load(name)
        case "unload":
            await catalogue.unload(name)
        case "promote":
            await catalogue.promote(name, version)
        case "rollback":
            await catalogue.rollback(name)
        case _:
            await catalogue.split(name, {1: 1, version: 2})


async def stress(catalogue: Catalogue, seconds: float, seed: int) -> tuple[Counter[int], Counter[str]]:
    """Ask and change for a while; return what requests were told, and which changes succeeded."""
    rng = random.Random(seed)
    took: Counter[int] = Counter()
    done: Counter[str] = Counter()
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds

    async def client() -> None:
        while loop.time() < until:
            await ask(catalogue, rng.choice(["scale", "other"]), took)
            await asyncio.sleep(0.001)

    async def administrator() -> None:
        while loop.time() < until:
            name = rng.choice(["scale", "other"])
            kind = rng.choice(["load", "unload", "promote", "promote", "rollback", "split"])
            version = rng.randint(1, 4)
            try:
                await change(catalogue, kind, name, version)
                done[kind] += 1
            except NarrowcastError:
                done[f"{kind} failed"] += 1
            except Refusal as refusal:
                done[f"{kind} {refusal.status}"] += 1
            await asyncio.sleep(0.002)

    await asyncio.gather(*(client() for _ in range(6)), *(administrator() for _ in range(3)))
    return took, done


@pytest.mark.parametrize(
    ("placement", "on_demand", "budget"),
    [(Placement.INLINE, False, None), (Placement.THREAD, False, None), (Placement.THREAD, True, 400)],
    ids=["inline", "thread", "on-demand"],
)
def test_everything_at_the_same_time(models: Path, placement: Placement, on_demand: bool, budget: int | None) -> None:
    """Every answer is right, every refusal is fair, and in the end all can be served and nothing is left behind."""

    async def main() -> None:
        policy = VersionPolicy(named=(3,))  # so that a load takes the newest that is whole
        hosting = Hosting(placement, 1, Settings(Batching(8)), policy, on_demand)
        catalogue = Catalogue(Repository([models]), hosting, random.Random(1).random, budget)
        await catalogue.load_all()
        took, done = await stress(catalogue, 2.0, seed=2)
        assert took[200] > 20
        assert set(took) <= FAIR, took
        assert {"load", "unload", "promote", "rollback", "split"} <= set(done)
        assert {int(kind.split()[1]) for kind in done if kind[-1].isdigit()} <= {400, 404}, done
        for name in ("scale", "other"):
            await catalogue.load(name)
            assert catalogue.find(name).version == "3"
        await catalogue.close()
        assert catalogue.memory.used == 0
        await asyncio.sleep(0.05)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


@pytest.mark.exhaustive
def test_everything_at_the_same_time_in_processes(models: Path) -> None:
    async def main() -> None:
        hosting = Hosting(Placement.PROCESS, 1, Settings(Batching(8)), VersionPolicy(named=(3,)))
        catalogue = Catalogue(Repository([models]), hosting)
        await catalogue.load_all()
        took, _ = await stress(catalogue, 60.0, seed=3)
        assert took[200] > 20
        assert set(took) <= FAIR, took
        await catalogue.close()
        await asyncio.sleep(0.1)
        assert psutil.Process().children() == []

    asyncio.run(main())


def test_a_failed_version_and_rollbacks_under_load_fail_no_request(models: Path) -> None:
    async def main() -> None:
        hosting = Hosting(Placement.THREAD, 1, Settings(Batching(8)), VersionPolicy(named=(2, 3)))
        catalogue = Catalogue(Repository([models]), hosting)
        await catalogue.load_all()
        took: Counter[int] = Counter()
        changing = True

        async def client() -> None:
            while changing:
                await ask(catalogue, "scale", took)

        clients = [asyncio.create_task(client()) for _ in range(4)]
        for _ in range(15):
            with pytest.raises(NarrowcastError, match="damaged"):
                await catalogue.promote("scale", 4)
            await catalogue.promote("scale", 2)
            await catalogue.load("scale")
            await catalogue.rollback("scale")
            await catalogue.rollback("scale")
        changing = False
        await asyncio.gather(*clients)
        assert set(took) == {200}
        await catalogue.close()

    asyncio.run(main())


# A thousand times -----------------------------------------------------------------------------------------------------


def slope_of_memory(cycles: int, placement: Placement, models: Path) -> tuple[float, float, int]:
    """Load and unload a model again and again.

    Returns:
        Bytes that the process grows by per cycle, the lower end of the 99 % interval of that (Theil-Sen, which single steps of
        an allocator do not move), and how many descriptors more are open at the end than after the first tenth.
    """
    resident: list[int] = []
    descriptors: list[int] = []

    async def main() -> None:
        catalogue = Catalogue(Repository([models]), Hosting(placement, policy=VersionPolicy(named=(3,))))
        for cycle in range(cycles):
            await catalogue.load("scale")
            await ask(catalogue, "scale", Counter())
            await catalogue.unload("scale")
            if cycle % 10:
                continue
            gc.collect()  # what waits for the collector of cycles does not stay
            resident.append(psutil.Process().memory_info().rss)
            descriptors.append(sum(1 for _ in Path("/proc/self/fd").iterdir()))
        await catalogue.close()

    asyncio.run(main())
    steady = np.array(resident[len(resident) // 4 :], float)
    slope, _, low, _ = stats.theilslopes(steady, 10 * np.arange(len(steady)), 0.99)
    return float(slope), float(low), descriptors[-1] - descriptors[len(descriptors) // 10]


def test_two_hundred_loads_and_unloads_of_an_artifact_leave_nothing_behind(models: Path) -> None:
    slope, low, descriptors = slope_of_memory(200, Placement.INLINE, models)
    assert descriptors <= 1
    assert low < 30e3, f"{slope:.0f} bytes per load stay"  # a session that stays takes more


@pytest.mark.exhaustive
@pytest.mark.parametrize("placement", ["inline", "thread", "process"])
def test_a_thousand_loads_and_unloads_of_an_artifact_leave_nothing_behind(models: Path, placement: str) -> None:
    slope, low, descriptors = slope_of_memory(1000, Placement(placement), models)
    assert descriptors <= 1
    assert low < 2e3, f"{slope:.0f} bytes per load stay"
