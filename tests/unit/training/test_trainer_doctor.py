"""The doctor that a trainer has by itself: there unless it is told not to be, bounded, and in nobody's way."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from narrowcast.training import Trainer
from narrowcast.training import trainer as trainers
from narrowcast.training.doctor import journal
from narrowcast.training.doctor.journal import Journal
from narrowcast.training.doctor.values import Reading, Setting

SETTING = Setting(level="cheap", every=50, precision="fp32", compute="fp32", formats=("fp16",), layers=(), world=1)


def trained(steps: int = 6, **settings) -> tuple[Trainer, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3))
    trainer = Trainer(model, torch.optim.AdamW(model.parameters(), lr=1e-2), cross_entropy, **settings)
    inputs = torch.randn(8, 4)
    for _ in range(steps):
        trainer.step((inputs, inputs[:, :3].argmax(1)))
    return trainer, [*model.parameters(), *model.buffers()]


def test_it_is_there_and_changes_no_bit():
    watched, weights = trained()
    alone, others = trained(watch=None)
    assert alone.watch is None
    assert [reading.step for reading in watched.watch.record().readings] == list(range(6))
    assert watched.watch.summary().verdict.sentences == (
        "Healthy: 6 steps, every loss and gradient that was used is finite.",
    )
    assert all(torch.equal(one, other) for one, other in zip(weights, others, strict=True))


def test_what_it_keeps_of_a_long_run_is_bounded(monkeypatch):
    monkeypatch.setattr(journal, "_KEPT", 4)
    trainer, _ = trained(steps=9)
    assert [reading.step for reading in trainer.watch.record().readings] == [5, 6, 7, 8]
    assert "9 steps" in trainer.watch.summary().verdict.sentences[0]


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([0, 1, 2, 1, 2, 3], "Healthy: 4 steps"),
        ([2, 3, 4], "Of the run's 5 steps 2 have no record: it lacks those from 0 on and goes on at step 2"),
        ([0, 3, 1, 6], "Of the run's 7 steps 3 have no record: it lacks those from 2 on and goes on at step 3"),
        (
            [4, 0, 2, 3, 1, 9, 0],
            "Of the run's 10 steps 4 have no record: it lacks those from 5 on and goes on at step 9",
        ),
        ([], "Healthy: 0 steps"),
    ],
)
def test_steps_without_a_record_are_told_however_few_readings_are_kept(steps, said, monkeypatch):
    monkeypatch.setattr(journal, "_KEPT", 2)
    kept = Journal(SETTING, None, 0)
    for step in steps:
        kept.keep(Reading(step=step, loss=1.0))
        kept.keep(Reading(step=step + 20, skipped=True))
    assert len(kept.readings) == min(2, 2 * len(steps))
    assert any(sentence.startswith(said) for sentence in kept.summary().verdict.sentences)


def test_it_stays_away_from_processes_that_the_trainer_is_not_told_of(monkeypatch, caplog):
    monkeypatch.setattr(trainers, "processes", lambda: 2)
    with caplog.at_level(logging.INFO, logger="narrowcast.training"):
        assert trained()[0].watch is None
    assert "the process group has 2 members, and the trainer's ranks 1" in caplog.text


class Turned(nn.Module):
    """Has a parameter of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head((x * self.turn).real)


class Whole(nn.Module):
    """A loss that holds all there is to train."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, outputs, targets):
        return cross_entropy(self.head(outputs), targets)


@pytest.mark.parametrize(
    ("model", "loss"),
    [(Turned, lambda: cross_entropy), (nn.Identity, Whole), (lambda: nn.Linear(3, 3).double(), lambda: cross_entropy)],
    ids=["complex", "loss-alone", "float64"],
)
@pytest.mark.parametrize("fault", [1.0, float("inf")], ids=["sound", "broken"])
def test_it_is_in_no_unusual_model_s_way(model, loss, fault):
    model, loss = model(), loss()
    own = [*model.parameters(), *(loss.parameters() if isinstance(loss, nn.Module) else ())]
    inputs = torch.randn(5, 3, dtype=own[0].dtype if own[0].is_floating_point() else torch.float32)
    for watch in ("cheap", None):
        trainer = Trainer(model, torch.optim.SGD(own, lr=0.1), loss, nonfinite="skip", watch=watch)
        infos = [trainer.step((inputs * factor, inputs.argmax(1))) for factor in (1.0, fault, 1.0, 1.0, 1.0, 1.0)]
        assert [info.updated for info in infos] == [True, fault == 1.0, True, True, True, True]
