"""What a trainer refuses, in words that say what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from narrowcast.errors import DeviceError, FormatError, TrainingError
from narrowcast.training import Loss, Trainer, precision
from narrowcast.training.policies import Precision

INPUTS, TARGETS = torch.ones(4, 8), torch.zeros(4, dtype=torch.long)


def trainer_of(loss=cross_entropy, **settings) -> Trainer:
    model = nn.Linear(8, 3)
    return Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, **settings)


@pytest.mark.parametrize(
    "batch",
    [INPUTS, (INPUTS,), (INPUTS, TARGETS, TARGETS), {"inputs": INPUTS}, None],
    ids=["tensor", "one", "three", "dict", "none"],
)
def test_a_batch_is_a_pair(batch):
    with pytest.raises(TrainingError, match=r"a batch is a \w+.*\n.*a pair \(inputs, targets\)"):
        trainer_of().step(batch)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda out, _: out, r"no scalar: shape \[4, 3\]"),
        (lambda out, _: Loss(out.sum(1), 4), r"no scalar: shape \[4\]"),
        (lambda out, _: 1.0, "no scalar: float"),
        (lambda out, _: None, "no scalar: NoneType"),
        (lambda out, _: out.detach().sum(), "depends on no trainable parameter"),
        (lambda out, _: Loss(out.sum(), 0), "weigh nothing"),
        (lambda out, _: Loss(out.sum(), -1), "a weight of -1"),
        (lambda out, _: Loss(out.sum(), float("nan")), "a weight of nan"),
    ],
    ids=["rows", "sums", "number", "nothing", "detached", "weightless", "negative", "nan"],
)
def test_a_loss_is_a_scalar_with_a_graph(loss, message):
    with pytest.raises(TrainingError, match=message):
        trainer_of(loss).step((INPUTS, TARGETS))


def test_a_loss_of_one_element_is_a_scalar():
    assert trainer_of(lambda out, _: out.square().mean().reshape(1)).step((INPUTS, TARGETS)).updated


def test_a_model_has_something_to_train():
    model = nn.Linear(8, 3).requires_grad_(False)
    with pytest.raises(TrainingError, match="no trainable parameters"):
        Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), cross_entropy)


@pytest.mark.parametrize("shared", [False, True], ids=["other", "mixed"])
def test_an_optimizer_moves_the_parameters_of_the_model(shared):
    model, other = nn.Linear(8, 3), nn.Linear(8, 3)
    params = [*other.parameters(), *(model.parameters() if shared else ())]
    with pytest.raises(TrainingError, match="moves 2 tensors that are not parameters of the model"):
        Trainer(model, torch.optim.SGD(params, lr=0.1), cross_entropy)


def test_frozen_parameters_may_be_in_the_optimizer_or_not():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    for params in (model.parameters(), model[1].parameters()):
        trainer = Trainer(model, torch.optim.SGD(params, lr=0.1), cross_entropy)
        assert trainer.step((INPUTS, TARGETS)).updated


def test_optimizers_with_closures_are_refused():
    model = nn.Linear(8, 3)
    with pytest.raises(TrainingError, match="LBFGS evaluates the loss several times"):
        Trainer(model, torch.optim.LBFGS(model.parameters()), cross_entropy)

    class NeedsClosure(torch.optim.SGD):
        def step(self, closure):
            return super().step(closure)

    with pytest.raises(TrainingError, match="NeedsClosure"):
        Trainer(model, NeedsClosure(model.parameters(), lr=0.1), cross_entropy)


def test_a_schedule_that_needs_a_metric_is_refused():
    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(TrainingError, match="ReduceLROnPlateau") as error:
        Trainer(model, optimizer, cross_entropy, schedule=schedule)
    assert "after each evaluation" in error.value.next_step


@pytest.mark.parametrize(
    "settings",
    [
        {"clip_norm": 0.0},
        {"clip_norm": -1.0},
        {"clip_norm": float("nan")},
        {"clip_norm": float("inf")},
        {"accumulate": 0},
        {"nonfinite": "ignore"},
    ],
    ids=str,
)
def test_settings_are_checked(settings):
    with pytest.raises(TrainingError, match=next(iter(settings))):
        trainer_of(**settings)


def test_the_precision_is_checked():
    with pytest.raises(FormatError, match="did you mean fp16-mixed"):
        trainer_of(precision="fp16-mixd")
    with pytest.raises(DeviceError, match="tf32 on the CPU"):
        trainer_of(precision="tf32")


def test_a_module_in_half_precision_is_told_apart_from_mixed_precision():
    model = nn.Linear(8, 3).half()
    with pytest.raises(TrainingError, match="FP16 weights"):
        Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), cross_entropy, precision="fp16-mixed")
    model = nn.Linear(8, 3).bfloat16()
    with pytest.raises(TrainingError, match="BF16 weights") as error:
        Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), cross_entropy, precision="bf16-mixed")
    assert "bf16-true" in error.value.next_step


def test_a_policy_of_ones_own_is_taken():
    policy = Precision("mine", compute="bf16", overrides=())
    assert trainer_of(precision=policy).step((INPUTS, TARGETS)).updated
    assert precision(policy) is policy


def test_an_optimizer_that_is_given_more_parameters_later_is_noticed():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    trainer = Trainer(model, torch.optim.SGD(model[1].parameters(), lr=0.1), cross_entropy)
    trainer.step((INPUTS, TARGETS))
    trainer.optimizer.add_param_group({"params": list(model[0].parameters())})
    with pytest.raises(TrainingError, match="moves 4 tensors, and 2 when the trainer was built"):
        trainer.step((INPUTS, TARGETS))


def test_parameters_may_be_unfrozen_on_the_way():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    policy = precision("fp16-mixed", loss_scale=1024.0)
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), lr=1.0), cross_entropy, precision=policy, clip_norm=0.1
    )
    trainer.step((INPUTS, TARGETS))
    model[0].requires_grad_(True)
    before = model[0].weight.detach().clone()
    trainer.step((INPUTS, TARGETS))
    assert 0 < float((model[0].weight.detach() - before).norm()) <= 0.1


def test_an_optimizer_of_frozen_parameters_alone_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    with pytest.raises(TrainingError, match="moves no trainable parameter"):
        Trainer(model, torch.optim.SGD(model[0].parameters(), lr=0.1), cross_entropy)


def test_mappings_of_any_kind_are_arguments_by_name():
    from collections import UserDict

    class Named(nn.Linear):
        def forward(self, features):
            return super().forward(features)

    model = Named(8, 3)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), cross_entropy)
    assert trainer.step((UserDict(features=INPUTS), TARGETS)).updated
