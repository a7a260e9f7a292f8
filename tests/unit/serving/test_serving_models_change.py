"""Which models and versions are served, and how that changes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving_models import FOURS, function, request, write_artifact

from narrowcast.artifacts.manifest import Manifest
from narrowcast.errors import ArtifactError, ConfigError
from narrowcast.serving.catalogue import Catalogue, Hosting
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.repository import Repository, VersionPolicy
from narrowcast.serving.scheduling.queue import Batching
from narrowcast.serving.scheduling.scheduler import Settings
from narrowcast.serving.settings import read_placement, read_versions
from narrowcast.serving.workers.base import LoadedModel
from narrowcast.serving.workers.loading import FunctionModel
from narrowcast.serving.workers.sources import FunctionSource, Placement

ManifestOf = Callable[..., Manifest]
HOSTING = Hosting(Placement.INLINE, settings=Settings(Batching(8)))


@pytest.fixture
def repository(tmp_path: Path, manifest_of: ManifestOf) -> Path:
    """Model ``scale`` with versions 1 and 3, which multiply by 1 and 3."""
    for version in (1, 3):
        write_artifact(tmp_path / "models" / "scale" / str(version) / "artifact", manifest_of(), float(version))
    return tmp_path / "models"


def with_catalogue(
    places: list[Path], test: Callable[[Catalogue], Coroutine[Any, Any, None]], hosting: Hosting = HOSTING
) -> None:
    async def main() -> None:
        catalogue = Catalogue(Repository(places), hosting)
        await catalogue.load_all()
        try:
            await test(catalogue)
        finally:
            await catalogue.close()

    asyncio.run(main())


def factor(catalogue: Catalogue, version: str = "") -> float:
    """What the version that answers multiplies by."""
    job = catalogue.find("scale", version).scheduler.submit({"x": np.ones((1, 4), np.float32)}, 1)
    assert job.outputs is not None
    return float(job.outputs["y"][0, 0])


# The folder -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "",
        "../models/scale",
        "scale/1",
        "scale/",
        "/etc",
        "a\x00b",
        "sc*le",
        ".hidden",
        "link",
        "x" * 200,
        "é",
    ],
)
def test_names_that_are_no_names_find_nothing(repository: Path, name: str) -> None:
    (repository / ".hidden").mkdir()
    (repository / "link").symlink_to(repository / "scale")
    assert Repository([repository]).versions(name) == {}
    assert Repository([repository]).names() == ["scale"]


def test_versions_that_are_no_versions_are_passed_over(repository: Path) -> None:
    model = repository / "scale"
    for name in ("0", "01", "-1", "latest", "2"):
        (model / name).mkdir()
    (model / "5").symlink_to(model / "3")
    (model / "6").mkdir()
    (model / "6" / "artifact").symlink_to(model / "3" / "artifact")
    assert sorted(Repository([repository]).versions("scale")) == [1, 3]


def test_an_artifact_is_a_model_named_after_its_folder(tmp_path: Path, manifest_of: ManifestOf) -> None:
    folder = write_artifact(tmp_path / "net", manifest_of())
    assert Repository([folder]).names() == ["net"]
    with pytest.raises(ArtifactError, match="'net' is the name of another model"):
        Repository([folder, folder])
    with pytest.raises(ArtifactError, match="cannot be the name of a model"):
        Repository([write_artifact(tmp_path / "my net", manifest_of())])
    with pytest.raises(ArtifactError, match="is no folder"):
        Repository([tmp_path / "missing"])


@pytest.mark.parametrize(
    ("text", "versions"),
    [("1", [9]), ("2", [7, 9]), ("all", [1, 3, 7, 9]), ("=3,9", [3, 9]), ("=4", []), ("99", [1, 3, 7, 9])],
)
def test_version_policies(text: str, versions: list[int]) -> None:
    assert list(read_versions(text).select([9, 1, 3, 7])) == versions


@pytest.mark.parametrize("text", ["", "0", "-1", "none", "=", "=x", "= 1", "1.5"])
def test_what_is_no_version_policy_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="versions"):
        read_versions(text)


def test_what_is_no_placement_is_refused() -> None:
    assert read_placement("thread") is Placement.THREAD
    with pytest.raises(ConfigError, match="threads"):
        read_placement("threads")


# Changes --------------------------------------------------------------------------------------------------------------


def test_a_new_version_takes_over_and_a_rollback_brings_the_old_one_back(
    repository: Path, manifest_of: ManifestOf
) -> None:
    async def test(catalogue: Catalogue) -> None:
        assert factor(catalogue) == 3
        write_artifact(repository / "scale" / "4" / "artifact", manifest_of(), 4.0)
        await catalogue.load("scale")
        assert factor(catalogue) == 4
        assert (await catalogue.rollback("scale")).traffic == {"3": 1.0}
        assert factor(catalogue) == 3
        with pytest.raises(Refusal, match="no version to go back to"):
            await catalogue.rollback("scale")
        await catalogue.promote("scale", 1)
        assert factor(catalogue) == 1
        assert (await catalogue.rollback("scale")).traffic == {"3": 1.0}
        assert factor(catalogue) == 3

    with_catalogue([repository], test)


def test_a_version_that_cannot_be_loaded_leaves_the_old_one_serving(repository: Path, manifest_of: ManifestOf) -> None:
    async def test(catalogue: Catalogue) -> None:
        folder = write_artifact(repository / "scale" / "4" / "artifact", manifest_of(), 4.0)
        (folder / "model.onnx").write_bytes(b"tampered" + (folder / "model.onnx").read_bytes())
        with pytest.raises(ArtifactError, match="damaged"):
            await catalogue.load("scale")
        assert factor(catalogue) == 3
        with pytest.raises(ArtifactError, match="damaged"):
            await catalogue.promote("scale", 4)
        assert factor(catalogue) == 3
        states = {entry.version: (entry.state, entry.reason) for entry in catalogue.index()}
        assert states["3"] == ("READY", "")
        assert states["4"][0] == "UNAVAILABLE"
        assert "damaged" in states["4"][1]

    with_catalogue([repository], test)


def test_all_versions_can_be_served_side_by_side(repository: Path) -> None:
    async def test(catalogue: Catalogue) -> None:
        assert [factor(catalogue, version) for version in ("1", "3", "")] == [1, 3, 3]
        for version in ("2", "x", "-1", "01x", "١", "9" * 30):
            with pytest.raises(Refusal, match="no version"):
                catalogue.find("scale", version)
        await catalogue.promote("scale", 1)
        assert [factor(catalogue, version) for version in ("1", "3", "")] == [1, 3, 1]

    with_catalogue([repository], test, Hosting(Placement.INLINE, policy=VersionPolicy(latest=0)))


def test_what_is_not_there_is_refused(repository: Path) -> None:
    async def test(catalogue: Catalogue) -> None:
        for change in (
            catalogue.load("no"),
            catalogue.unload("no"),
            catalogue.promote("no", 1),
            catalogue.rollback("no"),
        ):
            with pytest.raises(Refusal) as caught:
                await change
            assert caught.value.status == 404
        with pytest.raises(Refusal, match="no version 2"):
            await catalogue.promote("scale", 2)

    with_catalogue([repository], test)


def test_statistics_outlive_a_reload(repository: Path) -> None:
    async def test(catalogue: Catalogue) -> None:
        factor(catalogue)
        await catalogue.load("scale")
        factor(catalogue)
        assert catalogue.find("scale").scheduler.statistics.success.count == 2

    with_catalogue([repository], test)


def test_requests_during_changes_never_fail(serve: Any) -> None:
    """Reloads and promotions under load: every answer is right, and comes from one version."""
    running = serve({"double": function()}, hosting=Hosting(Placement.THREAD, 2, Settings(Batching(4))))

    async def reload() -> None:
        for _ in range(15):
            await running.server.catalogue.load("double")
            await asyncio.sleep(0.005)

    changing = asyncio.run_coroutine_threadsafe(reload(), running.loop)
    count = 0
    while not changing.done():
        answer = running.infer("double", request(count))
        assert answer.status == 200, answer.body
        assert answer.json["outputs"][0]["data"][0] == 2.0 * count
        count += 1
    changing.result()
    assert count > 5


def test_each_answer_under_promotions_and_rollbacks_is_of_one_version(repository: Path, serve: Any) -> None:
    hosting = Hosting(Placement.INLINE, 1, Settings(Batching(8)), VersionPolicy(latest=0))
    running = serve(places=(repository,), hosting=hosting)

    async def change() -> None:
        for _ in range(100):
            await running.server.catalogue.promote("scale", 1)
            await asyncio.sleep(0.002)
            await running.server.catalogue.rollback("scale")
            await asyncio.sleep(0.002)

    changing = asyncio.run_coroutine_threadsafe(change(), running.loop)
    seen: set[str] = set()
    while not changing.done():
        answer = running.infer("scale", request(1, 1, 1))
        assert answer.status == 200, answer.body
        version = answer.json["model_version"]
        assert answer.json["outputs"][0]["data"][::4] == [float(version)] * 3
        seen.add(version)
    changing.result()
    assert seen == {"1", "3"}


def test_simultaneous_loads_of_one_model_are_one_after_the_other() -> None:
    """Nobody sees a half-loaded model, and nothing of the superseded loads is left."""
    loads: list[LoadedModel] = []
    closed: list[LoadedModel] = []

    class Counted(FunctionModel):
        def close(self) -> None:
            closed.append(self)

    def load() -> LoadedModel:
        loads.append(Counted(FOURS, lambda inputs: {"y": inputs["x"]}))
        return loads[-1]

    async def main() -> None:
        catalogue = Catalogue(Repository(sources={"scale": FunctionSource(load)}), HOSTING)
        await asyncio.gather(*(catalogue.load("scale") for _ in range(20)))
        assert factor(catalogue) == 1
        await catalogue.close()

    asyncio.run(main())
    assert len(loads) == 20
    assert set(map(id, closed)) == set(map(id, loads))


def test_a_thousand_loads_and_unloads_leave_nothing_behind() -> None:
    async def main() -> None:
        catalogue = Catalogue(Repository(sources={"scale": function()}), HOSTING)
        await catalogue.load("scale")
        before = len(asyncio.all_tasks())
        for _ in range(1000):
            await catalogue.unload("scale")
            await catalogue.load("scale")
        assert factor(catalogue) == 2
        await asyncio.sleep(0.05)
        assert len(asyncio.all_tasks()) == before
        await catalogue.close()

    asyncio.run(main())


# Over HTTP ------------------------------------------------------------------------------------------------------------


def test_administration_over_http(repository: Path, serve: Any) -> None:
    running = serve(places=(repository,), hosting=HOSTING)

    def served() -> float:
        return running.infer("scale", request(1)).json["outputs"][0]["data"][0]

    assert served() == 3
    assert running.admin("scale/versions/1/promote").status == 200
    assert served() == 1
    assert running.admin("scale/rollback").status == 200
    assert served() == 3
    assert running.admin("scale/rollback").status == 400
    assert running.admin("scale/versions/x/promote").status == 400
    assert running.admin("..%2F..%2Fetc/load").status == 404
    assert running.admin("scale/unload").status == 200
    assert running.infer("scale", request(1)).status == 404
    assert running.admin("scale/load").status == 200
    assert served() == 3


@pytest.mark.parametrize("target", ["load", "unload", "rollback", "versions/1/promote"])
def test_administration_needs_the_token(repository: Path, serve: Any, target: str) -> None:
    running = serve(places=(repository,), hosting=HOSTING)
    path = f"/v2/repository/models/scale/{target}"
    assert running.ask("POST", path).status == 401
    assert running.ask("POST", path, Authorization="Bearer wrong").status == 401
    assert serve(places=(repository,), hosting=HOSTING, token=None).ask("POST", path).status == 403


def test_a_load_that_would_change_the_configuration_is_refused(repository: Path, serve: Any) -> None:
    running = serve(places=(repository,), hosting=HOSTING)
    body = json.dumps({"parameters": {"config": "{}"}}).encode()
    assert running.ask("POST", "/v2/repository/models/scale/load", body, Authorization="Bearer s3cret").status == 501
