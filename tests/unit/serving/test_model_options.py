"""How a model is served, by the file beside its versions."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving_models import request, write_artifact

from narrowcast.artifacts.manifest import Manifest
from narrowcast.errors import ConfigError
from narrowcast.serving.catalogue import Catalogue, Hosting
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.repository import Repository, VersionPolicy
from narrowcast.serving.scheduling.queue import Batching
from narrowcast.serving.scheduling.scheduler import Settings
from narrowcast.serving.settings import ModelOptions, read_model_options, read_options, read_sizes
from narrowcast.serving.workers.sources import Placement

ManifestOf = Callable[..., Manifest]
BASE = Hosting(Placement.THREAD, 2, Settings(Batching(16, 1_000_000), 100, 60.0, 120.0))


def said(folder: Path, document: Any) -> Hosting:
    (folder / "serving.json").write_text(json.dumps(document))
    return read_model_options(folder, BASE)


# What is said ---------------------------------------------------------------------------------------------------------


def test_what_is_not_said_stays_as_it_is(tmp_path: Path) -> None:
    assert read_model_options(tmp_path, BASE) == BASE
    assert said(tmp_path, {}) == BASE
    assert read_model_options(tmp_path / "missing", BASE) == BASE


def test_every_option_counts(tmp_path: Path) -> None:
    hosting = said(
        tmp_path,
        {
            "placement": "inline",
            "workers": 3,
            "versions": "=3,7",
            "load": "on-demand",
            "max_batch": 8,
            "delay": 2.5,
            "preferred": [8, 4, 4],
            "pad": True,
            "queue": 7,
            "timeout": 0,
            "batch_timeout": 1,
            "priority_levels": 5,
            "default_priority": 2,
        },
    )
    batching = Batching(8, 2_500_000, (4, 8), pad=True)
    expected = Settings(batching, 7, None, 1.0, priority_levels=5, default_priority=2)
    assert hosting == Hosting(Placement.INLINE, 3, expected, VersionPolicy(named=(3, 7)), on_demand=True)
    assert set(ModelOptions.model_fields) == {
        "placement",
        "workers",
        "versions",
        "load",
        "batching",
        "max_batch",
        "delay",
        "preferred",
        "pad",
        "queue",
        "timeout",
        "batch_timeout",
        "priority_levels",
        "default_priority",
    }, "an option that is new is tested here too"


def test_static_batching_is_said_for_one_model_and_unsaid_for_another(tmp_path: Path) -> None:
    static = said(tmp_path, {"batching": "static", "max_batch": 4})
    assert static.settings.batching == Batching.static(4, 1_000_000)
    smaller = read_options({"max_batch": 2}, "x").over(static)
    assert smaller.settings.batching == Batching.static(2, 1_000_000)
    dynamic = read_options({"batching": "dynamic"}, "x").over(static)
    assert dynamic.settings.batching == Batching(4, 1_000_000)


def test_fewer_priorities_move_the_default(tmp_path: Path) -> None:
    assert said(tmp_path, {"priority_levels": 3}).settings.default_priority == 3


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "holds no object"),
        ({"worker": 2}, r"'worker' is unknown"),
        ({"workers": 0}, "workers 0"),
        ({"workers": "2"}, "workers '2'"),
        ({"workers": True}, "workers True"),
        ({"placement": "moon"}, "placement 'moon' is unknown"),
        ({"versions": "newest"}, "versions 'newest' cannot be read"),
        ({"delay": -1}, "delay -1"),
        ({"preferred": [32]}, "preferred batch size 32 is above max_batch 16"),
        ({"preferred": 4}, "preferred 4"),
        ({"batching": "adaptive"}, "batching 'adaptive'"),
        ({"batching": "static", "delay": 0}, "static batching needs a delay"),
        ({"batching": "static", "preferred": [4]}, "static batches all have the size max_batch"),
        ({"batching": "static", "pad": False}, "static batches all have the size max_batch"),
        ({"default_priority": 9, "priority_levels": 3}, "default_priority 9 is above priority_levels 3"),
    ],
)
def test_mistakes_name_the_file_and_what_is_wrong(tmp_path: Path, document: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        said(tmp_path, document)
    assert str(tmp_path / "serving.json") in caught.value.what


def test_an_unknown_option_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean workers\?"):
        said(tmp_path, {"worker": 2})


@pytest.mark.parametrize("text", ["", "{", "nul", "\xff", '{"delay": NaN}', " " * (1 << 17)])
def test_what_is_no_json_is_no_file_of_options(tmp_path: Path, text: str) -> None:
    (tmp_path / "serving.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"serving\.json"):
        read_model_options(tmp_path, BASE)


def test_links_and_pipes_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("{}")
    (tmp_path / "serving.json").symlink_to(tmp_path / "mine.json")
    with pytest.raises(ConfigError, match="it is a link"):
        read_model_options(tmp_path, BASE)
    (tmp_path / "serving.json").unlink()
    os.mkfifo(tmp_path / "serving.json")
    with pytest.raises(ConfigError, match="no regular file"):
        read_model_options(tmp_path, BASE)


def test_sizes_are_read_from_the_command_line() -> None:
    assert read_sizes("") == []
    assert read_sizes("4,8") == [4, 8]
    for text in ("4,", "0", "a", "4;8", "-1"):
        with pytest.raises(ConfigError, match="batch sizes"):
            read_sizes(text)


# What it does ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path, manifest_of: ManifestOf) -> Path:
    """Models ``scale`` with versions 1 and 2, and ``other``."""
    for name, version in (("scale", 1), ("scale", 2), ("other", 1)):
        write_artifact(tmp_path / "models" / name / str(version) / "artifact", manifest_of(), float(version))
    return tmp_path / "models"


def test_each_model_is_served_as_its_file_says(models: Path) -> None:
    (models / "scale" / "serving.json").write_text(
        '{"versions": "all", "workers": 3, "max_batch": 2, "priority_levels": 2}'
    )

    async def main() -> None:
        catalogue = Catalogue(Repository([models]), BASE)
        await catalogue.load_all()
        scale = catalogue.find("scale")
        assert catalogue.versions("scale") == ["1", "2"]
        assert scale.scheduler.workers_alive == scale.hosting.workers == 3
        assert scale.scheduler.largest_batch == 2
        assert catalogue.find("other").scheduler.largest_batch == 16
        assert catalogue.find("other").scheduler.workers_alive == 2
        with pytest.raises(Refusal, match="priority 3 is none here"):
            scale.scheduler.submit({"x": np.ones((1, 4), np.float32)}, 1, priority=3)
        await catalogue.close()

    asyncio.run(main())


def test_a_reload_reads_the_file_again_and_a_mistake_in_it_changes_nothing(models: Path, serve: Any) -> None:
    running = serve(places=(models,), hosting=Hosting(Placement.INLINE, settings=Settings(Batching(8))))
    file = models / "scale" / "serving.json"
    file.write_text('{"max_batch": 5, "default_priority": 3}')
    assert running.admin("scale/load").status == 200
    config = running.ask("GET", "/v2/models/scale/config").json
    assert config["max_batch_size"] == 5
    assert config["dynamic_batching"]["default_priority_level"] == 3
    file.write_text('{"max_batc": 6}')
    refused = running.admin("scale/load")
    assert refused.status == 400
    assert "did you mean max_batch?" in refused.error
    assert running.ask("GET", "/v2/models/scale/config").json["max_batch_size"] == 5
    assert running.infer("scale", request(1)).status == 200
    file.unlink()
    assert running.admin("scale/load").status == 200
    assert running.ask("GET", "/v2/models/scale/config").json["max_batch_size"] == 8


def test_the_documentation_has_every_option() -> None:
    page = (Path(__file__).parents[3] / "docs" / "serving-models.md").read_text()
    assert [name for name in ModelOptions.model_fields if f"| `{name}` |" not in page] == []
