"""A state goes on bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from narrowcast.errors import TrainingError
from narrowcast.training import DynamicScale, Trainer, precision

POLICIES = {
    "fp32": lambda: precision("fp32"),
    "bf16-mixed": lambda: precision("bf16-mixed"),
    "fp16-mixed": lambda: precision("fp16-mixed", loss_scale=DynamicScale(initial=2.0**22, interval=3)),
    "bf16-true": lambda: precision("bf16-true"),
    "bf16-true-kahan": lambda: precision("bf16-true", update="kahan"),
    "bf16-true-override": lambda: precision("bf16-true", overrides={"3": "fp32"}),
}


def trainer_of(policy: str, seed: int, *, fused: bool = False) -> Trainer:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=40)
    return Trainer(
        model, optimizer, cross_entropy, precision=POLICIES[policy](), schedule=schedule, clip_norm=0.5, accumulate=2
    )


def run(trainer: Trainer, first: int, last: int) -> list[tuple]:
    seen = []
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        inputs = torch.randn(6 + number % 3, 8, generator=generator)
        info = trainer.step((inputs, inputs[:, :3].argmax(1)))
        seen.append((info.loss, info.grad_norm, info.lr, info.scale, info.skipped, info.step))
    return seen


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_resumed_run_repeats_the_uninterrupted_one(policy, fused):
    whole = trainer_of(policy, 0, fused=fused)
    run(whole, 0, 10)
    saved = copy.deepcopy(whole.state_dict())
    expected = run(whole, 10, 30)
    resumed = trainer_of(policy, 1, fused=fused)
    resumed.load_state_dict(saved)
    assert run(resumed, 10, 30) == expected
    for left, right in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


def test_fp16_skips_are_part_of_what_is_repeated():
    trainer = trainer_of("fp16-mixed", 0)
    run(trainer, 0, 30)
    assert trainer.skipped > 0
    assert trainer.state_dict()["counters"] == {"steps": 15 - trainer.skipped, "skipped": trainer.skipped}


def test_optimizer_states_of_bf16_weights_stay_in_fp32():
    trainer = trainer_of("bf16-true", 0)
    run(trainer, 0, 4)
    trainer.load_state_dict(copy.deepcopy(trainer.state_dict()))
    assert {state["exp_avg_sq"].dtype for state in trainer.optimizer.state.values()} == {torch.float32}
    assert {one.dtype for one in trainer.model.parameters()} == {torch.bfloat16}


def test_an_open_window_has_no_state():
    trainer = trainer_of("fp32", 0)
    run(trainer, 0, 1)
    with pytest.raises(TrainingError, match="a window of 2 micro-batches holds 1") as error:
        trainer.state_dict()
    assert "discard()" in error.value.next_step
    trainer.discard()
    trainer.state_dict()


def test_a_state_of_another_precision_is_refused():
    saved = trainer_of("bf16-mixed", 0).state_dict()
    with pytest.raises(TrainingError, match="saved in precision bf16-mixed, and this trainer runs in fp32"):
        trainer_of("fp32", 0).load_state_dict(saved)


def test_a_state_with_a_schedule_needs_one():
    saved = trainer_of("fp32", 0).state_dict()
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 3))
    bare = Trainer(model, torch.optim.AdamW(model.parameters()), cross_entropy)
    with pytest.raises(TrainingError, match="holds a schedule, and this trainer has none"):
        bare.load_state_dict(saved)


def test_a_state_of_another_update_is_refused():
    saved = trainer_of("bf16-true-kahan", 0).state_dict()
    with pytest.raises(TrainingError, match="update 'kahan' of BF16 weights, and this trainer has 'stochastic'"):
        trainer_of("bf16-true", 0).load_state_dict(saved)


def test_a_state_goes_through_files(tmp_path):
    from narrowcast.training import checkpoint

    whole = trainer_of("bf16-true-kahan", 0)
    run(whole, 0, 10)
    path = checkpoint.save(tmp_path, whole.state_dict(), step=whole.steps)
    expected = run(whole, 10, 20)
    resumed = trainer_of("bf16-true-kahan", 1)
    resumed.load_state_dict(checkpoint.load(path))
    assert run(resumed, 10, 20) == expected


def test_a_state_of_an_earlier_version_is_refused():
    trainer = trainer_of("bf16-true", 0)
    saved = trainer.state_dict()
    del saved["unit"]
    with pytest.raises(TrainingError, match="saved by an earlier version") as error:
        trainer.load_state_dict(saved)
    assert "begin anew" in error.value.next_step
