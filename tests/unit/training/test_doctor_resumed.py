"""The record of a run that was cut and taken up again is that of a run that was not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from narrowcast.training import loop
from narrowcast.training.config import Config
from narrowcast.training.doctor.record import read
from narrowcast.training.doctor.values import Part
from narrowcast.training.progress import Silent
from narrowcast.training.reading import validated
from narrowcast.training.run import fit

NETS = """
import torch
from torch import nn

def net():
    layers = nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)
    return nn.Sequential(*layers), torch.zeros(2, 1, 4, 4)
"""
STEPS = 130


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network and data of one's own."""
    (tmp_path / "cut_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "cut_nets", raising=False)
    rng = np.random.default_rng(0)
    np.savez("data.npz", input=rng.standard_normal((64, 1, 4, 4), np.float32), labels=rng.integers(0, 4, 64))
    torch.set_num_threads(1)


def config_of(**changes) -> Config:
    known = {
        "network": "py:cut_nets:net",
        "data": {"train": "npz:data.npz"},
        "optimizer": {"lr": 0.001},
        "batch": 8,
        "steps": STEPS,
        "log": 50,
        "validate_every": STEPS,
        "device": "cpu",
        "checkpoint": 20,
    }
    return validated({**known, **changes}, "test")


class Cut(Silent):
    """Fails after some updates, between a step and its checkpoint."""

    def __init__(self, at: int) -> None:
        self.at = at

    def stepped(self, step: int) -> None:
        if step == self.at:
            raise RuntimeError("cut")


class Interrupted(Silent):
    """Sends SIGINT to this process after some updates."""

    def __init__(self, at: int) -> None:
        self.at = at

    def stepped(self, step: int) -> None:
        if step == self.at:
            os.kill(os.getpid(), signal.SIGINT)


def cut_and_resumed(config: Config, at: int, monkeypatch: pytest.MonkeyPatch):
    """Return the result of a run that was cut as a kill does it: nothing is written after."""
    with monkeypatch.context() as killed:
        killed.setattr(loop.Watch, "close", lambda watch: watch.summary())
        with pytest.raises(RuntimeError, match="cut"):
            fit(config, Path("cut"), progress=Cut(at))
    return fit(config, Path("cut"), resume=True)


def same(found, wanted) -> None:
    """Compare two records: lines, and histograms with the steps that they were taken at."""
    assert found.readings == wanted.readings
    assert [one.step for one in found.readings] == list(range(STEPS))
    assert found.events == wanted.events
    assert found.summary == wanted.summary
    assert [(one.layer, one.part) for one in found.series] == [(one.layer, one.part) for one in wanted.series]
    for one, other in zip(found.series, wanted.series, strict=True):
        assert (one.numbers, one.seen) == (other.numbers, other.seen)
        for name in ("steps", "scales", "columns", "largest", "total"):
            assert getattr(one, name).tolist() == getattr(other, name).tolist(), (one.layer, one.part, name)


@pytest.mark.parametrize("level", ["cheap", "deep"])
@pytest.mark.parametrize("at", [20, 21, 75, 119])
def test_a_run_that_was_cut_has_the_record_of_one_that_was_not(level, at, monkeypatch):
    config = config_of(doctor=level)
    straight = fit(config, Path("straight"))
    resumed = cut_and_resumed(config, at, monkeypatch)
    assert resumed.doctor == straight.doctor
    assert resumed.doctor[0].startswith(f"Healthy: {STEPS} steps,")
    same(read("cut"), read("straight"))


def test_what_a_checkpoint_resumes_from_is_in_the_record_at_any_time(monkeypatch):
    class Looks(Silent):
        def stepped(self, step: int) -> None:
            if Path("run/checkpoints").is_dir():
                latest = max(int(path.name[5:]) for path in Path("run/checkpoints").glob("step-*"))
                found = read("run")
                assert {one.step for one in found.readings} >= set(range(latest))
                assert found.of("1", Part.WEIGHT).steps[0] < latest
                seen.append(latest)

    seen: list[int] = []
    fit(config_of(), Path("run"), progress=Looks())
    assert set(seen) == {20, 40, 60, 80, 100, 120}


def test_an_interrupt_loses_nothing():
    straight = fit(config_of(), Path("straight"))
    with pytest.raises(KeyboardInterrupt):
        fit(config_of(), Path("stopped"), progress=Interrupted(33))
    assert [one.step for one in read("stopped").readings] == list(range(33))
    assert fit(config_of(), Path("stopped"), resume=True).doctor == straight.doctor
    found, wanted = read("stopped"), read("straight")
    assert found.readings == wanted.readings
    for one, other in zip(found.series, wanted.series, strict=True):
        assert one.total.tolist() == other.total.tolist()
        assert set(other.steps) <= set(one.steps)  # the interrupt wrote one more


def test_a_run_that_is_cut_before_its_first_checkpoint_begins_its_record_anew(monkeypatch):
    straight = fit(config_of(), Path("straight"))
    assert cut_and_resumed(config_of(), 13, monkeypatch).doctor == straight.doctor
    same(read("cut"), read("straight"))


def test_a_run_that_is_cut_after_its_last_step_keeps_its_record(monkeypatch):
    def fails(*_):
        raise RuntimeError("cut")

    with monkeypatch.context() as killed:
        killed.setattr(loop, "write_weights", fails)
        with pytest.raises(RuntimeError, match="cut"):
            fit(config_of(), Path("run"))
    result = fit(config_of(), Path("run"), resume=True)
    assert result.doctor is not None
    assert result.doctor[0].startswith(f"Healthy: {STEPS} steps,")
    assert [one.step for one in read("run").readings] == list(range(STEPS))


def test_a_part_without_a_record_is_said_to_be():
    with pytest.raises(RuntimeError, match="cut"):
        fit(config_of(doctor="off"), Path("run"), progress=Cut(50))
    result = fit(config_of(doctor="cheap"), Path("run"), resume=True)
    assert result.doctor is not None
    assert result.doctor[0].startswith("Healthy: 90 steps,")
    assert result.doctor[1].startswith(
        "Of the run's 130 steps 40 have no record: it lacks those from 0 on and goes on at step 40;"
    )
    assert read("run").summary.verdict.sentences == result.doctor
