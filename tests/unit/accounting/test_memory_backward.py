"""The engine that memory is traced with computes the gradients of PyTorch's own, on real tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from narrowcast.accounting.backward import Backward


class Doubled(torch.autograd.Function):
    """Two results, of which the second may go unused."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x)
        return 2 * x, x * x

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 2 * gradients[0] + 2 * x * gradients[1]


class Net(nn.Module):
    """Branches, sums, a weight used twice, and one that is not used at all."""

    def __init__(self, middle: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8))
        self.shared = nn.Linear(8, 8)
        self.unused = nn.Linear(4, 4)
        self.middle = middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).relu_()
        x = x + self.middle(self.block, x)
        left, right = x.mean((2, 3)).chunk(2, -1)
        y = self.shared(torch.cat([right, left], -1))
        first, second, _ = self.shared(y).split([3, 3, 2], -1)
        return F.softmax(first + second.detach() * second, -1).log().sum() + (y.sum(0) * self.shared.bias).sum()


def one_of(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor


MIDDLES: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "plain": lambda block, x: block(x),
    "checkpointed": lambda block, x: checkpoint(block, x, use_reentrant=False, preserve_rng_state=False),
    "Function": lambda block, x: block(Doubled.apply(x)[0]) + Doubled.apply(x)[1],
    "in place": lambda block, x: block(x).mul_(2).add_(x),
}


def gradients(net: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: one.grad for name, one in net.named_parameters()}


@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_are_those_of_autograd(middle: str, passes: int) -> None:
    torch.manual_seed(0)
    net = Net(MIDDLES[middle])
    inputs = [torch.randn(4, 3, 6, 5) for _ in range(passes)]
    for x in inputs:
        net(x).backward()
    wanted = gradients(net)
    net.zero_grad()
    for x in inputs:
        loss = net(x)
        run = Backward(loss)
        del loss
        run.run()
    found = gradients(net)
    assert found["unused.weight"] is None
    assert found["conv.weight"] is not None
    for name, gradient in wanted.items():
        assert (gradient is None) == (found[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient)
            assert one_of(found[name]).stride() == gradient.stride()


def test_what_a_node_saved_is_freed_once_it_has_run() -> None:
    x = torch.ones(3, requires_grad=True)
    saved: list[weakref.ref[torch.UntypedStorage]] = []
    y = x
    for _ in range(3):
        y = y.exp()  # which saves its result
        saved.append(weakref.ref(y.untyped_storage()))
    alive: list[int] = []
    run = Backward(y.sum(), lambda number: alive.append(sum(one() is not None for one in saved)))
    del y
    run.run()
    assert alive == [3, 3, 2, 1, 0]  # before the sum, each exponential, and the gradient of x


def test_every_node_is_announced() -> None:
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    z = y.exp()
    nodes: list[Any] = [z.grad_fn, y.grad_fn]
    numbers = [node._sequence_nr() for node in nodes]
    seen: list[int | None] = []
    run = Backward(z.sum(), seen.append)
    run.run()
    assert seen[1:] == [*numbers, None]


def test_what_needs_no_gradient_cannot_run_backward() -> None:
    with pytest.raises(ValueError, match="no output"):
        Backward(torch.ones(()))
