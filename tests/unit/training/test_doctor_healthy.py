"""Healthy runs are called healthy, whatever the model and the precision; early skips of a dynamic scale are normal."""

from __future__ import annotations

import pytest
import torch
from doctor_models import healthy, squares, watched
from torch import nn

from narrowcast.training import DynamicScale, precision
from narrowcast.training.doctor.record import read
from narrowcast.training.doctor.values import EventKind, Part
from narrowcast.training.float8 import Float8


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.mark.parametrize("level", ["cheap", "deep"])
@pytest.mark.parametrize("policy", ["fp32", "bf16-mixed", "fp16-mixed"])
@pytest.mark.parametrize("name", ["cnn", "transformer", "lstm"])
def test_a_healthy_run_is_called_healthy(name, policy, level):
    model, loss, batch = healthy(name)
    if (name, policy) == ("lstm", "fp16-mixed"):  # PyTorch has no LSTM in FP16 on the CPU
        policy = precision(policy, overrides={"cells": "fp32"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer, doctor = watched(model, loss, policy=policy, optimizer=optimizer, level=level, every=5, clip_norm=1.0)
    for _ in range(12):
        trainer.step(batch)
    summary = doctor.close()
    assert summary.verdict.healthy, summary.verdict.sentences
    assert not [event for event in doctor.events if not event.normal]
    assert all(series.total.sum() for series in doctor.record().series)


@pytest.mark.parametrize("level", ["cheap", "deep"])
@pytest.mark.parametrize("name", ["cnn", "transformer", "lstm", "embedding", "experts"])
def test_a_scale_that_grows_and_falls_in_turn_is_healthy(name, level):
    model, loss, batch = healthy(name)
    overrides = {"cells": "fp32"} if name == "lstm" else {}
    policy = precision("fp16-mixed", loss_scale=DynamicScale(initial=2.0**20, interval=7), overrides=overrides)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer, doctor = watched(model, loss, policy=policy, optimizer=optimizer, level=level, every=10, clip_norm=1.0)
    skips = sum(trainer.step(batch).skipped for _ in range(60))
    assert skips > 4
    assert [event.kind for event in doctor.events] == [EventKind.BACKOFF] * skips
    summary = doctor.close()
    assert summary.verdict.healthy, summary.verdict.sentences


@pytest.mark.slow
def test_fp8_products_of_torchao_are_healthy():
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    policy = precision("fp8-mixed", float8=Float8(emulate=True))
    trainer, doctor = watched(model, squares, policy=policy, level="deep", every=2)
    for _ in range(5):
        trainer.step((torch.randn(32, 32), torch.randn(32, 32)))
    summary = doctor.close()
    assert summary.verdict.healthy, summary.verdict.sentences
    assert doctor.record().of("1", Part.BACKWARD).steps.tolist() == [0, 2, 4]


def test_the_back_off_of_a_dynamic_scale_is_normal():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    policy = precision("fp16-mixed", loss_scale=DynamicScale(initial=2.0**22))
    trainer, doctor = watched(model, squares, policy=policy)
    skipped = sum(trainer.step((torch.randn(4, 8), torch.randn(4, 2))).skipped for _ in range(20))
    assert 0 < skipped < 10
    assert [event.kind for event in doctor.events] == [EventKind.BACKOFF] * skipped
    verdict = doctor.close().verdict
    assert verdict.healthy
    assert f"{skipped} steps were left out while the dynamic loss scale was being found: normal." in verdict.sentences


def test_a_dynamic_scale_that_never_settles_is_no_back_off():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    policy = precision("fp16-mixed", loss_scale=DynamicScale(initial=2.0**20, interval=1, growth=4, backoff=0.25))
    trainer, doctor = watched(model, squares, policy=policy)
    for _ in range(180):
        trainer.step((torch.randn(4, 8), torch.randn(4, 2)))
    assert not doctor.close().verdict.healthy
    assert {event.kind for event in doctor.events} == {EventKind.BACKOFF, EventKind.NONFINITE}


def test_what_was_written_is_read_back(tmp_path):
    model, loss, batch = healthy("cnn")
    trainer, doctor = watched(model, loss, policy="fp16-mixed", level="deep", every=3, folder=tmp_path / "doctor")
    for _ in range(8):
        trainer.step(batch)
    summary = doctor.close()
    found, kept = read(tmp_path), doctor.record()
    assert found.setting == kept.setting
    assert found.readings == kept.readings
    assert found.events == kept.events
    assert found.summary == summary
    assert len(found.series) == len(kept.series) > 0
    for one, other in zip(found.series, kept.series, strict=True):
        assert (one.layer, one.part) == (other.layer, other.part)
        for name in ("steps", "scales", "columns", "largest", "total"):
            assert (getattr(one, name) == getattr(other, name)).all()
    deep = found.of("features.0", Part.FORWARD)
    assert deep is not None
    assert deep.steps.tolist() == [0, 3, 6]
    assert int(deep.columns[0].sum()) == 16 * 8 * 8 * 8


def test_a_resumed_run_goes_on_in_its_record(tmp_path):
    model, loss, batch = healthy("cnn")
    folder = tmp_path / "doctor"
    trainer, doctor = watched(model, loss, level="deep", every=2, folder=folder)
    for _ in range(6):
        trainer.step(batch)
    doctor.close()
    with (folder / "record.jsonl").open("a") as file:
        file.write('{"type": "rea')  # killed while it wrote
    again, resumed = watched(model, loss, level="deep", every=2, folder=folder)
    state = trainer.state_dict()
    again.load_state_dict({**state, "counters": {**state["counters"], "steps": 4}})
    for _ in range(4):
        again.step(batch)
    summary = resumed.close()
    found = read(tmp_path)
    assert [one.step for one in found.readings] == list(range(8))
    assert "8 steps" in summary.verdict.sentences[0]
    assert found.of("head", Part.FORWARD).steps.tolist() == [0, 2, 4, 6]
