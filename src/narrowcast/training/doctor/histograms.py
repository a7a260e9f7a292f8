"""Histograms of magnitudes, counted on the device that holds the numbers, without waiting for it."""

from __future__ import annotations

import torch

from narrowcast.training.doctor.buckets import BUCKETS, PER_OCTAVE

__all__ = ["Counter", "count_into", "dense_view", "sampled"]

_CHUNK = 1 << 24  # numbers that are counted at a time: bounds the copies to 64 MiB each
_SHIFT = 23 - (PER_OCTAVE.bit_length() - 1)  # float32's significand bits that do not name a bucket
_BINS = 1 << 12  # a power of two, so that a bin's place is exact in whatever arithmetic
_INFINITY = 0x7F800000
_MAGNITUDE = 0x7FFFFFFF


class Counter:
    """Counts by bucket and the largest magnitude, for a number of slots, kept on one device.

    Args:
        slots: How many histograms.
        device: Where they are kept.

    Attributes:
        counts: Shape [slots, BUCKETS], int64.
        largest: Shape [slots], float32: the largest finite magnitude.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.counts = torch.zeros(slots, BUCKETS, dtype=torch.int64, device=device)
        self.largest = torch.zeros(slots, dtype=torch.float32, device=device)

    def add(self, slot: int, tensor: torch.Tensor, divisor: torch.Tensor | float = 1.0) -> None:
        """Count a tensor's numbers into a slot; see :func:`count_into`."""
        count_into(self.counts[slot], self.largest[slot], tensor, divisor)


@torch.no_grad()
def count_into(
    counts: torch.Tensor, largest: torch.Tensor, tensor: torch.Tensor, divisor: torch.Tensor | float = 1.0
) -> None:
    """Add a tensor's numbers to a histogram, with no synchronisation of the device.

    Args:
        counts: Shape [BUCKETS], int64; added to in place.
        largest: A float32 scalar: the largest finite magnitude so far; changed in place.
        tensor: Floating point or complex (real and imaginary parts count apart), any shape, on the device of ``counts``.
            Magnitudes beyond float32 count as infinite.
        divisor: What the numbers are divided by first, such as the loss scale.
    """
    tensor = tensor.detach()
    flat = dense_view(torch.view_as_real(tensor) if tensor.is_complex() else tensor)
    for chunk in flat.split(_CHUNK):
        if not chunk.numel():
            continue
        numbers = chunk.to(torch.float32, copy=True)
        if isinstance(divisor, torch.Tensor) or divisor != 1.0:
            numbers.div_(divisor)
        bits = numbers.view(torch.int32).bitwise_and_(_MAGNITUDE).clamp_(max=_INFINITY + 1)
        finite = torch.where(bits < _INFINITY, bits, 0)
        torch.maximum(largest, finite.max().view(torch.float32), out=largest)
        bits.add_(bits >= _INFINITY, alpha=1 << _SHIFT)
        _add_counts(counts, bits.add_((1 << _SHIFT) - 1).bitwise_right_shift_(_SHIFT))


def _add_counts(counts: torch.Tensor, indices: torch.Tensor) -> None:
    """Add how often each bucket occurs; ``bincount`` waits for a GPU, and ``histc`` takes no integers on a CPU."""
    if indices.device.type == "cpu":
        counts.add_(torch.bincount(indices, minlength=BUCKETS))
    else:
        counts.add_(torch.histc(indices, bins=_BINS, min=0, max=_BINS)[:BUCKETS])


def dense_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's numbers in one dimension, in any order: without a copy if they lie densely in memory."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    permuted = tensor.permute(order)
    return permuted.view(-1) if permuted.is_contiguous() else tensor.reshape(-1)


def sampled(tensor: torch.Tensor, limit: int) -> torch.Tensor:
    """Return at most ``limit`` numbers of a tensor, evenly spaced in memory: a view where there can be one."""
    flat = dense_view(tensor.detach())
    return flat[:: -(-flat.numel() // limit)] if flat.numel() > limit else flat
