"""The first update of an optimizer that keeps its first gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from narrowcast.training import StaticScale, Trainer, precision


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_sgd_keeps_no_momentum_of_a_first_update_that_is_left_out(fused):
    """PyTorch's fused SGD makes its momentum without writing to it, and is then told to leave the update out."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    trainer = Trainer(model, optimizer, mse_loss, precision=precision("fp16-mixed", loss_scale=StaticScale(1.0)))
    x, y = torch.ones(2, 4), torch.zeros(2, 1)
    assert trainer.step((x, torch.full((2, 1), torch.inf))).skipped
    assert not any(isinstance(one, torch.Tensor) for state in optimizer.state.values() for one in state.values())
    before = model.weight.detach().clone()
    trainer.step((x, y))
    moved = (before - model.weight.detach()) / 0.1
    momentum = optimizer.state[model.weight]["momentum_buffer"]
    assert torch.allclose(momentum, moved, atol=1e-6)
    assert momentum.abs().max() > 0
