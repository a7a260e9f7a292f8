"""Which version answers requests that name none, and what a restart remembers of it."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_models import function, request, write_artifact

from narrowcast.artifacts.manifest import Manifest
from narrowcast.errors import ConfigError, NarrowcastError
from narrowcast.serving.catalogue import Catalogue, Hosting
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.repository import Repository
from narrowcast.serving.scheduling.queue import Batching
from narrowcast.serving.scheduling.scheduler import Settings
from narrowcast.serving.state import STATE, read_state
from narrowcast.serving.traffic import Traffic
from narrowcast.serving.workers.sources import Placement

ManifestOf = Callable[..., Manifest]
HOSTING = Hosting(Placement.INLINE, settings=Settings(Batching(8)))


@pytest.fixture
def models(tmp_path: Path, manifest_of: ManifestOf) -> Path:
    """Model ``scale`` with versions 1, 3 and 4, which multiply by their numbers."""
    for version in (1, 3, 4):
        write_artifact(tmp_path / "models" / "scale" / str(version) / "artifact", manifest_of(), float(version))
    return tmp_path / "models"


def with_catalogue(models: Path, test: Callable[[Catalogue], Coroutine[Any, Any, None]], seed: int = 0) -> None:
    async def main() -> None:
        catalogue = Catalogue(Repository([models]), HOSTING, random.Random(seed).random)
        try:
            await catalogue.load_all()
            await test(catalogue)
        finally:
            await catalogue.close()

    asyncio.run(main())


def answered(catalogue: Catalogue, count: int = 1) -> Counter[int]:
    """Which versions answer requests that name none."""
    seen: Counter[int] = Counter()
    for _ in range(count):
        served = catalogue.find("scale")
        job = served.scheduler.submit({"x": np.ones((1, 4), np.float32)}, 1)
        assert job.outputs is not None
        assert job.outputs["y"][0, 0] == int(served.version)
        seen[int(served.version)] += 1
    return seen


# Shares ---------------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.integers(1, 50), st.floats(0.01, 100), min_size=1, max_size=8), st.floats(0, 1 - 2**-53))
def test_each_version_gets_its_part_of_the_draws(weights: dict[int, float], draw: float) -> None:
    traffic = Traffic.of(weights)
    version = traffic.pick(lambda: draw)
    before = sum(share for other, share in traffic.shares.items() if other < version)
    assert before - 1e-9 <= draw <= before + traffic.shares[version] + 1e-9
    assert sum(traffic.shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    "weights",
    [{}, {0: 1}, {-1: 1}, {1: 0}, {1: -1}, {1: float("nan")}, {1: float("inf")}, dict.fromkeys(range(1, 18), 1)],
)
def test_what_is_no_split_is_refused(weights: dict[int, float]) -> None:
    with pytest.raises(Refusal) as caught:
        Traffic.of(weights)
    assert caught.value.status == 400


# Splits ---------------------------------------------------------------------------------------------------------------


def test_a_split_gives_each_version_its_share_with_statistics_of_its_own(models: Path) -> None:
    async def test(catalogue: Catalogue) -> None:
        change = await catalogue.split("scale", {4: 10, 3: 90})
        assert change.traffic == catalogue.traffic("scale") == {"3": 0.9, "4": 0.1}
        seen = answered(catalogue, 2000)
        assert seen[4] == pytest.approx(200, abs=60)  # 4.5 standard deviations of the binomial
        counted = {served.version: served.scheduler.statistics.success.count for served in catalogue.served()}
        assert counted == {"3": seen[3], "4": seen[4]}
        assert catalogue.find("scale", "3").version == "3", "who names a version gets it"

    with_catalogue(models, test)


def test_a_split_is_the_same_for_the_same_draws(models: Path) -> None:
    runs: list[list[str]] = []
    for seed in (1, 1, 2):

        async def test(catalogue: Catalogue) -> None:
            await catalogue.split("scale", {3: 50, 4: 50})
            runs.append([catalogue.find("scale").version for _ in range(64)])

        with_catalogue(models, test, seed)
    assert runs[0] == runs[1] != runs[2]


def test_promotion_ends_a_split_and_rollback_brings_it_back(models: Path) -> None:
    async def test(catalogue: Catalogue) -> None:
        await catalogue.split("scale", {3: 1, 4: 1})
        await catalogue.promote("scale", 3)
        assert catalogue.traffic("scale") == {"3": 1.0}
        assert (await catalogue.rollback("scale")).traffic == {"3": 0.5, "4": 0.5}
        assert (await catalogue.rollback("scale")).traffic == {"4": 1.0}
        with pytest.raises(Refusal, match="no version to go back to"):
            await catalogue.rollback("scale")

    with_catalogue(models, test)


def test_a_split_ends_where_it_began_however_often_it_was_changed(models: Path) -> None:
    async def test(catalogue: Catalogue) -> None:
        for share in (1, 10, 50):
            await catalogue.split("scale", {4: 100 - share, 1: share})
        assert (await catalogue.split("scale", {})).traffic == {"4": 1.0}
        assert answered(catalogue, 5) == {4: 5}
        with pytest.raises(Refusal, match="no split that could end"):
            await catalogue.split("scale", {})

    with_catalogue(models, test)


def test_loading_and_unloading_end_a_split(models: Path) -> None:
    async def test(catalogue: Catalogue) -> None:
        await catalogue.split("scale", {1: 1, 3: 1})
        assert (await catalogue.load("scale")).traffic == {"4": 1.0}
        await catalogue.split("scale", {1: 1, 3: 1})
        assert (await catalogue.unload("scale")).traffic == {}
        assert (await catalogue.load("scale")).traffic == {"4": 1.0}
        assert [served.version for served in catalogue.served()] == ["4"]

    with_catalogue(models, test)


def test_a_split_with_a_version_that_is_not_there_or_is_damaged_changes_nothing(models: Path) -> None:
    async def test(catalogue: Catalogue) -> None:
        with pytest.raises(Refusal, match="no version 7"):
            await catalogue.split("scale", {4: 1, 7: 1})
        graph = models / "scale" / "3" / "artifact" / "model.onnx"
        graph.write_bytes(graph.read_bytes() + b"x")
        with pytest.raises(NarrowcastError, match="damaged"):
            await catalogue.split("scale", {1: 1, 3: 1})
        assert catalogue.traffic("scale") == {"4": 1.0}
        assert [served.version for served in catalogue.served()] == ["4"]

    with_catalogue(models, test)


def test_the_answers_of_a_split_say_their_version(models: Path, serve: Any) -> None:
    running = serve(places=(models,), hosting=HOSTING)
    target = "/v2/repository/models/scale/traffic"

    def change(document: Any) -> Any:
        return running.ask("POST", target, json.dumps(document).encode(), Authorization="Bearer s3cret")

    answer = change({"weights": {"3": 50, "4": 50}})
    assert answer.status == 200
    assert answer.json == {"traffic": {"3": 0.5, "4": 0.5}, "kept": True}
    assert running.ask("GET", target).json == {"traffic": {"3": 0.5, "4": 0.5}}
    seen: set[str] = set()
    for _ in range(60):
        document = running.infer("scale", request(1, 1)).json
        assert document["outputs"][0]["data"][::4] == [float(document["model_version"])] * 2
        seen.add(document["model_version"])
    assert seen == {"3", "4"}
    for wrong in (
        {"weights": []},
        {"weights": {"x": 1}},
        {"weights": {"3": "much"}},
        {"weights": {"3": True}},
        {"weights": {"3": 0}},
        {"weight": {}},
        {"weights": {"3": 1}, "also": 1},
    ):
        assert change(wrong).status == 400, wrong
    assert change({"weights": {}}).json == {"traffic": {"4": 1.0}, "kept": True}
    assert running.ask("POST", target, b"{}").status == 401
    assert running.ask("GET", "/v2/repository/models/no/traffic").status == 404


# Restarts -------------------------------------------------------------------------------------------------------------


def test_promotions_splits_and_the_way_back_outlive_a_restart(models: Path) -> None:
    async def first(catalogue: Catalogue) -> None:
        assert await catalogue.promote("scale", 1)
        assert not (await catalogue.split("scale", {1: 3, 3: 1})).forgotten

    async def second(catalogue: Catalogue) -> None:
        assert catalogue.traffic("scale") == {"1": 0.75, "3": 0.25}
        assert (await catalogue.rollback("scale")).traffic == {"1": 1.0}
        assert (await catalogue.rollback("scale")).traffic == {"4": 1.0}

    async def third(catalogue: Catalogue) -> None:
        assert catalogue.traffic("scale") == {"4": 1.0}
        await catalogue.load("scale")

    for test in (first, second, third):
        with_catalogue(models, test)
    assert [path.name for path in models.iterdir() if path.is_file()] == [STATE], "no partial file is left"


def test_a_rolled_back_version_stays_rolled_back_when_a_newer_one_comes(models: Path, manifest_of: ManifestOf) -> None:
    async def first(catalogue: Catalogue) -> None:
        await catalogue.promote("scale", 3)

    async def second(catalogue: Catalogue) -> None:
        assert catalogue.traffic("scale") == {"3": 1.0}
        assert (await catalogue.load("scale")).traffic == {"9": 1.0}, "unless somebody asks for the newest"

    with_catalogue(models, first)
    write_artifact(models / "scale" / "9" / "artifact", manifest_of(), 9.0)
    with_catalogue(models, second)
    assert read_state(models)["scale"].traffic is None


def test_a_version_that_has_gone_is_not_waited_for(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def first(catalogue: Catalogue) -> None:
        await catalogue.promote("scale", 1)

    async def second(catalogue: Catalogue) -> None:
        assert catalogue.traffic("scale") == {"4": 1.0}
        with pytest.raises(Refusal, match="no version 1"):
            await catalogue.promote("scale", 1)

    with_catalogue(models, first)
    (models / "scale" / "1").rename(models / "scale" / "gone")
    with_catalogue(models, second)
    assert "version 1 answered before and is no longer there" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"format": 2}',
        '{"models": {"scale": {"traffic": {"0": 1}}}}',
        '{"models": {"scale": {"traffic": {}}}}',
        '{"models": {"scale": {"traffic": {"1": "NaN"}}}}',
        '{"models": {"scale": {"other": 1}}}',
        " " * (1 << 21),
    ],
    ids=["empty", "list", "cut", "future", "version", "nobody", "nan", "unknown", "long"],
)
def test_a_broken_memory_is_a_clear_error(models: Path, text: str) -> None:
    (models / STATE).write_text(text)

    async def test(catalogue: Catalogue) -> None:
        raise AssertionError("nothing is served that was perhaps rolled back")

    with pytest.raises(ConfigError, match=r"serving-state\.json cannot be read"):
        with_catalogue(models, test)


def test_links_and_pipes_are_no_memory(models: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("{}")
    (models / STATE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_state(models)
    (models / STATE).unlink()
    os.mkfifo(models / STATE)
    with pytest.raises(ConfigError, match="no regular file"):
        read_state(models)


def test_a_memory_that_breaks_later_is_said_and_not_overwritten(models: Path) -> None:
    async def test(catalogue: Catalogue) -> None:
        (models / STATE).write_text("mine")
        change = await catalogue.promote("scale", 1)
        assert "cannot be read" in change.forgotten
        assert answered(catalogue) == {1: 1}
        assert (models / STATE).read_text() == "mine"

    with_catalogue(models, test)


def test_a_folder_that_cannot_be_written_is_served_and_forgets(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **options: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("narrowcast.serving.state.NamedTemporaryFile", refused)

    async def test(catalogue: Catalogue) -> None:
        change = await catalogue.promote("scale", 3)
        assert "Read-only file system" in change.forgotten
        assert answered(catalogue) == {3: 1}

    with_catalogue(models, test)


def test_models_of_a_program_are_not_remembered() -> None:
    async def main() -> None:
        catalogue = Catalogue(Repository(sources={"scale": function()}), HOSTING)
        await catalogue.load_all()
        assert (await catalogue.promote("scale", 1)).forgotten == "the model is in no folder of models"
        await catalogue.close()

    asyncio.run(main())
