"""Checkpoints: whole or not at all, and the last good one."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import result_of
from torch import nn

from narrowcast.errors import OutputError, TrainingError
from narrowcast.training import checkpoint, checkpoint_folder
from narrowcast.training.random_state import random_state, set_random_state


def a_state(step: int = 0) -> dict[str, Any]:
    return {"model": {"w": torch.arange(6.0).reshape(2, 3) + step}, "rates": (0.1, float("inf")), "step": step}


def is_state(found: Any, step: int) -> bool:
    expected = a_state(step)
    weights = torch.equal(found["model"]["w"], expected["model"]["w"])
    return weights and (found["rates"], found["step"]) == (expected["rates"], step)


def saved(folder: Path, *steps: int, keep: int = 9) -> list[Path]:
    return [checkpoint.save(folder, a_state(step), step=step, keep=keep) for step in steps]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_safetensors_and_json(tmp_path: Path) -> None:
    (path,) = saved(tmp_path / "deep" / "folder", 100)
    assert path.name == "step-00000100"
    assert names(path) == ["manifest.json", "state.json", "tensors.safetensors"]
    assert is_state(checkpoint.load(path), 100)
    assert checkpoint.latest(path.parent) == path


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, 10, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000010"]
    assert saved(tmp_path, 123_456_789)[0] == checkpoint.latest(tmp_path)


def test_a_step_can_be_saved_again_and_ends_what_lay_after_it(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    checkpoint.save(tmp_path, {"other": 1}, step=2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert checkpoint.load(tmp_path / "step-00000002") == {"other": 1}


def test_no_folder_and_an_empty_one_hold_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "none") is None
    assert checkpoint.load_latest(tmp_path) is None


@pytest.mark.parametrize("keep", [0, -1])
def test_nothing_kept_is_refused(tmp_path: Path, keep: int) -> None:
    with pytest.raises(TrainingError, match=f"keep = {keep}"):
        saved(tmp_path, 1, keep=keep)


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return result_of("killed_saves.py", tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize(("case", "new"), [("next", "new 4"), ("same", "new 3"), ("earlier", "new 2")])
def test_a_kill_at_any_instant_leaves_the_old_checkpoint_or_the_new(kills: dict[str, Any], case: str, new: str) -> None:
    *killed, finished = kills[case]
    assert all(one["killed"] for one in killed)
    assert (finished["killed"], finished["found"]) == (False, new)
    found = [one["found"] for one in killed]
    turn = found.index(new)  # some kills are before the new one has its place, some after
    assert turn > 10
    assert found[turn:] == [new] * (len(found) - turn)
    before = {
        "next": {"old 3"},
        "same": {"old 3"},
        "earlier": {"old 3", "old 2"},
    }  # what lay after an earlier step ends
    assert set(found[:turn]) <= before[case]


@pytest.mark.parametrize(("case", "expected"), [("next", 5), ("same", 4), ("earlier", 3), ("bytes", 5)])
def test_the_next_save_clears_what_a_kill_left(kills: dict[str, Any], case: str, expected: int) -> None:
    for one in kills[case]:
        assert one["next"] == f"next {expected}"
        assert len(one["left"]) == (1 if case == "same" else 2)
        assert all(name.startswith("step-") for name in one["left"])


def test_a_kill_within_the_bytes_of_a_file_leaves_the_old_checkpoint(kills: dict[str, Any]) -> None:
    *killed, finished = kills["bytes"]
    assert [one["found"] for one in killed] == ["old 3"] * 7
    assert (finished["killed"], finished["found"]) == (False, "new 4")


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, rename = checkpoint_folder.sync, Path.rename

    def synced(path: Path) -> None:
        sync(path)
        events.append(f"sync {path.name}")

    def renamed(path: Path, target: Path) -> Path:
        events.append(f"rename {target.name}")
        return rename(path, target)

    monkeypatch.setattr(checkpoint_folder, "sync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    (path,) = saved(tmp_path / "checkpoints", 7)
    place = events.index("rename step-00000007")
    before = {event.removeprefix("sync ") for event in events[:place]}
    assert before == {*names(path), ".step-00000007.writing"}
    assert events[place + 1] == "sync checkpoints"


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Let no file grow beyond a size, as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("room", [0, 100, 300, 500])
def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path: Path, room: int) -> None:
    saved(tmp_path, 1)
    with full_disk(room), pytest.raises(OutputError, match=r"cannot be written: .*(large|I/O)"):
        checkpoint.save(tmp_path, a_state(2) | {"long": "x" * 400}, step=2)
    assert names(tmp_path) == ["step-00000001"]
    assert is_state(checkpoint.load(tmp_path / "step-00000001"), 1)


def test_a_folder_that_is_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match=str(folder)):
            saved(folder, 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_an_output_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        saved(tmp_path, 1)


def test_a_state_that_cannot_be_held_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="without pickle"):
        checkpoint.save(tmp_path / "new", {"f": print}, step=1)
    assert not (tmp_path / "new").exists()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def leave_out(path: Path) -> None:
    manifest = json.loads(path.with_name("manifest.json").read_text())
    manifest["files"] = {f"../{path.name}": next(iter(manifest["files"].values()))}
    path.with_name("manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink, leave_out], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "tensors.safetensors"])
def test_damage_is_noticed_and_the_one_before_is_used(tmp_path: Path, name: str, damage: Any) -> None:
    _, path = saved(tmp_path, 1, 2)
    damage(path / name)
    with pytest.raises(TrainingError, match=str(path)):
        checkpoint.load(path)
    with pytest.warns(RuntimeWarning, match=f"{path}.* the one before is used"):
        loaded = checkpoint.load_latest(tmp_path)
    assert loaded is not None
    assert (loaded.path.name, loaded.step) == ("step-00000001", 1)
    assert is_state(loaded.state, 1)


def test_damage_of_all_is_an_error(tmp_path: Path) -> None:
    for path in saved(tmp_path, 1, 2):
        flip(path / "tensors.safetensors")
    with pytest.warns(RuntimeWarning), pytest.raises(TrainingError, match="all 2 checkpoints"):
        checkpoint.load_latest(tmp_path)


def test_another_version_and_a_renamed_one_are_refused(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 5)
    renamed = path.rename(tmp_path / "step-00000006")
    with pytest.raises(TrainingError, match="does not describe"):
        checkpoint.load(renamed)
    manifest = json.loads((renamed / "manifest.json").read_text())
    (renamed / "manifest.json").write_text(json.dumps(manifest | {"checkpoint": 2}))
    with pytest.raises(TrainingError, match="version 2"):
        checkpoint.load(renamed)


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match="no checkpoint"):
        checkpoint.load(tmp_path / name)


def test_a_thread_writes_the_state_as_it_was_when_asked(tmp_path: Path) -> None:
    state = a_state(1)
    with checkpoint.Saver(tmp_path, keep=1) as saver:
        saver.save(state, step=1)
        state["model"]["w"].zero_()
        saver.save(a_state(2), step=2)
        assert saver.wait() == tmp_path / "step-00000002"
        saver.save(a_state(3), step=3)
    assert names(tmp_path) == ["step-00000003"]
    assert is_state(checkpoint.load(tmp_path / "step-00000003"), 3)


def test_the_thread_copies_before_it_returns(tmp_path: Path) -> None:
    state = a_state(1)
    with checkpoint.Saver(tmp_path) as saver:
        saver.save(state, step=1)
        state["model"]["w"].zero_()
    assert is_state(checkpoint.load(tmp_path / "step-00000001"), 1)


def test_what_goes_wrong_in_the_thread_is_said_at_the_next_call(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    saver = checkpoint.Saver(tmp_path / "file")
    saver.save(a_state(), step=1)
    with pytest.raises(OutputError, match="file"):
        saver.save(a_state(), step=2)
    saver.save(a_state(), step=3)
    with pytest.raises(OutputError), saver:
        pass


def test_another_models_checkpoint_is_told_by_its_keys_and_shapes() -> None:
    trained = nn.Sequential(*(nn.Linear(3, 3) for _ in range(8))).state_dict()
    other = nn.Sequential(nn.Linear(3, 5), *(nn.Conv2d(3, 3, 1) for _ in range(2)), nn.BatchNorm1d(3)).state_dict()
    checkpoint.check_keys(trained, trained, "step-1")
    with pytest.raises(TrainingError) as caught:
        checkpoint.check_keys(other, trained, "checkpoint step-1")
    assert caught.value.what == (
        "checkpoint step-1 is of another model: "
        "3 only in the model: 3.running_mean, 3.running_var, 3.num_batches_tracked; "
        "8 only in the checkpoint: 4.weight, 4.bias, 5.weight and 5 more; "
        "5 different: 0.weight (float32 [5, 3] in the model, float32 [3, 3] in the checkpoint), "
        "0.bias (float32 [5] in the model, float32 [3] in the checkpoint), "
        "1.weight (float32 [3, 3, 1, 1] in the model, float32 [3, 3] in the checkpoint) and 2 more"
    )
    with pytest.raises(TrainingError, match=r"bfloat16 \[3\] in the checkpoint"):
        checkpoint.check_keys({"w": torch.zeros(3)}, {"w": torch.zeros(3, dtype=torch.bfloat16)}, "c")


def draws() -> list[float]:
    return [torch.rand(()).item(), float(np.random.random()), random.random(), random.gauss(0, 1)]


def test_random_states_go_on_where_they_were(tmp_path: Path) -> None:
    draws()  # leaves half of a pair of Gaussian numbers behind
    path = checkpoint.save(tmp_path, {"random": random_state()}, step=1)
    expected = [draws(), draws()]
    draws()
    set_random_state(checkpoint.load(path)["random"])
    assert [draws(), draws()] == expected


def test_optimizer_schedule_and_model_states_load_as_they_are(tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> float:
        loss = model(torch.randn(8, 4)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.item()

    parts = build()
    for _ in range(3):
        step(*parts)
    state = {"parts": [part.state_dict() for part in parts], "random": random_state()}
    path = checkpoint.save(tmp_path, state, step=3)
    expected = [step(*parts) for _ in range(4)]
    parts = build()
    found = checkpoint.load(path)
    for part, stored in zip(parts, found["parts"], strict=True):
        part.load_state_dict(stored)
    set_random_state(found["random"])
    assert [step(*parts) for _ in range(4)] == expected
