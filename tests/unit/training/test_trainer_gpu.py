"""The trainer on a CUDA device: what it waits for, and what it finds out later."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from narrowcast.errors import TrainingError
from narrowcast.training import DynamicScale, Trainer, precision
from narrowcast.training.fused import FusedAdamW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # of torchao: its source, where it is compiled for the first time, and what it asks of torch
    pytest.mark.filterwarnings("ignore:.*invalid escape sequence"),
    pytest.mark.filterwarnings("ignore:torch.get_autocast_gpu_dtype"),
]
OPTIMIZERS = {
    "foreach": lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True),
    "fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
}
WITH_OURS = {**OPTIMIZERS, "ours": lambda params: FusedAdamW(params, lr=1e-3)}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 16)).cuda()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    return inputs.cuda(), inputs[:, :16].argmax(1).cuda()


def trainer_of(policy, optimizer: str = "fused", **settings) -> Trainer:
    model = network()
    return Trainer(model, WITH_OURS[optimizer](model.parameters()), cross_entropy, precision=policy, **settings)


def waits(trainer: Trainer, steps: int) -> int:
    """Return how often steps wait for the device, as PyTorch sees it."""
    given = batch()
    for _ in range(3):
        trainer.step(given)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(steps):
                trainer.step(given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # not "synchroniz": the first notice of a process says that the mode itself is a prototype
    return sum("called a synchronizing" in str(one.message) for one in seen)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("policy", ["fp32", "tf32", "bf16-mixed", "bf16-true"])
def test_without_a_loss_scale_nothing_waits(policy, accumulate, optimizer):
    assert waits(trainer_of(policy, optimizer, clip_norm=1.0, accumulate=accumulate), 8) == 0


@pytest.mark.parametrize(("optimizer", "count"), [("foreach", 8), ("ours", 0), ("fused", 0)])
def test_with_a_loss_scale_an_update_waits_once_unless_the_device_leaves_it_out_itself(optimizer, count):
    policy = precision("fp16-mixed", loss_scale=DynamicScale(initial=2.0**10))
    trainer = trainer_of(policy, optimizer, clip_norm=1.0)
    assert waits(trainer, 8) == count
    assert trainer.steps == 11


class Slow(torch.autograd.Function):
    """Keeps the device busy in both passes, for longer than the host needs for a step."""

    @staticmethod
    def forward(ctx, x):
        torch.cuda._sleep(1 << 28)  # cycles: more than a tenth of a second
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        torch.cuda._sleep(1 << 28)
        return grad


@pytest.mark.parametrize(("optimizer", "waited"), [("fused", False), ("ours", False), ("foreach", True)])
def test_the_device_has_work_at_any_time_where_it_leaves_updates_out_itself(optimizer, waited):
    """PyTorch tells of no wait for an event: so look which passes the device has done when the host goes on."""
    trainer = trainer_of(precision("fp16-mixed", loss_scale=DynamicScale(initial=2.0**10)), optimizer)
    inputs, targets = batch()
    for _ in range(3):
        trainer.step((inputs, targets))
    assert trainer.steps == 3
    forward_done, backward_done = [], []
    forward, backward = torch.cuda.Event(), torch.cuda.Event()

    def loss(outputs, wanted):
        outputs = Slow.apply(outputs)
        forward.record()
        outputs.register_hook(lambda grad: forward_done.append(forward.query()))
        return cross_entropy(outputs, wanted)

    trainer.loss = loss
    trainer.model[0].weight.register_post_accumulate_grad_hook(lambda one: backward.record())
    for _ in range(3):
        trainer.step((inputs, targets))
        backward_done.append(backward.query())
    assert forward_done == [False] * 3  # when the host begins the backward pass, the update before being settled
    assert backward_done == [waited] * 3  # when the step returns
    assert trainer.steps == 6


@pytest.mark.parametrize("policy", ["fp32", "tf32", "bf16-mixed", "fp16-mixed", "bf16-true"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_trains(policy, optimizer):
    trainer = trainer_of(policy, optimizer, clip_norm=1.0)
    given = batch()
    losses = [trainer.step(given).loss for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_fp8_trains_where_the_device_has_it(scaling):
    from narrowcast.training.float8 import Float8

    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the device has no FP8")
    trainer = trainer_of(precision("fp8-mixed", float8=Float8(scaling)), clip_norm=1.0)
    given = batch()
    losses = [trainer.step(given).loss for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("optimizer", "harmed"), [("fused", False), ("ours", False), ("foreach", True)])
def test_a_broken_update_is_found_without_waiting_and_fused_optimizers_leave_it_out(optimizer, harmed):
    trainer = trainer_of("bf16-mixed", optimizer)
    inputs, targets = batch()
    trainer.step((inputs, targets))
    trainer.step((inputs * float("nan"), targets))
    after = [one.detach().clone() for one in trainer.model.parameters()]
    with pytest.raises(TrainingError, match="update 1 is not finite"):
        trainer.finish()
    assert any(one.isnan().any().item() for one in after) == harmed


@pytest.mark.parametrize("optimizer", WITH_OURS)
def test_a_skip_leaves_everything_as_it_was(optimizer):
    policy = precision("fp16-mixed", loss_scale=DynamicScale(initial=2.0**10))
    trainer = trainer_of(policy, optimizer, clip_norm=1.0)
    inputs, targets = batch()
    trainer.step((inputs, targets))
    before = copy.deepcopy(trainer.state_dict())
    info = trainer.step((inputs * float("inf"), targets))
    assert info.skipped
    after = trainer.state_dict()
    for name, one in before["model"].items():
        assert torch.equal(one, after["model"][name])
    for key, state in before["optimizer"]["state"].items():
        for name, one in state.items():
            assert torch.equal(one, after["optimizer"]["state"][key][name])
    assert trainer.scale == 2.0**9


@pytest.mark.parametrize("optimizer", ["fused", "ours"])
def test_decisions_that_are_learnt_late_are_those_that_are_waited_for(optimizer):
    ends = []
    for late in (True, False):
        policy = precision("fp16-mixed", loss_scale=DynamicScale(initial=2.0**10, interval=4))
        trainer = trainer_of(policy, optimizer, clip_norm=1.0)
        assert trainer._settles_late
        trainer._settles_late = late
        trainer.schedule = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.9)
        inputs, targets = batch()
        infos = [trainer.step((inputs * (torch.nan if at in (3, 4, 9) else 1.0), targets)) for at in range(16)]
        said = [(info.grad_norm, info.lr, info.scale, info.step, info.updated, info.skipped) for info in infos]
        ends.append((repr(said), trainer.ledger, trainer.state_dict()))
    (late, ledger, state), (at_once, expected_ledger, expected) = ends
    assert late == at_once
    assert list(ledger) == list(expected_ledger)
    assert len(ledger) == 3
    assert {key: state[key] for key in ("scale", "counters")} == {key: expected[key] for key in ("scale", "counters")}
    assert state["schedule"]["last_epoch"] == expected["schedule"]["last_epoch"] == 13
    assert all(torch.equal(state["model"][name], one) for name, one in expected["model"].items())


def test_a_compiled_model_takes_the_steps_of_the_plain_one():
    plain, given = trainer_of("bf16-mixed", clip_norm=1.0), batch()
    model = network()
    compiled = torch.compile(model)
    trainer = Trainer(
        compiled, OPTIMIZERS["fused"](model.parameters()), cross_entropy, precision="bf16-mixed", clip_norm=1.0
    )
    for _ in range(20):
        expected, info = plain.step(given), trainer.step(given)
    assert info.loss == pytest.approx(expected.loss, rel=0.02)


def test_what_was_compiled_for_one_precision_does_not_run_in_another():
    """PyTorch 2.11 finds BF16's code on disk when it compiles for FP16."""
    for name, expected in (
        ("bf16-mixed", torch.bfloat16),
        ("fp16-mixed", torch.float16),
        ("bf16-mixed", torch.bfloat16),
    ):
        torch.compiler.reset()
        model, seen = network(), []

        def loss(outputs, targets, seen=seen):
            seen.append(outputs.dtype)
            return cross_entropy(outputs.float(), targets)

        optimizer = OPTIMIZERS["fused"](model.parameters())
        Trainer(torch.compile(model), optimizer, loss, precision=name).step(batch())
        assert seen == [expected]
