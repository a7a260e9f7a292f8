"""Numbers that are not finite: what is left out, what is seen of it, and what does not move."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from narrowcast.errors import OutputError, TrainingError
from narrowcast.training import DynamicScale, StaticScale, Trainer, precision
from narrowcast.training.fused import FusedAdamW
from narrowcast.training.ledger import Ledger, Skip

OPTIMIZERS = {
    "plain": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "own": lambda params: FusedAdamW(params, lr=1e-2),
}


class Faulty(nn.Module):
    """Multiplies the gradient of its input with a number that is set from outside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.fault: float | None = None

    def forward(self, x):
        x = self.second(torch.relu(self.first(x)))
        if self.fault is not None:
            x = Broken.apply(x, self.fault)
        return self.head(torch.relu(x))


class Broken(torch.autograd.Function):
    """Passes numbers on, and adds a fault to their gradient."""

    @staticmethod
    def forward(ctx, x, fault):
        ctx.fault = fault
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + ctx.fault, None


BATCH = (torch.linspace(-1, 1, 24).reshape(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))


def trainer_of(optimizer: str = "plain", scale=None, **settings) -> Trainer:
    model = Faulty()
    made = OPTIMIZERS[optimizer](model.parameters())
    policy = precision("fp16-mixed", loss_scale=scale or DynamicScale(initial=256.0))
    return Trainer(model, made, cross_entropy, precision=policy, clip_norm=1.0, **settings)


def states(trainer: Trainer) -> list[torch.Tensor]:
    """Return copies of all that an update moves."""
    held = [one.detach().clone() for one in trainer.model.parameters()]
    for state in trainer.optimizer.state.values():
        held += [one.clone() for one in state.values() if isinstance(one, torch.Tensor)]
    return held


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skip_moves_nothing_but_the_scale(optimizer):
    trainer = trainer_of(optimizer)
    trainer.schedule = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.5)
    trainer.step(BATCH)
    before, rate = states(trainer), trainer.optimizer.param_groups[0]["lr"]
    trainer.model.fault = float("inf")
    info = trainer.step(BATCH)
    assert (info.skipped, info.updated, info.scale, info.step) == (True, False, 256.0, 1)
    assert (trainer.steps, trainer.skipped, trainer.scale) == (1, 1, 128.0)
    assert trainer.optimizer.param_groups[0]["lr"] == rate
    assert all(torch.equal(old, new) for old, new in zip(before, states(trainer), strict=True))
    assert all(one.grad is None for one in trainer.model.parameters())
    trainer.model.fault = None
    assert trainer.step(BATCH).updated
    assert trainer.steps == 2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("fault", "kind"), [(float("inf"), "inf"), (float("nan"), "nan")])
def test_the_ledger_names_the_layer_nearest_to_the_loss_and_tells_inf_from_nan(optimizer, fault, kind):
    trainer = trainer_of(optimizer)
    trainer.step(BATCH)
    trainer.model.fault = fault
    trainer.step(BATCH)
    (skip,) = trainer.ledger
    assert (skip.step, skip.attempt, skip.rank, skip.scale) == (1, 1, 0, 256.0)
    assert skip.layers[0] == "second.bias"
    assert set(skip.layers) == {"second.bias", "second.weight", "first.bias", "first.weight"}
    assert skip.kind == kind
    assert trainer.step(BATCH).skipped
    assert [one.attempt for one in trainer.ledger] == [1, 2]


def test_a_skip_is_logged_with_the_layer(caplog):
    trainer = trainer_of()
    trainer.model.fault = float("inf")
    with caplog.at_level(logging.WARNING, logger="narrowcast.training"):
        trainer.step(BATCH)
    assert "update 0 left out: inf in the gradient of second.bias; loss scale 256 -> 128" in caplog.text


def test_the_ledger_writes_lines(tmp_path):
    trainer = trainer_of()
    trainer.ledger.write_to(tmp_path / "skips.jsonl")
    trainer.model.fault = float("nan")
    trainer.step(BATCH)
    trainer.step(BATCH)
    lines = [json.loads(line) for line in (tmp_path / "skips.jsonl").read_text().splitlines()]
    assert [line["attempt"] for line in lines] == [0, 1]
    assert lines[0]["layers"][0] == "second.bias"
    assert lines[1]["scale"] == 128.0


def test_of_many_skips_the_latest_are_kept_in_memory_and_all_in_the_file(tmp_path):
    ledger = Ledger()
    ledger.write_to(tmp_path / "skips.jsonl")
    for step in range(5000):
        ledger.add(Skip(step, step, 0, ("head.bias",), "inf", 8.0))
    assert [skip.step for skip in ledger] == list(range(5000 - 4096, 5000))
    assert (len(ledger), ledger[0].step, ledger[-1].step) == (4096, 904, 4999)
    lines = (tmp_path / "skips.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(5000))


def test_a_ledger_that_cannot_be_written_says_so(tmp_path):
    trainer = trainer_of()
    trainer.ledger.write_to(tmp_path / "missing" / "skips.jsonl")
    trainer.model.fault = float("nan")
    with pytest.raises(OutputError, match="skip ledger"):
        trainer.step(BATCH)


def test_an_overflow_of_the_loss_alone_is_a_skip_too():
    trainer = trainer_of()
    finite = torch.tensor(1e30)

    def loss(outputs, targets):
        return cross_entropy(outputs, targets) + (finite * finite - finite).detach()

    trainer.loss = loss
    assert trainer.step(BATCH).skipped
    assert trainer.ledger[0].layers == ()
    assert trainer.ledger[0].kind == "inf"


def test_one_overflow_in_a_window_leaves_the_whole_window_out_and_the_scale_stays_within_it():
    trainer = trainer_of(accumulate=3)
    scales = []
    for fault in (None, float("inf"), None):
        trainer.model.fault = fault
        info = trainer.step(BATCH)
        scales.append(info.scale)
    assert info.skipped
    assert scales == [256.0] * 3
    assert trainer.scale == 128.0
    for _ in range(3):
        info = trainer.step(BATCH)
    assert info.updated


def test_hysteresis_leaves_the_scale_as_it_is_at_first():
    trainer = trainer_of(scale=DynamicScale(initial=256.0, hysteresis=2))
    trainer.model.fault = float("inf")
    trainer.step(BATCH)
    assert trainer.scale == 256.0
    trainer.step(BATCH)
    assert trainer.scale == 128.0


@pytest.mark.parametrize(
    ("scale", "steps"),
    [(DynamicScale(initial=4.0, floor=2.0, patience=3), 4), (StaticScale(4.0, patience=3), 3)],
    ids=["dynamic", "static"],
)
def test_it_gives_up_when_the_scale_has_no_answer_left(scale, steps):
    trainer = trainer_of(scale=scale)
    trainer.model.fault = float("nan")
    for _ in range(steps - 1):
        trainer.step(BATCH)
    with pytest.raises(TrainingError, match=r"3 updates in a row .* \(nan in the gradient of second.bias") as error:
        trainer.step(BATCH)
    assert "overrides={'second': 'fp32'}" in error.value.next_step
    assert trainer.skipped == steps


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("policy", ["fp32", "bf16-mixed"])
def test_without_a_scale_it_stops_before_the_weights_are_harmed(optimizer, policy):
    model = Faulty()
    trainer = Trainer(model, OPTIMIZERS[optimizer](model.parameters()), cross_entropy, precision=policy)
    trainer.step(BATCH)
    before = states(trainer)
    model.fault = float("nan")
    with pytest.raises(TrainingError, match=f"update 1 is not finite, in precision {policy}; .*second.bias"):
        trainer.step(BATCH)
    assert all(torch.equal(old, new) for old, new in zip(before, states(trainer), strict=True))


@pytest.mark.parametrize("policy", ["fp32", "bf16-true"])
def test_without_a_scale_it_leaves_them_out_when_told_to(policy):
    model = Faulty()
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = Trainer(model, optimizer, cross_entropy, precision=policy, nonfinite="skip")
    trainer.step(BATCH)
    before = states(trainer)
    model.fault = float("nan")
    assert trainer.step(BATCH).skipped
    assert all(torch.equal(old, new) for old, new in zip(before, states(trainer), strict=True))
    model.fault = None
    assert trainer.step(BATCH).updated
    assert trainer.scale == 1.0


class Noted:
    """A watch that writes down what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def before_forward(self, trainer_step, batch):
        self.calls.append(("before_forward", trainer_step))

    def after_backward(self, model, scale):
        self.calls.append(("after_backward", scale, model.head.bias.grad is not None))

    def before_update(self, model):
        self.calls.append(("before_update", model.head.bias.grad.norm().item() <= 1.0))

    def after_update(self, model, info):
        self.calls.append(("after_update", info.step, info.updated))

    def on_nonfinite(self, broken):
        held = broken.model.head.bias.grad is not None
        self.calls.append(("on_nonfinite", broken.step, float(broken.batch[0][0, 0]), held))


def test_a_watch_is_called_in_order_and_shown_the_first_broken_batch():
    watch = Noted()
    trainer = trainer_of(accumulate=2, watch=watch)
    trainer.step(BATCH)
    trainer.step(BATCH)
    assert watch.calls == [
        ("before_forward", 0),
        ("after_backward", 256.0, True),
        ("before_forward", 0),
        ("after_backward", 256.0, True),
        ("before_update", True),
        ("after_update", 1, True),
    ]
    watch.calls.clear()
    nan = torch.full((6, 4), float("nan"))
    nan[0, 0] = 5.0
    trainer.step((nan, BATCH[1]))
    trainer.step(BATCH)
    assert watch.calls[-1] == ("on_nonfinite", 1, 5.0, True)
    assert not any(call[0] in ("before_update", "after_update") for call in watch.calls)


def test_a_watch_is_told_of_numbers_that_stop_a_run():
    watch = Noted()
    model = Faulty()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), cross_entropy, watch=watch)
    model.fault = float("nan")
    with pytest.raises(TrainingError, match="update 0 is not finite"):
        trainer.step(BATCH)
    assert watch.calls[-1] == ("on_nonfinite", 0, -1.0, True)


class Deep(nn.Module):
    """A regression whose gradients are about 1e-9: far below what FP16 holds (2^-24 is 6e-8)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize(("scale", "trains"), [("off", False), ("dynamic", True)])
def test_fp16_trains_with_loss_scaling_where_it_does_not_without(scale, trains):
    """Targets in small units make a small loss: its gradients vanish in FP16 unless the loss is scaled."""
    unit = 1e-4
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(64, 8, generator=generator)
    targets = inputs[:, :1].tanh() * unit

    def loss(outputs, wanted):
        return mse_loss(outputs.float() * unit, wanted)

    model = Deep()
    before = [one.detach().clone() for one in model.parameters()]
    policy = precision("fp16-mixed", loss_scale=scale)
    trainer = Trainer(model, torch.optim.Adam(model.parameters(), lr=3e-3, eps=1e-16), loss, precision=policy)
    losses = [trainer.step((inputs, targets)).loss for _ in range(150)]
    if trains:
        assert losses[-1] < 0.1 * losses[0]
    else:
        assert losses[-1] > 0.5 * losses[0]
        inner = list(zip(before, model.parameters(), strict=True))[:2]
        assert all(torch.equal(old, new) for old, new in inner)
