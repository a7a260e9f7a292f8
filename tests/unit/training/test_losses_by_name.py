"""Losses by name: what they are a sum over."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from narrowcast.training import Trainer
from narrowcast.training.config import LossSettings
from narrowcast.training.objectives import loss_of


def trained(parts: list[slice]) -> torch.Tensor:
    """Return the weights after one update over a window of micro-batches."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(16, 4), torch.randint(0, 3, (16,))
    labels[:7] = 2  # ignored: most of the first half
    model = nn.Linear(4, 3)
    loss = loss_of(LossSettings(name="cross-entropy", ignore=2))
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=1.0), loss, accumulate=len(parts))
    for part in parts:
        trainer.step((inputs[part], labels[part]))
    return model.weight.detach().clone()


def test_samples_that_are_ignored_weigh_nothing_however_a_window_is_cut():
    whole = trained([slice(0, 16)])
    assert torch.allclose(whole, trained([slice(0, 8), slice(8, 16)]), atol=1e-6)
    torch.manual_seed(0)
    inputs, labels = torch.randn(16, 4), torch.randint(0, 3, (16,))
    labels[:7] = 2
    model = nn.Linear(4, 3)
    before = model.weight.detach().clone()
    cross_entropy(model(inputs), labels, ignore_index=2).backward()
    assert model.weight.grad is not None
    assert torch.allclose(whole, before - model.weight.grad, atol=1e-6)
