"""AdamW with unscaling and clipping in plain torch: what the kernels of ``triton_adamw`` do, in an order one can read.

Every operation rounds once, as IEEE 754 says, in the order written here; the kernels do the same operations in the same
order. Only the norm is summed differently: it agrees within a relative 2e-6, and where nothing is clipped, the updates
agree bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LARGEST_SQUARE", "NAN", "Group", "Member", "Verdict", "flat", "logarithm", "update"]

LARGEST_SQUARE = 3.4028234663852886e38  # float32's largest number: a sum of squares above it counts as infinite
NAN = 1 << 16  # what a NaN adds to a count of broken elements; an infinite one adds 1
_CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s
_WORD = (1 << 32) - 1


class Member(NamedTuple):
    """One parameter with what its update reads and writes; all share the parameter's shape and strides.

    Args:
        number: Its place among the optimizer's parameters: random bits depend on it.
        parameter: FP32 or BF16.
        gradient: FP32, BF16 or FP16, still scaled.
        exp_avg: First moment, FP32.
        exp_avg_sq: Second moment, FP32.
        compensation: What the BF16 parameter lacks of the exact sum, BF16; None without Kahan summation.
    """

    number: int
    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    compensation: Tensor | None


class Group(NamedTuple):
    """Members with the same settings; the names are torch.optim.AdamW's."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    stochastic: bool
    seed: int
    members: Sequence[Member]


class Verdict(NamedTuple):
    """What an update found in the gradients; everything is on the device.

    Args:
        norm: Of the unscaled gradients before clipping: float32, no dimension.
        finite: Whether every gradient and the sum of their squares is finite: bool, no dimension.
        broken: Elements that are not finite, counted in parts: int32, shape [parts]. An infinite one counts 1, a NaN 2¹⁶;
            parts have fewer elements than that, or count none beyond.
        members: Which member each part is of: int32, shape [parts].
    """

    norm: Tensor
    finite: Tensor
    broken: Tensor
    members: Tensor


def update(
    groups: Sequence[Group], steps: Tensor, inverse_scale: Tensor, clip_norm: float | None, *, zero: bool
) -> Verdict:
    """Update every member, or none where a gradient is not finite; nothing waits for the device.

    Args:
        groups: The members, by settings.
        steps: Updates done so far of each member, in the order of the groups: float32, shape [members].
        inverse_scale: What the gradients are multiplied by: float32, no dimension.
        clip_norm: Norm above which the gradients are scaled down to it.
        zero: Whether gradients are set to zero afterwards, also when nothing is updated.

    Returns:
        The norm of the gradients, whether they are finite, and which are not.
    """
    members = [member for group in groups for member in group.members]
    norm, finite, broken = _norm(members, inverse_scale)
    factor = inverse_scale
    if clip_norm is not None:
        factor = inverse_scale * torch.clamp(clip_norm / (norm + _CLIP_EPSILON), max=1.0)
    steps += finite
    row = 0
    for group in groups:
        for member in group.members:
            _update(member, group, steps[row], factor, finite)
            row += 1
            if zero:
                member.gradient.zero_()
    return Verdict(norm, finite, broken, torch.arange(len(members), dtype=torch.int32, device=broken.device))


def flat(x: Tensor) -> Tensor:
    """Return the elements of a dense tensor in the order of its memory, shape [elements], without a copy."""
    return x.as_strided((x.numel(),), (1,))


def logarithm(beta: float) -> float:
    """Return the natural logarithm of a beta, which may be 0."""
    return math.log(beta) if beta else -math.inf


def _norm(members: Iterable[Member], inverse_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = torch.zeros((), dtype=torch.float64, device=inverse_scale.device)
    broken: list[Tensor] = []
    for member in members:
        gradient = flat(member.gradient).float()
        total += (gradient * inverse_scale).double().square().sum()
        infinite, nan = (found.sum().clamp(max=NAN // 2) for found in (gradient.isinf(), gradient.isnan()))
        broken.append((infinite + nan.clamp(max=NAN // 4) * NAN).int())
    counts = torch.stack(broken)
    return total.sqrt().float(), (counts == 0).all() & (total <= LARGEST_SQUARE), counts


def _update(member: Member, group: Group, step: Tensor, factor: Tensor, finite: Tensor) -> None:
    beta1, beta2 = group.betas
    parameter, first, second = (flat(x) for x in (member.parameter, member.exp_avg, member.exp_avg_sq))
    gradient = flat(member.gradient).float() * factor
    value = parameter.float()
    if member.compensation is not None:
        value = value + flat(member.compensation).float()
    new_first = first + (gradient - first) * (1 - beta1)
    new_second = second * beta2 + (gradient * gradient) * (1 - beta2)
    value = value * (1 - group.lr * group.weight_decay)
    # Rounded once from float64: on CPUs, torch's float32 roots may lie one unit off.
    root = new_second.double().sqrt().float()
    divisor = root * (1 / _correction(beta2, step).sqrt()).float() + group.eps
    rate = (1 / _correction(beta1, step)).float() * group.lr
    value = value - (new_first / divisor) * rate

    new = value
    if parameter.dtype is torch.bfloat16:
        new = _rounded(value, member.number, step, group.seed) if group.stochastic else value.bfloat16()
    _write(first, new_first, finite)
    _write(second, new_second, finite)
    _write(parameter, new, finite)
    if member.compensation is not None:
        _write(flat(member.compensation), (value - new.float()).bfloat16(), finite)


def _write(out: Tensor, new: Tensor, finite: Tensor) -> None:
    out.copy_(torch.where(finite, new, out))


def _correction(beta: float, step: Tensor) -> Tensor:
    """Return 1 - beta**step in float64."""
    return 1 - torch.exp(step.double() * logarithm(beta))


def _rounded(value: Tensor, index: int, step: Tensor, seed: int) -> Tensor:
    """Return float32 numbers [elements] rounded to BF16: up with the probability that the lost digits make.

    Eight neighbours share the four words of one Philox block, 16 bits each.
    """
    blocks = torch.arange(-(-value.numel() // 8), device=value.device)
    words = torch.stack(_philox(seed, blocks, index, step.long()), dim=1)  # [blocks, 4]
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=2)  # [blocks, 4, 2]
    bits = value.view(torch.int32) + halves.reshape(-1)[: value.numel()].int()
    kept = (bits & -0x10000).view(torch.float32)
    return torch.where(value.isnan(), value, kept).bfloat16()


def _philox(seed: int, blocks: Tensor, index: int, step: Tensor) -> list[Tensor]:
    """Return four random words of 32 bits for each block, in int64.

    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): the key is the seed; the counter
    is the block, the parameter's index, the step and 0.
    """
    counter = [blocks, torch.full_like(blocks, index), step.expand_as(blocks), torch.zeros_like(blocks)]
    key = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(10):
        high0, low0 = _product(counter[0], 0xD2511F53)
        high1, low1 = _product(counter[2], 0xCD9E8D57)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & _WORD, (key[1] + 0xBB67AE85) & _WORD]
    return counter


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of a product of two words, which int64 cannot hold as a whole."""
    low = (x & 0xFFFF) * factor
    middle = (x >> 16) * factor + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
