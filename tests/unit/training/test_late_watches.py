"""What a watch hears late leaves the run as it is without a watch, and the doctor's record as if nothing were late."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer_settling import FAULTS, OPTIMIZERS, POLICIES, Watch, fed, same, trainer_of
from torch import nn
from torch.nn.functional import cross_entropy

from narrowcast.training import StaticScale, Trainer, precision
from narrowcast.training.doctor import replay
from narrowcast.training.doctor.values import EventKind, Part
from narrowcast.training.doctor.watch import Watch as Doctor


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the batch of a number, which FP16 cannot hold where it is one of the faults."""
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(number))
    return inputs * (1e6 if number in FAULTS else 1.0), inputs[:, :3].argmax(1)


class Scaled(nn.Module):
    """A loss with a parameter and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs, targets):
        self.calls += 1
        return cross_entropy(outputs * self.weight, targets)


class Counting(nn.Module):
    """A network that goes by how often it was called, which it keeps as a plain attribute, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.norm = nn.Linear(4, 64), nn.Dropout(0.5), nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 3)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.head(self.norm(self.drop(self.first(x)))) * (1 + 0.1 * self.calls)


def recorded(doctor: Doctor) -> dict[str, Any]:
    """Return what a doctor has seen, to the last number."""
    doctor.close()
    record = doctor.record()
    return {
        "events": [event.model_dump() for event in record.events],
        "readings": str(record.readings),  # a NaN is not equal to itself
        "series": {
            (one.layer, one.part): {name: np.asarray(value).tolist() for name, value in vars(one).items()}
            for one in record.series
        },
    }


@pytest.mark.parametrize("first", [0, 9], ids=["faults", "sound"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_deep_samples_are_those_of_a_run_that_decides_at_once(every, accumulate, first):
    """The scale rises and falls; updates are left out at sampled steps, and at those before them."""
    records, states = [], []
    for late, watched in ((False, True), (True, True), (True, False)):
        trainer = trainer_of(late=late, accumulate=accumulate)
        doctor = Doctor(trainer.model, "deep", every=every, precision=trainer.precision)
        trainer.watch = doctor if watched else None
        for number in range(first, first + 15):
            trainer.step(batch(number))
        trainer.flush()
        states.append(copy.deepcopy(trainer.state_dict()))
        records.append(recorded(doctor))
    at_once, late, _ = records
    sampled = [Part(part) for (layer, part) in at_once["series"] if layer == "second"]
    assert {Part.FORWARD, Part.BACKWARD, Part.GRADIENT, Part.WEIGHT, Part.UPDATE} <= set(sampled)
    assert late["readings"] == at_once["readings"]
    assert late["series"] == at_once["series"]
    assert late["events"] == at_once["events"]
    assert same(states[1], states[0])
    assert same(states[2], states[0])


@pytest.mark.parametrize("late", [False, True], ids=["at-once", "late"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_replay_leaves_no_trace_in_a_loss_with_parameters_or_in_attributes(late, accumulate):
    """Gradients of a replay would be added to those of the window that has begun."""
    states = []
    for watch in ("cheap", None):
        torch.manual_seed(0)
        model, loss = Counting(), Scaled()
        optimizer = OPTIMIZERS["adamw"]([*model.parameters(), *loss.parameters()])
        policy = precision("fp16-mixed", loss_scale=StaticScale(256.0))
        trainer = Trainer(model, optimizer, loss, precision=policy, accumulate=accumulate, watch=watch)
        trainer._settles_late = late
        for number in range(10):
            trainer.step(batch(number))
        states.append(copy.deepcopy(trainer.state_dict()) | {"calls": model.calls})
        assert trainer.skipped == 3
    assert states[0]["calls"] == 10
    assert same(states[1], states[0])


@pytest.mark.parametrize("level", ["cheap", "deep"])
@pytest.mark.parametrize("every", [1, 3])
def test_vanished_gradients_are_explained_by_the_step_that_had_none(level, every):
    records = []
    for late in (False, True):
        trainer = trainer_of("adamw", "static", late=late)
        trainer.loss = lambda outputs, targets: cross_entropy(outputs, targets) * 1e-12
        trainer.watch = doctor = Doctor(
            trainer.model,
            level,
            every=every,
            optimizer=trainer.optimizer,
            loss=trainer.loss,
            precision=trainer.precision,
        )
        for number in (0, 1, 2, 5, 6, 7):
            fed(trainer, number)
        trainer.finish()
        records.append(recorded(doctor))
    (event,) = records[0]["events"]
    step = 1 if (level, every) == ("deep", 1) else 2  # two samples tell of one layer, and three norms of all
    assert (event["kind"], event["step"], event["cause"]["remedies"][0]["mended"]) == (EventKind.VANISHED, step, True)
    assert records[1] == records[0]


class Drawing(nn.Module):
    """Overflows in one of its calls, where it has drawn a number above a half."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x):
        x = self.first(x)
        return self.second(x * torch.where(torch.rand(()) > 0.5, 1e6, 1.0))


def test_a_batch_that_is_given_again_is_run_again_with_the_numbers_of_its_own_step():
    causes = []
    for late in (False, True):
        torch.manual_seed(3)
        model = Drawing()
        policy = precision("fp16-mixed", loss_scale=StaticScale(16.0))
        trainer = Trainer(model, OPTIMIZERS["adamw"](model.parameters()), cross_entropy, precision=policy)
        trainer._settles_late = late
        same_one = torch.ones(6, 4), torch.tensor([0, 1, 2] * 2)
        skipped = [trainer.step(same_one).skipped for _ in range(8)]
        assert True in skipped[:-1]
        assert False in skipped[1:]
        trainer.finish()
        causes.append([(event.step, event.cause and event.cause.operator) for event in trainer.watch.events])
    assert {operator for _, operator in causes[0]} == {"aten.mul"}
    assert causes[1] == causes[0]


@pytest.mark.parametrize("kind", [replay.NoRoomError, torch.OutOfMemoryError], ids=lambda one: one.__name__)
def test_a_replay_without_memory_leaves_the_next_window_as_it_was(kind, monkeypatch):
    def full(scene):
        for one in scene.model.parameters():
            one.grad = torch.ones_like(one)
        raise kind("planted")

    monkeypatch.setattr(replay, "_run", full)
    states = []
    for watch in ("cheap", None):
        trainer = trainer_of(late=True, watch=watch, accumulate=2)
        for number in range(10):
            trainer.step(batch(number))
        states.append(copy.deepcopy(trainer.state_dict()))
        assert trainer.skipped == 3
        if watch is not None:
            assert {event.cause.seen for event in trainer.watch.events} == {
                "the replay did not fit the device's memory beside the run"
            }
    assert same(states[1], states[0])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_no_batch_of_a_window_is_kept_once_a_watch_has_heard_of_its_update(accumulate):
    trainer = trainer_of(late=True, watch="deep", accumulate=accumulate)
    kept = []
    for number in range(4 * accumulate):
        inputs, targets = batch(number)
        trainer.step((inputs, targets))
        kept.append(weakref.ref(inputs))
    del inputs
    trainer.step(batch(0))
    gc.collect()
    assert [one() for one in kept] == [None] * len(kept)


@pytest.mark.parametrize("after", [None, "another"])
def test_a_watch_that_goes_hears_of_the_update_that_it_saw_begin_and_the_next_one_does_not(after):
    trainer = trainer_of(late=True, watch="cheap")
    fed(trainer, 0)
    before = trainer.watch
    assert not before.record().readings
    trainer.watch = None if after is None else Doctor(trainer.model, precision=trainer.precision)
    assert [one.step for one in before.record().readings] == [0]
    later = trainer.watch
    fed(trainer, 1)
    trainer.finish()
    assert [one.step for one in before.record().readings] == [0]
    assert later is None or [one.step for one in later.record().readings] == [1]


def test_a_watch_that_comes_after_an_update_that_was_left_out_counts_the_updates_that_were_made():
    trainer = trainer_of(late=True)
    for number in (0, 3):
        trainer.step(batch(number))
    trainer.watch = doctor = Doctor(trainer.model, precision=trainer.precision)
    for number in (1, 2):
        trainer.step(batch(number))
    trainer.finish()
    assert [one.step for one in doctor.record().readings] == [1, 2]


def test_a_model_without_parameters_is_watched_by_the_steps_of_its_loss():
    loss = Scaled()
    optimizer = OPTIMIZERS["adamw"](loss.parameters())
    trainer = Trainer(nn.Identity(), optimizer, loss, precision=POLICIES["static"](), watch="cheap")
    for _ in range(3):
        trainer.step((torch.randn(6, 3), torch.tensor([0, 1, 2] * 2)))
    trainer.finish()
    assert [one.step for one in trainer.watch.record().readings] == [0, 1, 2]


@pytest.mark.parametrize(
    "place", ["forward", "backward", "before_forward", "after_backward", "after_update", "on_nonfinite"]
)
@pytest.mark.parametrize(
    "error", [ZeroDivisionError, KeyboardInterrupt, torch.OutOfMemoryError], ids=lambda one: one.__name__
)
def test_after_an_error_anywhere_a_run_goes_on_as_one_that_decides_at_once(place, error):
    """What was under way when it came is dropped; the watch hears of each update once."""
    runs = []
    for late in (False, True):
        watch = Hearing(place, error)
        trainer = trainer_of(late=late, watch=watch)
        broke = 0
        for number in range(10):
            trainer.model.register_forward_pre_hook(watch.forward) if not number else None
            watch.number = number
            trainer.loss = watch.loss
            try:
                fed(trainer, number)
                if number == 6:
                    trainer.finish()
            except error:
                broke += 1
                trainer.discard()
        trainer.finish()
        assert broke == 1
        runs.append((trainer.steps + trainer.skipped, watch.heard))
    assert len(runs[1][1]) == runs[1][0] - (place in ("after_update", "on_nonfinite"))
    assert [what for what, _ in runs[1][1]].count("left out") == trainer.skipped - (place == "on_nonfinite")


class Hearing(Watch):
    """A watch that writes down what became of updates; at one place an error comes, once."""

    def __init__(self, place: str, error: type[BaseException]) -> None:
        self.place, self.error, self.number, self.fallen = place, error, 0, False
        self.heard: list[tuple[str, int]] = []

    def at(self, place: str) -> None:
        if place == self.place and self.number >= 5 - (place == "on_nonfinite") and not self.fallen:
            self.fallen = True
            raise self.error("planted")

    def forward(self, *given) -> None:
        self.at("forward")

    def loss(self, outputs, targets):
        if outputs.requires_grad:
            outputs.register_hook(lambda grad: self.at("backward"))
        return cross_entropy(outputs, targets)

    def before_forward(self, trainer_step, batch) -> None:
        self.at("before_forward")

    def after_backward(self, model, scale) -> None:
        self.at("after_backward")

    def after_update(self, model, info) -> None:
        self.at("after_update")
        self.heard.append(("made", info.step))

    def on_nonfinite(self, broken) -> None:
        self.at("on_nonfinite")
        self.heard.append(("left out", broken.step))
