"""Managed runs: what a folder holds, going on where a run stopped, and what is said where it cannot."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import own_networks, told, write_images

from narrowcast.errors import ConfigError, DataError, DeviceError, FormatError, MetricError, OutputError, TrainingError
from narrowcast.models.loaders import load_module
from narrowcast.models.reference import ModelRef
from narrowcast.training import loop
from narrowcast.training.assembly import factor
from narrowcast.training.config import Config, Schedule
from narrowcast.training.logs import read_log
from narrowcast.training.objectives import Result
from narrowcast.training.outcome import read_result
from narrowcast.training.progress import Silent
from narrowcast.training.reading import validated, with_overrides
from narrowcast.training.run import fit
from narrowcast.training.settling import Courier
from narrowcast.training.trainer import StepInfo, Trainer

NETS = """
import torch
from torch import nn

class Dropped(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4))

def net():
    return Dropped(), torch.zeros(2, 1, 4, 4)

class Broken(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1)) * (float("nan") if self.training else 1.0)

def broken():
    return Broken(16, 4), torch.zeros(2, 1, 4, 4)

class Greedy(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1).repeat(1, 1 << 44)[:, :16])

def greedy():
    return Greedy(16, 4), torch.zeros(2, 1, 4, 4)

def tokens():
    return nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 8)), torch.zeros(2, 6, dtype=torch.int64)
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network and data of one's own: four classes of noisy images."""
    own_networks(tmp_path, "run_nets", NETS, monkeypatch)
    write_images(Path("data.npz"))


def config_of(*overrides: str) -> Config:
    known = {
        "network": "py:run_nets:net",
        "data": {"train": "npz:data.npz", "augment": {"noise": 0.1}},
        "optimizer": {"lr": 0.01},
        "batch": 16,
        "epochs": 4,
        "log": 1,
        "device": "cpu",
        "doctor": "off",
        "checkpoint": 3,
    }
    return validated(with_overrides(known, overrides), "test")


class Stops(Silent):
    """Sends a signal to this process after some updates."""

    def __init__(self, after: int, number: signal.Signals = signal.SIGINT) -> None:
        self.after = after
        self.number = number

    def stepped(self, step: int) -> None:
        if step == self.after:
            os.kill(os.getpid(), self.number)


class Fails(Silent):
    """Fails between a step and its checkpoint, as a kill does."""

    def __init__(self, at: int) -> None:
        self.at = at

    def stepped(self, step: int) -> None:
        if step == self.at:
            raise RuntimeError("killed")


def test_a_run_leaves_a_model_a_log_and_a_result(tmp_path: Path) -> None:
    result = fit(config_of(), Path("run"))
    assert {path.name for path in Path("run").iterdir()} == {
        "config.yaml",
        "log.jsonl",
        "checkpoints",
        "model.safetensors",
        "result.json",
    }
    assert result == read_result(Path("run"))
    assert (result.steps, result.skipped, result.precision) == (20, 0, "fp32")
    assert [result.parts[name].samples for name in ("train", "validation", "report")] == [90, 50, 60]
    assert result.report.samples == 60
    assert result.report.value > 0.8
    assert result.validation is not None
    assert result.environment.versions["torch"]
    lines = read_log(Path("run"))
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 21))
    assert [line["step"] for line in lines if "validation" in line] == [5, 10, 15, 20]
    assert lines[-2]["loss"] < lines[0]["loss"]


def test_the_reported_score_is_that_of_the_model_in_the_folder() -> None:
    from narrowcast.data.dataset import split
    from narrowcast.data.loaders import load_data
    from narrowcast.training.networks import inputs_of

    result = fit(config_of("precision=bf16-mixed"), Path("run"))
    made = load_module(ModelRef.parse("run"))
    assert made is not None
    part = split(load_data("npz:data.npz", inputs_of(made, "py:run_nets:net")), 0).report
    images = torch.from_numpy(part.load(np.arange(part.size))["input"])
    with torch.no_grad():
        predicted = made.module.eval()(images).argmax(1).numpy()
    assert result.report.value == (predicted == part.labels).mean()


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "fp16-mixed", "bf16-true"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(precision: str, optimizer: str) -> None:
    config = config_of(f"precision={precision}", f"optimizer={{name: {optimizer}, lr: 0.01}}", "accumulate=2")
    whole = fit(config, Path("whole"))
    with pytest.raises(RuntimeError, match="killed"):
        fit(config, Path("cut"), progress=Fails(8))
    again = fit(config, Path("cut"), resume=True)
    assert told("cut") == told("whole")
    assert again.sha256 == whole.sha256
    assert again.report == whole.report


def test_uneven_windows_close_at_the_end() -> None:
    assert fit(config_of("accumulate=3"), Path("run")).steps == 7  # 20 batches


def test_steps_may_be_given_in_place_of_epochs() -> None:
    result = fit(config_of("epochs=null", "steps=7", "validate_every=3"), Path("run"))
    assert result.steps == 7
    assert [line["step"] for line in read_log(Path("run")) if "validation" in line] == [3, 6, 7]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupt_leaves_a_checkpoint_of_its_step(number: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(config_of(), Path("run"), progress=Stops(7, number))
    assert (Path("run") / "checkpoints" / "step-00000007").is_dir()
    assert signal.getsignal(signal.SIGINT) is before
    whole = fit(config_of(), Path("whole"))
    assert fit(config_of(), Path("run"), resume=True).sha256 == whole.sha256
    assert told("run") == told("whole")


def test_a_finished_run_is_only_read() -> None:
    first = fit(config_of(), Path("run"))
    notes: list[str] = []

    class Notes(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    assert fit(config_of(), Path("run"), resume=True, progress=Notes()) == first
    assert notes == ["run is finished: nothing to do"]


def test_a_finished_run_can_be_made_longer() -> None:
    fit(config_of(), Path("run"))
    assert fit(config_of("epochs=5"), Path("run"), resume=True).steps == 25


def test_a_run_does_not_go_on_with_other_data_behind_the_same_name() -> None:
    rng = np.random.default_rng(0)

    def write(shift: int) -> None:
        labels = rng.integers(0, 3, 60)
        np.savez("tokens.npz", input=labels[:, None].repeat(6, 1) + shift)

    write(0)
    settings = ("network=py:run_nets:tokens", "data={train: npz:tokens.npz, targets: input}", "loss=next-token")
    fit(config_of(*settings), Path("run"))
    write(1)
    with pytest.raises(TrainingError, match=r"the data of the train part \(npz:tokens\.npz\) changed since"):
        fit(config_of(*settings, "epochs=5"), Path("run"), resume=True)


def test_resume_without_a_run_begins_one() -> None:
    assert fit(config_of(), Path("run"), resume=True).steps == 20


def test_skips_are_in_the_ledger_and_do_not_count() -> None:
    result = fit(config_of("precision.name=fp16-mixed", "precision.loss_scale.initial=16777216"), Path("run"))
    skips = [json.loads(line) for line in (Path("run") / "skips.jsonl").read_text().splitlines()]
    assert len(skips) == result.skipped > 0
    assert result.steps + result.skipped == 20
    assert skips[0]["layers"]


def test_a_run_waits_for_a_decision_within_the_next_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where a decision that is asked for at once leaves the device without work."""
    scaled = ("precision=fp16-mixed", "precision.loss_scale.initial=1048576", "accumulate=2")
    settings = (*scaled, "log=100", "validate_every=100", "checkpoint=100")
    at_once = fit(config_of(*settings), Path("at-once"))
    assert at_once.skipped > 0
    asked: list[str] = []  # where decisions were asked for

    class Late(Trainer):
        def __init__(self, *given: Any, **settings: Any) -> None:
            super().__init__(*given, **settings)
            self._settles_late = True

        def step(self, batch: Any) -> StepInfo:
            before = len(asked)
            info = super().step(batch)
            asked[before:] = ["step" for _ in asked[before:]]
            return info

    receive = Courier.receive
    monkeypatch.setattr(Courier, "receive", lambda courier: asked.append("loop") or receive(courier))
    monkeypatch.setattr(loop, "Trainer", Late)
    late = fit(config_of(*settings), Path("late"))
    assert (late.sha256, late.steps, late.skipped) == (at_once.sha256, at_once.steps, at_once.skipped)
    assert told("late") == told("at-once")
    assert asked == ["step"] * 9 + ["loop"]  # the last of ten is logged
    fit(config_of(*scaled, "log=2", "checkpoint=3"), Path("more"))
    assert told("more")[-1] == told("late")[-1]


def test_numbers_that_are_not_finite_end_the_run_unless_they_are_to_be_left_out() -> None:
    with pytest.raises(TrainingError, match="not finite"):
        fit(config_of("network=py:run_nets:broken"), Path("run"))
    result = fit(config_of("network=py:run_nets:broken", "nonfinite=skip"), Path("skipped"))
    assert (result.steps, result.skipped) == (0, 20)


def test_an_array_may_be_the_target_and_the_loss_the_metric() -> None:
    rng = np.random.default_rng(0)
    np.savez("tokens.npz", input=rng.integers(0, 8, (60, 1)).repeat(6, 1))
    settings = ("network=py:run_nets:tokens", "data={train: npz:tokens.npz, targets: input}", "loss=next-token")
    result = fit(config_of(*settings, "epochs=20", "optimizer.lr=0.1"), Path("run"))
    assert result.report.metric == "loss"
    assert result.report.low is None
    assert result.report.value < 0.5  # a token is followed by itself


def test_a_student_learns_from_a_run() -> None:
    fit(config_of(), Path("teacher"))
    config = config_of("distill={teacher: teacher, cache: true}", "data.augment.noise=0")
    fit(config, Path("student"))
    assert any((Path("student") / "teacher").iterdir())
    with pytest.raises(TrainingError, match="augmented"):
        fit(config_of("distill={teacher: teacher, cache: true}"), Path("other"))
    assert not Path("other").exists()


def test_a_student_learns_without_labels() -> None:
    fit(config_of("epochs=1"), Path("teacher"))
    with np.load("data.npz") as data:
        np.savez("data.npz", input=data["input"], labels=np.full(len(data["input"]), 9))
    result = fit(config_of("distill.teacher=teacher", "loss.ignore=9", "epochs=1"), Path("student"))
    assert result.steps == 5
    assert result.loss is not None
    assert 0 < result.loss < 100


@pytest.mark.parametrize("cache", ["true", "false"])
def test_a_student_does_not_go_on_with_another_teacher_behind_the_same_name(cache: str) -> None:
    settings = (f"distill={{teacher: teacher, cache: {cache}}}", "data.augment.noise=0")
    fit(config_of("epochs=1"), Path("teacher"))
    with pytest.raises(KeyboardInterrupt):
        fit(config_of(*settings), Path("student"), progress=Stops(7))
    fit(config_of("epochs=1", "seed=1"), Path("teacher"), force=True)
    with pytest.raises(TrainingError, match=r"the teacher \(teacher\) changed since") as caught:
        fit(config_of(*settings), Path("student"), resume=True)
    assert "begin anew" in caught.value.next_step


def test_tensorboard_holds_the_scalars_of_the_log() -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(config_of("log.tensorboard=true"), Path("run"))
    events = EventAccumulator("run/tensorboard")
    events.Reload()
    assert {"loss", "lr", "scale", "grad_norm", "validation/value"} <= set(events.Tags()["scalars"])
    logged = [line["loss"] for line in read_log(Path("run")) if "loss" in line]
    assert np.allclose([event.value for event in events.Scalars("loss")], logged)


# What cannot be done --------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_is_left_alone() -> None:
    fit(config_of(), Path("run"))
    with pytest.raises(OutputError, match="holds a finished run"):
        fit(config_of(), Path("run"))
    assert fit(config_of("epochs=2"), Path("run"), force=True).steps == 10
    Path("other").mkdir()
    (Path("other") / "letter.txt").write_text("mine")
    with pytest.raises(OutputError, match="no run"):
        fit(config_of(), Path("other"), force=True)
    with pytest.raises(OutputError, match="is a file"):
        fit(config_of(), Path("other/letter.txt"))


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable to the superuser")
def test_an_unwritable_folder_is_named() -> None:
    Path("locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="cannot be written: Permission denied"):
        fit(config_of(), Path("locked/run"))


def test_a_folder_below_a_file_is_named() -> None:
    Path("file").write_text("")
    with pytest.raises(OutputError, match="file/run cannot be written: there is a file where a folder should be"):
        fit(config_of(), Path("file/run"))


def test_a_run_goes_on_with_its_own_config_alone() -> None:
    fit(config_of(), Path("run"))
    with pytest.raises(ConfigError, match=r"optimizer\.lr was 0\.01, now 0\.02") as caught:
        fit(config_of("optimizer.lr=0.02"), Path("run"), resume=True)
    assert "epochs" in caught.value.allowed


def test_a_checkpoint_of_another_model_is_named_by_its_keys() -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(config_of(), Path("run"), progress=Stops(7))
    Path("run_nets.py").write_text(NETS.replace("nn.BatchNorm1d(32), ", ""))
    del __import__("sys").modules["run_nets"]
    __import__("importlib").invalidate_caches()
    with pytest.raises(TrainingError, match="is of another model") as caught:
        fit(config_of(), Path("run"), resume=True)
    assert "2.running_mean" in caught.value.what


def test_a_batch_that_does_not_fit_is_answered_once_with_an_estimate_and_the_largest_that_fits() -> None:
    with pytest.raises(TrainingError, match="a batch of 16 does not fit the memory of cpu") as caught:
        fit(config_of("network=py:run_nets:greedy"), Path("run"))
    assert "estimated to need" in caught.value.what
    assert caught.value.allowed
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("override", "kind", "what"),
    [
        ("precision=tf32", DeviceError, "tf32"),
        ("precision=fp16-true", FormatError, "refused"),
        ("precision=fp61-mixed", FormatError, "fp61-mixed"),
        ("metric=top2", MetricError, "top2"),
        ("metric=mse", MetricError, "compares with an array"),
        ("loss=crossentropy", ConfigError, "crossentropy"),
        ("batch=1000", ConfigError, "has 90 samples"),
        ("data.train=npz:no.npz", DataError, "does not exist"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(
    override: str, kind: type[Exception], what: str
) -> None:
    with pytest.raises(kind, match=what):
        fit(config_of(override), Path("run"))
    assert not Path("run").exists()


@pytest.mark.parametrize("report", [False, True], ids=["split", "own-report"])
def test_a_label_without_an_output_is_named_before_anything_is_written(report: bool) -> None:
    with np.load("data.npz") as data:
        images, labels = data["input"], data["labels"]
    labels[17] = 4
    np.savez("odd.npz", input=images + report, labels=labels)
    sources = ("data.train=npz:data.npz", "data.report=npz:odd.npz") if report else ("data.train=npz:odd.npz",)
    with pytest.raises(DataError, match=r"npz:odd\.npz has label 4, and the network has 4 outputs") as caught:
        fit(config_of(*sources), Path("run"))
    assert caught.value.allowed.startswith("0 to 3, and -100")
    assert not Path("run").exists()
    assert fit(config_of(*sources, "loss.ignore=4", "epochs=1"), Path("run")).steps


def test_a_class_without_an_output_in_an_array_is_named_when_it_is_loaded() -> None:
    tokens = np.random.default_rng(0).integers(0, 8, (60, 6))
    tokens[:, 1] = 8
    np.savez("tokens.npz", input=np.zeros((60, 6), np.int64), next=tokens)
    settings = ("network=py:run_nets:tokens", "data={train: npz:tokens.npz, targets: next}", "loss=next-token")
    with pytest.raises(DataError, match="has next 8, and the network has 8 outputs"):
        fit(config_of(*settings), Path("run"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(DeviceError, match="finds no CUDA device"):
        fit(config_of("device=cuda"), Path("run"))


# Schedules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_a_schedule_rises_to_the_rate_and_falls_to_its_share(name: Any) -> None:
    schedule = Schedule(name=name, warmup=0.2, final=0.1)
    rates = [factor(schedule, step, 50) for step in range(51)]
    assert rates[9] == rates[10] == max(rates) == 1
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[50] == pytest.approx(1 if name == "constant" else 0.1)
    assert min(rates) > 0


def test_a_score_of_a_share_has_an_interval() -> None:
    fit(config_of(), Path("run"))
    found = Result(**json.loads((Path("run") / "result.json").read_text())["report"])
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.value <= found.high
