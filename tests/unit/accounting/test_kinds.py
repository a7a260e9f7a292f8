"""What sort of work each operator of a traced run is, and what is noted of convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from narrowcast.accounting.counting import MOVES, REDUCTIONS, VIEWS
from narrowcast.accounting.kinds import Kind, attributes_of, kind_of
from narrowcast.accounting.operators import Operator
from narrowcast.accounting.profile import profile_module


class Runs(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(*args)


def run(module: nn.Module, *shapes: tuple[int, ...], train: bool = False) -> list[Operator]:
    args = tuple(torch.zeros(shape) for shape in shapes)
    return [op for op in profile_module(module, args, train=train).operators if op.kind is not Kind.VIEW]


IMAGE = (2, 8, 6, 6)


@pytest.mark.parametrize(
    ("function", "shapes", "kind"),
    [
        (nn.Conv2d(8, 4, 3), [IMAGE], Kind.CONVOLUTION),
        (nn.Conv2d(8, 8, 3, groups=2), [IMAGE], Kind.CONVOLUTION),
        (nn.Conv2d(8, 8, 3, groups=8), [IMAGE], Kind.DEPTHWISE),
        (nn.Conv2d(8, 16, 3, groups=8), [IMAGE], Kind.DEPTHWISE),
        (nn.Conv1d(1, 4, 3), [(2, 1, 9)], Kind.CONVOLUTION),  # one group of one channel is no depthwise convolution
        (nn.ConvTranspose2d(8, 4, 3), [IMAGE], Kind.CONVOLUTION),
        (nn.ConvTranspose2d(8, 8, 3, groups=8), [IMAGE], Kind.DEPTHWISE),
        (nn.Linear(6, 5), [IMAGE], Kind.PRODUCT),
        (nn.Linear(6, 5, bias=False), [(3, 6)], Kind.PRODUCT),
        (torch.bmm, [(2, 3, 4), (2, 4, 5)], Kind.PRODUCT),
        (torch.dot, [(4,), (4,)], Kind.PRODUCT),
        (F.scaled_dot_product_attention, [(1, 2, 5, 8)] * 3, Kind.ATTENTION),
        (nn.BatchNorm2d(8), [IMAGE], Kind.NORMALISATION),
        (nn.LayerNorm(6), [IMAGE], Kind.NORMALISATION),
        (nn.GroupNorm(2, 8), [IMAGE], Kind.NORMALISATION),
        (nn.Softmax(-1), [IMAGE], Kind.SOFTMAX),
        (nn.LogSoftmax(-1), [IMAGE], Kind.SOFTMAX),
        (nn.ReLU(), [IMAGE], Kind.ELEMENTWISE),
        (nn.ReLU(inplace=True), [IMAGE], Kind.ELEMENTWISE),
        (nn.GELU(), [IMAGE], Kind.ELEMENTWISE),
        (torch.add, [IMAGE, IMAGE], Kind.ELEMENTWISE),
        (lambda x: x.sum(-1), [IMAGE], Kind.REDUCTION),
        (lambda x: x.cumsum_(-1), [IMAGE], Kind.REDUCTION),
        (nn.MaxPool2d(2), [IMAGE], Kind.POOLING),
        (nn.AvgPool2d(2), [IMAGE], Kind.POOLING),
        (nn.AdaptiveAvgPool2d(3), [IMAGE], Kind.POOLING),
        (lambda x: torch.cat([x, x]), [IMAGE], Kind.MOVE),
        (lambda x: F.pad(x, (1, 1)), [IMAGE], Kind.MOVE),
        (lambda x: x.transpose(1, 2).contiguous(), [IMAGE], Kind.MOVE),
        (lambda x: F.interpolate(x, scale_factor=2), [IMAGE], Kind.MOVE),
        (lambda x: x.to(torch.float16), [IMAGE], Kind.MOVE),
    ],
)
def test_kinds(function: Any, shapes: list[tuple[int, ...]], kind: Kind) -> None:
    module = function if isinstance(function, nn.Module) else Runs(function)
    # Empty buffers, which stand for what no one computes, aside.
    assert {operator.kind for operator in run(module, *shapes) if operator.name != "empty"} == {kind}


@pytest.mark.parametrize(
    "function", [lambda x: x.view(-1), lambda x: x.permute(0, 2, 3, 1), lambda x: x[:, 1:], lambda x: x.unsqueeze(0)]
)
def test_views_move_nothing(function: Callable[..., Any]) -> None:
    operators = profile_module(Runs(function), (torch.zeros(IMAGE),)).operators
    assert {operator.kind for operator in operators} == {Kind.VIEW}
    assert sum(operator.bytes_read + operator.bytes_written for operator in operators) == 0


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Conv2d(8, 4, (3, 1), stride=2), (8, 4, (3, 1), (2, 2), (1, 1), 1, False)),
        (nn.Conv2d(8, 16, 3, groups=4, dilation=2), (8, 16, (3, 3), (1, 1), (2, 2), 4, False)),
        (nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), (8, 6, (2, 2), (2, 2), (1, 1), 2, True)),
    ],
)
def test_what_is_noted_of_convolutions(layer: nn.Module, expected: tuple[Any, ...]) -> None:
    names = ("inputs", "outputs", "kernel", "stride", "dilation", "groups", "transposed")
    forward, *backward = [op for op in run(layer, IMAGE, train=True) if "convolution" in op.name]
    assert dict(forward.attributes) == dict(zip(names, expected, strict=True))
    assert [operator.name for operator in backward] == ["convolution_backward"]
    assert backward[0].attributes == forward.attributes
    assert backward[0].kind is forward.kind


def test_only_convolutions_have_their_attributes() -> None:
    assert attributes_of("mm", [torch.zeros(2, 3), torch.zeros(3, 4)]) == {}


def test_every_operator_that_counts_as_a_move_or_a_reduction_is_of_a_kind_that_says_so() -> None:
    moves = {kind_of(name, {}, view=name in VIEWS) for name in MOVES}
    assert moves == {Kind.MOVE, Kind.VIEW}
    reductions = {kind_of(name, {}) for name in REDUCTIONS}
    assert reductions == {Kind.REDUCTION, Kind.POOLING}
