"""Branches, loops and attention that take functions, operators that autograd leaves whole, and what none of them hides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._higher_order_ops import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torchvision.ops import DeformConv2d

from narrowcast.accounting.attention import attentions
from narrowcast.accounting.higher_order import MORE_PASSES, flex_share
from narrowcast.accounting.memory import memory_of_module
from narrowcast.accounting.profile import Profile, profile_module
from narrowcast.errors import ModelError


class Calls(nn.Module):
    """A module that runs a function of itself and its inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.small = nn.Linear(8, 8)
        self.large = nn.Linear(8, 32)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


def count(function: Callable[..., Any], *inputs: torch.Tensor, train: bool = False) -> Profile:
    return profile_module(Calls(function), inputs, train=train)


# Functions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", [False, True])
def test_of_two_branches_the_one_with_more_macs_counts(swapped: bool) -> None:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        few, many = (lambda x: self.small(x)), (lambda x: self.large(x)[:, :8])
        return torch.cond(x.sum() > 0, *((many, few) if swapped else (few, many)), (x,))

    found = count(run, torch.zeros(4, 8))
    assert found.macs == 4 * 8 * 32
    assert found.uncounted == {}
    assert {part.path: part.macs for part in found.parts} == {"": 1024, "small": 0, "large": 1024}


def test_branches_of_branches() -> None:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        inner = lambda x: torch.cond(x.sum() > 1, lambda x: self.small(x), lambda x: self.small(self.small(x)), (x,))  # noqa: E731
        return torch.cond(x.sum() > 0, inner, lambda x: x.clone(), (x,))

    assert count(run, torch.zeros(4, 8)).macs == 2 * 4 * 8 * 8


def test_memory_takes_the_branch_that_needs_most() -> None:
    def branches(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.large(x)[:, :8].clone(), lambda x: self.small(x), (x,))

    def straight(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.large(x)[:, :8].clone()

    both, one = (memory_of_module(Calls(run), (torch.zeros(64, 8),)).peak for run in (branches, straight))
    assert one <= both <= one + 64  # what decides


def test_one_pass_of_a_loop_counts_and_the_others_are_listed() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        step = lambda i, x: (i + 1, self.small(x))  # noqa: E731
        return while_loop(lambda i, x: i < 3, step, (torch.zeros((), dtype=torch.int64), x))

    found = count(run, torch.zeros(4, 8))
    assert found.macs == 4 * 8 * 8
    assert found.uncounted == {MORE_PASSES: 1}


def test_what_has_no_rule_is_named() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        return scan(lambda carry, x: (carry + self.small(x), carry + x), torch.zeros(8), x)

    with pytest.raises(ModelError, match="higher-order operator scan") as caught:
        count(run, torch.zeros(4, 8))
    assert "cond" in caught.value.allowed


# Attention ------------------------------------------------------------------------------------------------------------

TOKENS = 16
QUERY = torch.zeros(2, 4, TOKENS, 8)
DENSE = 2 * 4 * TOKENS * TOKENS * 16


def test_flexible_attention_is_one_kernel() -> None:
    found = count(lambda self, x: flex_attention(x, x, x), QUERY)
    assert found.macs == DENSE
    assert (found.attention.calls, found.attention.macs, found.attention.unknown) == (1, DENSE, 0)
    assert found.attention.masked == 0


@pytest.mark.parametrize(
    ("mask", "visible"),
    [
        (lambda b, h, i, j: i >= j, TOKENS * (TOKENS + 1) // 2),
        (lambda b, h, i, j: (i - j).abs() <= 1, 3 * TOKENS - 2),
    ],
    ids=["causal", "band"],
)
def test_the_mask_of_flexible_attention_is_asked(mask: Callable[..., Any], visible: int) -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        return flex_attention(x, x, x, block_mask=create_block_mask(mask, None, None, TOKENS, TOKENS, device="cpu"))

    found = profile_module(Calls(run), (QUERY,))
    (one,) = attentions(found.operators)
    assert (one.macs, one.known) == (DENSE, True)
    assert one.visible_macs == DENSE * visible // TOKENS**2


def test_a_mask_that_reads_tensors_of_the_run_is_not_known() -> None:
    def mask(b: Any, h: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no numbers")

    assert flex_share((QUERY, QUERY, QUERY, None, (None, mask))) == {"visible": None}
    read = (QUERY, QUERY, QUERY, None, (None, lambda b, h, i, j: i >= j), 1.0, {}, (), (torch.zeros(3),))
    assert flex_share(read) == {"visible": None}


def test_what_cannot_be_followed_says_so() -> None:
    with pytest.raises(ModelError, match="cannot follow: FlexAttention does not support backward on CPU"):
        count(lambda self, x: flex_attention(self.small(x), x, x), QUERY, train=True)


def test_attention_with_dropout_is_trained_by_a_fused_kernel() -> None:
    def run(rate: float) -> Profile:
        return count(
            lambda self, x: F.scaled_dot_product_attention(self.small(x), x, x, dropout_p=rate), QUERY, train=True
        )

    dropped, plain = run(0.1), run(0.0)
    assert dropped.macs == plain.macs
    assert "_scaled_dot_product_efficient_attention_backward" in dropped.by_operator
    assert "bmm" not in dropped.by_operator


# Whole operators ------------------------------------------------------------------------------------------------------


def test_a_bilinear_layer_is_two_products() -> None:
    found = profile_module(nn.Bilinear(10, 20, 30), (torch.zeros(4, 10), torch.zeros(4, 20)))
    assert found.macs == 4 * 30 * (10 * 20 + 20)
    assert found.bias_adds == 4 * 30
    assert found.additions == 4 * 30 * ((10 - 1) * 20 + (20 - 1) + 1)
    assert found.uncounted == {}


def test_gradients_of_a_bilinear_layer() -> None:
    found = profile_module(nn.Bilinear(10, 20, 30), (torch.zeros(4, 10), torch.zeros(4, 20)), train=True)
    outer_products, sums = 4 * 10 * 30, 4 * 10 * 20 * 30
    assert found.macs == 4 * 30 * (10 * 20 + 20) + outer_products + sums
    assert found.uncounted == {}


def test_deformable_convolution_has_the_macs_of_a_plain_one() -> None:
    x, offsets = torch.zeros(2, 4, 8, 8), torch.zeros(2, 18, 8, 8)
    plain = profile_module(nn.Conv2d(4, 8, 3, padding=1), (x,))
    found = profile_module(DeformConv2d(4, 8, 3, padding=1), (x, offsets))
    assert (found.macs, found.bias_adds) == (plain.macs, plain.bias_adds)
    assert found.other_flops == 7 * 2 * 4 * 9 * 8 * 8
    trained = profile_module(DeformConv2d(4, 8, 3, padding=1), (x, offsets), train=True)
    assert trained.macs == 3 * plain.macs
    assert trained.uncounted == {}


def test_distances() -> None:
    small = count(lambda self, a, b: torch.cdist(a, b), torch.zeros(3, 5, 7), torch.zeros(3, 6, 7))
    assert (small.macs, small.other_flops, small.uncounted) == (0, 3 * 5 * 6 * (3 * 7 + 1), {})
    large = count(lambda self, a, b: torch.cdist(a, b), torch.zeros(3, 50, 7), torch.zeros(3, 60, 7))
    assert (large.macs, large.uncounted) == (3 * 50 * 60 * (7 + 2), {})


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_dynamically_quantised_layer_counts_like_the_layer() -> None:
    module = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(16, 32)), {nn.Linear}, dtype=torch.qint8)
    found = profile_module(module, (torch.zeros(4, 16),))
    assert (found.macs, found.bias_adds, found.uncounted) == (4 * 16 * 32, 4 * 32, {})


def test_inference_mode_hides_nothing() -> None:
    class Guarded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        @torch.inference_mode()
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    found = profile_module(Guarded(), (torch.zeros(4, 8),))
    assert (found.macs, found.bias_adds, found.uncounted) == (4 * 8 * 8, 4 * 8, {})
