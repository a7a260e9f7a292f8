"""The search for settings: the same trials whenever it is cut off, on the validation part, the best written as a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_runs import own_networks, write_images

from narrowcast.errors import ConfigError, OutputError, RuntimeMissingError
from narrowcast.training import tune as searching
from narrowcast.training.config import Config
from narrowcast.training.progress import Silent
from narrowcast.training.reading import read_config, validated, with_overrides
from narrowcast.training.tune import Tuned, tune

NET = """
from torch import nn, zeros
def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), zeros(2, 1, 4, 4)
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_networks(tmp_path, "tune_net", NET, monkeypatch)
    write_images(Path("data.npz"), size=120, noise=0.8)


def config_of(*overrides: str) -> Config:
    known: dict[str, Any] = {
        "network": "py:tune_net:net",
        "data": "npz:data.npz",
        "batch": 16,
        "epochs": 2,
        "device": "cpu",
        "doctor": "off",
        "tune": {
            "space": {
                "optimizer.lr": {"low": 1e-4, "high": 0.3, "log": True},
                "accumulate": {"low": 1, "high": 3},
                "schedule.name": ["cosine", "linear"],
            },
            "prune": False,
        },
    }
    return validated(with_overrides(known, overrides), "test")


class Interrupted(Silent):
    """Is interrupted in a trial, at a step."""

    def __init__(self, trial: int, step: int) -> None:
        self.trial = trial
        self.step = step
        self.now = -1

    def started(self, run: Any, out: Path, step: int) -> None:
        self.now = int(out.name)

    def stepped(self, step: int) -> None:
        if (self.now, step) == (self.trial, self.step):
            raise KeyboardInterrupt


def settings_of(found: Tuned) -> list[tuple[dict[str, Any], float | None]]:
    return [(trial.settings, trial.value) for trial in found.trials]


def test_a_search_that_was_cut_off_tries_what_it_would_have_tried() -> None:
    whole = tune(config_of(), Path("whole"), trials=5)
    with pytest.raises(KeyboardInterrupt):
        tune(config_of(), Path("cut"), trials=5, progress=Interrupted(2, 3))
    again = tune(config_of(), Path("cut"), trials=5, resume=True)
    assert settings_of(again) == settings_of(whole)
    assert again.best == whole.best


def test_the_best_config_is_written_and_can_be_trained() -> None:
    found = tune(config_of(), Path("study"), trials=4)
    values = [trial.value for trial in found.trials if trial.value is not None]
    assert len(values) == 4
    assert found.trials[found.best].value == max(values)
    best = read_config(Path("study/best.yaml"))
    assert best.tune is None
    assert best.optimizer.lr == found.trials[found.best].settings["optimizer.lr"]
    assert best.accumulate == found.trials[found.best].settings["accumulate"]
    assert isinstance(found.trials[0].settings["accumulate"], int)


def test_the_loss_is_made_small_and_accuracy_large() -> None:
    found = tune(config_of("metric=loss"), Path("study"), trials=3)
    assert found.metric == "loss"
    assert found.trials[found.best].value == min(trial.value for trial in found.trials if trial.value is not None)


def test_more_trials_go_on_with_the_study() -> None:
    first = tune(config_of(), Path("study"), trials=2)
    second = tune(config_of(), Path("study"), trials=3, resume=True)
    assert settings_of(second)[:2] == settings_of(first)
    with pytest.raises(OutputError, match="holds a study"):
        tune(config_of(), Path("study"), trials=3)
    assert len(tune(config_of(), Path("study"), trials=1, force=True).trials) == 1


def test_settings_that_cannot_be_trained_with_do_not_end_the_search() -> None:
    space = "tune.space={batch: [16, 5000], optimizer.lr: {low: 1e-3, high: 1e-2}}"
    found = tune(config_of(space), Path("study"), trials=4)
    assert {trial.state for trial in found.trials} == {"complete", "fail"}
    assert all((trial.state == "fail") == (trial.settings["batch"] == 5000) for trial in found.trials)


def test_hopeless_trials_stop_early() -> None:
    space = "tune.space={optimizer.lr: {low: 1e-8, high: 1.0, log: true}}"
    found = tune(config_of(space, "tune.prune=true", "epochs=4", "validate_every=2"), Path("study"), trials=10)
    assert {trial.state for trial in found.trials} == {"complete", "pruned"}


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("tune=null", "tune.space is empty"),
        ("tune.space={}", "tune.space is empty"),
        ("tune.space={optimizer.lrr: [1]}", "'optimizer.lrr' is unknown"),
        ("tune.space={optimizer.lr: {low: -1.0, high: 1.0}}", "optimizer.lr = -1.0"),
        ("tune.space={batch: {low: 1.5, high: 3.0}}", "batch = 1.5"),
        ("data.report=npz:data.npz", "there is none"),
    ],
)
def test_a_space_that_cannot_be_searched_is_named(override: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tune(config_of(override), Path("study"), trials=1)
    assert what in caught.value.what
    assert not Path("study").exists()


def test_another_study_is_not_mixed_in() -> None:
    tune(config_of(), Path("study"), trials=1)
    with pytest.raises(ConfigError, match="begun with another config"):
        tune(config_of("seed=1"), Path("study"), trials=2, resume=True)


def test_optuna_that_is_missing_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(searching.importlib, "import_module", missing)
    with pytest.raises(RuntimeMissingError, match="Optuna") as caught:
        tune(config_of(), Path("study"), trials=1)
    assert "narrowcast[train]" in caught.value.next_step
