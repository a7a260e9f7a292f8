"""Planted faults: each is found, named (layer, pass, step), and mended by what the doctor recommends."""

from __future__ import annotations

import pytest
import torch
from doctor_models import (
    Attention,
    DelayedLinear,
    HalfNorm,
    Logarithm,
    Stretched,
    squares,
    watched,
)
from torch import nn

from narrowcast.errors import TrainingError
from narrowcast.training import precision
from narrowcast.training.doctor import replay
from narrowcast.training.doctor.cause import explain_vanishing
from narrowcast.training.doctor.replay import Scene
from narrowcast.training.doctor.values import EventKind, Part


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def the_fault(doctor, kind):
    """Return the one event that is not normal."""
    faults = [event for event in doctor.events if not event.normal]
    assert [event.kind for event in faults] == [kind]
    event = faults[0]
    assert event.cause is not None
    assert not doctor.close().verdict.healthy
    assert event.sentence in doctor.close().verdict.sentences[0]
    return event


def named(event, *, layer, part, step):
    cause = event.cause
    assert (cause.layer, cause.part, cause.step, cause.rank) == (layer, part, step, 0)
    assert f"Step {step}, rank 0" in event.sentence
    assert (repr(layer) if layer else "the model's own code") in event.sentence or layer == "data"
    return cause


def mended_by(cause, kind):
    assert kind in {remedy.kind for remedy in cause.mends}, cause.remedies


def test_an_activation_overflows_fp16():
    model = Stretched(1.0)
    trainer, doctor = watched(model, squares, policy=precision("fp16-mixed", loss_scale=1024.0))
    batches = [(torch.randn(4, 8), torch.randn(4, 2)) for _ in range(4)]
    for batch in batches[:3]:
        assert not trainer.step(batch).skipped
    model.factor = 3e5
    weights = [one.clone() for one in model.parameters()]
    assert trainer.step(batches[3]).skipped
    event = the_fault(doctor, EventKind.NONFINITE)
    cause = named(event, layer="", part=Part.FORWARD, step=3)  # the model's own code multiplies
    assert cause.operator == "aten.mul"
    mended_by(cause, "format")
    assert all(torch.equal(one, two) for one, two in zip(weights, model.parameters(), strict=True))


def test_a_product_overflows_fp16_and_the_recommended_override_mends_the_run():
    def stretched(**overrides):
        torch.manual_seed(1)
        model = Stretched(2000.0)
        nn.init.constant_(model.second.weight, 20.0)
        policy = precision("fp16-mixed", loss_scale=1.0, overrides=overrides)
        trainer, doctor = watched(model, squares, policy=policy)
        return trainer.step((torch.randn(4, 8) * 4, torch.randn(4, 2))), doctor

    info, doctor = stretched()
    assert info.skipped
    cause = named(the_fault(doctor, EventKind.NONFINITE), layer="second", part=Part.FORWARD, step=0)
    assert (cause.operator, cause.kind) == ("aten.addmm", "inf")
    override = next(remedy.overrides for remedy in cause.mends if remedy.overrides)
    assert override == {"second": "fp32"}
    info, doctor = stretched(**override)
    assert info.updated
    assert doctor.close().verdict.healthy


def test_gradients_vanish_below_the_smallest_number():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    trainer, doctor = watched(model, lambda o, t: squares(o, t) * 1e-8, policy=precision("fp16-mixed", loss_scale=1.0))
    for _ in range(4):
        trainer.step((torch.randn(4, 8), torch.randn(4, 2)))
    cause = named(the_fault(doctor, EventKind.VANISHED), layer="2", part=Part.BACKWARD, step=2)
    assert cause.kind == "zero"
    mended_by(cause, "scale")


def test_a_softmax_without_its_maximum():
    model = nn.Sequential(nn.Linear(8, 8), Attention(), nn.Linear(8, 2))
    trainer, doctor = watched(model, squares)
    trainer.step((torch.randn(2, 5, 8), torch.randn(2, 5, 2)))
    with pytest.raises(TrainingError):
        trainer.step((torch.randn(2, 5, 8) * 60, torch.randn(2, 5, 2)))
    cause = named(the_fault(doctor, EventKind.NONFINITE), layer="1", part=Part.FORWARD, step=1)
    assert cause.operator == "aten.exp"
    mended_by(cause, "maximum")
    assert {remedy.kind for remedy in cause.mends} == {"maximum"}


def test_a_layer_norm_whose_epsilon_is_lost():
    model = nn.Sequential(nn.Linear(8, 8), HalfNorm(), nn.Linear(8, 2))
    nn.init.zeros_(model[0].weight)
    nn.init.constant_(model[0].bias, 0.5)
    trainer, doctor = watched(model, squares, policy=precision("fp16-mixed", loss_scale=1.0))
    assert trainer.step((torch.randn(4, 8), torch.randn(4, 2))).skipped
    event = the_fault(doctor, EventKind.NONFINITE)
    cause = named(event, layer="1", part=Part.FORWARD, step=0)
    assert cause.operator == "aten.rsqrt"
    assert "the epsilon 1e-08 is zero in fp16" in event.sentence
    mended_by(cause, "epsilon")


def test_a_logarithm_of_zero():
    model = nn.Sequential(nn.Linear(8, 8), Logarithm())
    trainer, doctor = watched(model, lambda outputs, targets: outputs.mean())
    with pytest.raises(TrainingError):
        trainer.step((torch.randn(4, 8), None))
    cause = named(the_fault(doctor, EventKind.NONFINITE), layer="1", part=Part.FORWARD, step=0)
    assert (cause.operator, cause.kind) == ("aten.log", "inf")
    mended_by(cause, "epsilon")


@pytest.mark.parametrize("update", ["plain", "kahan", "stochastic"])
def test_bf16_weights_stop_moving(update):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    with torch.no_grad():
        for one in model.parameters():
            one.fill_(1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    policy = precision("bf16-true", update=update)
    trainer, doctor = watched(model, squares, policy=policy, optimizer=optimizer, every=4)
    states = None
    for _ in range(18):
        trainer.step((torch.randn(4, 64), torch.randn(4, 2)))
        states = {name: value.clone() for name, value in optimizer.state[model[0].weight].items()}
    if update != "plain":
        assert doctor.close().verdict.healthy
        return
    event = the_fault(doctor, EventKind.STAGNATION)
    assert 0 < event.step < 18  # as soon as enough was seen
    cause = named(event, layer="0", part=Part.UPDATE, step=event.step)
    assert cause.kind == "stagnant"
    assert "Adam.step" in cause.operator
    kinds = {remedy.setting.split()[0]: remedy.mended for remedy in cause.remedies}
    assert kinds == {"stochastic": True, "Kahan": True, "FP32": True, "round-to-nearest": False}
    assert all(torch.equal(value, optimizer.state[model[0].weight][name]) for name, value in states.items())


def test_a_stale_scale_of_fp8():
    model = nn.Sequential(nn.Linear(8, 8), DelayedLinear(8, 8), nn.Linear(8, 2))
    trainer, doctor = watched(model, squares, level="deep", every=2)
    for factor in (0.2, 0.2, 50.0):
        trainer.step((torch.randn(4, 8) * factor, torch.randn(4, 2)))
    event = the_fault(doctor, EventKind.SATURATION)
    cause = named(event, layer="1", part=Part.FORWARD, step=2)
    assert "the end of e4m3fn" in event.sentence
    mended_by(cause, "fresh scale")


def test_a_nan_in_the_data():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    trainer, doctor = watched(model, squares)
    trainer.step((torch.randn(4, 8), torch.randn(4, 2)))
    inputs = torch.randn(4, 8)
    inputs[2, 5] = torch.nan
    with pytest.raises(TrainingError):
        trainer.step((inputs, torch.randn(4, 2)))
    event = the_fault(doctor, EventKind.DATA)
    cause = named(event, layer="data", part=Part.FORWARD, step=1)
    assert cause.samples == (2,)
    assert "in sample 2" in event.sentence
    mended_by(cause, "data")


def test_a_nan_in_named_inputs_and_targets_is_told_by_its_name():
    class Named(nn.Linear):
        def forward(self, image, weight):
            return super().forward(image) * weight

    model = Named(8, 2)
    inputs = {"image": torch.randn(4, 8), "weight": torch.ones(4, 1)}
    inputs["weight"][3] = torch.inf
    trainer, doctor = watched(model, squares, policy="bf16-mixed")
    with pytest.raises(TrainingError):
        trainer.step((inputs, torch.randn(4, 2)))
    assert "inputs['weight']" in the_fault(doctor, EventKind.DATA).sentence


def test_a_scale_that_is_too_high_to_begin_with_is_named_in_the_backward_pass():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    trainer, doctor = watched(model, squares, policy=precision("fp16-mixed", loss_scale=2.0**24))
    assert trainer.step((torch.randn(4, 8), torch.randn(4, 2))).skipped
    event = the_fault(doctor, EventKind.NONFINITE)
    assert event.cause.part is Part.BACKWARD
    mended_by(event.cause, "scale")


class Small(nn.Module):
    """Two linear layers side by side; what comes from the first is so small that FP16 loses its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.lost, self.kept = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.kept(x) + self.lost(x) * 1e-9


class Adapted(nn.Module):
    """Layers that have no gradient by design: an adapter that begins at zero, and a branch that is switched off."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 8)
        nn.init.zeros_(self.up.weight)
        self.up.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x)) * 0.0


@pytest.mark.parametrize("level", ["cheap", "deep"])
def test_one_layer_whose_gradients_vanish_is_told_from_those_without(level):
    model = nn.Sequential(nn.Linear(8, 8), Adapted(), Small(), nn.Linear(8, 2))
    policy = precision("fp16-mixed", loss_scale=1.0)
    trainer, doctor = watched(model, squares, policy=policy, level=level, every=24)
    for _ in range(75):
        trainer.step((torch.randn(4, 8), torch.randn(4, 2)))
    (event,) = [event for event in doctor.events if not event.normal]
    assert event.kind is EventKind.VANISHED
    assert (event.cause.part, event.cause.layer, event.cause.operator) == (Part.BACKWARD, "2.lost", "aten.mul")
    assert "2.lost.bias, 2.lost.weight get no gradient" in event.sentence
    mended_by(event.cause, "scale")


class Laundered(nn.Module):
    """Infinities that are replaced, so that no loss or gradient shows them."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.factor = factor

    def forward(self, x):
        return torch.nan_to_num(self.linear(x) * self.factor * self.factor) / self.factor / self.factor


@pytest.mark.parametrize(("policy", "factor", "end"), [("fp16-mixed", 1e3, "float16"), ("fp32", 1e20, "float32")])
def test_infinities_that_are_replaced_are_followed_to_where_they_came_from(policy, factor, end):
    model = nn.Sequential(nn.Linear(8, 8), Laundered(factor), nn.Linear(8, 2))
    policy = precision(policy, loss_scale=8.0) if policy == "fp16-mixed" else policy
    trainer, doctor = watched(model, squares, policy=policy, level="deep", every=2)
    for _ in range(3):
        assert trainer.step((torch.randn(4, 8), torch.randn(4, 2))).updated
    event = the_fault(doctor, EventKind.SATURATION)
    cause = named(event, layer="1", part=Part.FORWARD, step=0)
    assert cause.operator == "aten.nan_to_num"
    assert f"the end of {end}" in event.sentence
    assert "the infinities come from aten.mul in layer '1'" in event.sentence
    assert not cause.remedies  # no scale brings back what is infinite


class Masked(nn.Module):
    """Infinities that the program itself writes, and replaces."""

    def forward(self, x):
        hidden = torch.nan_to_num(x.masked_fill(x > 1, -torch.inf), neginf=-1e4)
        return torch.softmax(hidden.masked_fill(x < -1, -torch.inf).clamp(min=torch.finfo(torch.float16).min), -1)


def test_infinities_of_masks_hide_nothing():
    model = nn.Sequential(nn.Linear(8, 8), Masked(), nn.Linear(8, 2))
    trainer, doctor = watched(model, squares, level="deep", every=1)
    for _ in range(4):
        trainer.step((torch.randn(4, 8) * 4, torch.randn(4, 2)))
    assert doctor.close().verdict.healthy


def test_of_several_faults_the_first_is_named():
    model = nn.Sequential(nn.Linear(8, 8), Stretched(1e6), nn.Linear(2, 8), Logarithm())
    policy = precision("fp16-mixed", loss_scale=1.0)
    trainer, doctor = watched(model, lambda outputs, targets: outputs.mean(), policy=policy)
    assert trainer.step((torch.randn(4, 8), None)).skipped
    event = the_fault(doctor, EventKind.NONFINITE)
    cause = named(event, layer="1", part=Part.FORWARD, step=0)
    assert cause.operator == "aten.mul"
    assert not cause.mends  # the logarithm breaks, whatever is done to the layer before


def test_a_product_of_nested_blocks_that_overflows_fp32_asks_for_smaller_weights():
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(8) * 50)

        def forward(self, x):
            for _ in range(60):
                x = x @ self.weight
            return x

    model = nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({"inner": Repeated()})["inner"], nn.Linear(8, 2))
    trainer, doctor = watched(model, squares)
    with pytest.raises(TrainingError):
        trainer.step((torch.randn(4, 8), torch.randn(4, 2)))
    cause = named(the_fault(doctor, EventKind.NONFINITE), layer="1", part=Part.FORWARD, step=0)
    assert cause.call > 0
    mended_by(cause, "initialisation")


@pytest.mark.parametrize(("rate", "kahan"), [(1e-4, True), (1e-6, False)])
def test_kahan_sums_mend_updates_that_16_bits_beside_the_weights_can_hold(rate, kahan):
    model = nn.Linear(64, 64)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    policy = precision("bf16-true", update="plain")
    trainer, doctor = watched(model, squares, policy=policy, optimizer=optimizer, every=4)
    for _ in range(8):
        trainer.step((torch.randn(4, 64), torch.randn(4, 64)))
    cause = the_fault(doctor, EventKind.STAGNATION).cause
    assert {remedy.setting.split()[0]: remedy.mended for remedy in cause.remedies} == {
        "stochastic": True,
        "Kahan": kahan,
        "FP32": True,
        "round-to-nearest": False,
    }


def test_a_layer_is_explained_though_one_of_its_parameters_never_has_a_gradient():
    model = nn.Linear(4, 2)
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    batch = (torch.randn(5, 4), torch.randn(5, 2))
    scene = Scene(model, lambda out, _: (out * 0).sum(), batch, precision("fp32"))
    cause = explain_vanishing(scene, ["weight", "bias", "unused"])
    assert cause is not None
    assert cause.kind == "zero"
    assert "unused" in cause.seen
    assert explain_vanishing(scene.but(loss=lambda out, _: out.sum()), ["weight", "bias", "unused"]) is None


def test_a_replay_that_does_not_fit_the_memory_ends_no_run(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(replay, "_run", full)
    model = nn.Sequential(nn.Linear(8, 8), DelayedLinear(8, 8), nn.Linear(8, 2))
    trainer, doctor = watched(model, squares, level="deep", every=2)
    for factor in (0.2, 0.2, 50.0):
        trainer.step((torch.randn(4, 8) * factor, torch.randn(4, 2)))
    assert not the_fault(doctor, EventKind.SATURATION).cause.reproduced
    cause = explain_vanishing(Scene(model, squares, (torch.randn(4, 8), torch.randn(4, 2)), precision("fp32")))
    assert cause is not None
    assert "did not fit the device's memory" in cause.seen
    assert not cause.mends

    trainer, doctor = watched(Stretched(1.0), squares, policy="fp16-mixed")
    assert trainer.step((torch.full((4, 8), 1e6), torch.randn(4, 2))).skipped
    assert "did not fit the device's memory" in the_fault(doctor, EventKind.NONFINITE).sentence
