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

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
OPTIMIZERS = {
    "foreach": lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True),
    "fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 16)).cuda()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    return inputs.cuda(), inputs[:, :16].argmax(1).cuda()


def trainer_of(policy, optimizer: str = "fused", **settings) -> Trainer:
    model = network()
    return Trainer(model, OPTIMIZERS[optimizer](model.parameters()), cross_entropy, precision=policy, **settings)


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
    return sum("synchroniz" in str(one.message) for one in seen)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("policy", ["fp32", "tf32", "bf16-mixed", "bf16-true"])
def test_without_a_loss_scale_nothing_waits(policy, accumulate, optimizer):
    assert waits(trainer_of(policy, optimizer, clip_norm=1.0, accumulate=accumulate), 8) == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_with_a_loss_scale_an_update_waits_once(optimizer):
    policy = precision("fp16-mixed", loss_scale=DynamicScale(initial=2.0**10))
    assert waits(trainer_of(policy, optimizer, clip_norm=1.0), 8) == 8


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


@pytest.mark.parametrize(("optimizer", "harmed"), [("fused", False), ("foreach", True)])
def test_a_broken_update_is_found_without_waiting_and_fused_optimizers_leave_it_out(optimizer, harmed):
    trainer = trainer_of("bf16-mixed", optimizer)
    inputs, targets = batch()
    trainer.step((inputs, targets))
    trainer.step((inputs * float("nan"), targets))
    after = [one.detach().clone() for one in trainer.model.parameters()]
    with pytest.raises(TrainingError, match="update 1 is not finite"):
        trainer.finish()
    assert any(one.isnan().any().item() for one in after) == harmed


def test_a_skip_leaves_everything_as_it_was():
    trainer = trainer_of(precision("fp16-mixed", loss_scale=DynamicScale(initial=2.0**10)), clip_norm=1.0)
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
