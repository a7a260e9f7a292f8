"""Histograms of magnitudes, counted on the device that holds the numbers, without waiting for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from narrowcast.training.doctor.buckets import BUCKETS, PER_OCTAVE
from narrowcast.training.multi_tensor import norms

__all__ = ["Counter", "dense_view", "index_on", "sampled", "spacing"]

_BATCH = 1 << 24  # numbers that are counted together: bounds the copies to 128 MiB each
_SHIFT = 23 - (PER_OCTAVE.bit_length() - 1)  # float32's significand bits that do not name a bucket
_BINS = 1 << 12  # a power of two, so that a bin's place is exact in whatever arithmetic
_INFINITY = 0x7F800000
_MAGNITUDE = 0x7FFFFFFF


class Counter:
    """Counts by bucket and the largest magnitude, for a number of slots, kept on one device.

    Tensors wait until there are many of them and are counted together, since a kernel for each would cost more than its work.

    Args:
        slots: How many histograms.
        device: Where they are kept.

    Attributes:
        counts: Shape [slots, BUCKETS], int64; of what was added before the last :meth:`flush`.
        largest: Shape [slots], float32: the largest finite magnitude.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.counts = torch.zeros(slots, BUCKETS, dtype=torch.int64, device=device)
        self.largest = torch.zeros(slots, dtype=torch.float32, device=device)
        self._waiting: dict[tuple[torch.dtype, float], list[tuple[int, Tensor]]] = {}
        self._numbers = 0

    def add(self, slot: int, tensor: Tensor, divisor: float = 1.0) -> None:
        """Have a tensor's numbers counted into a slot.

        Args:
            slot: Which histogram.
            tensor: In one dimension, as :func:`sampled` gives it, on the counter's device; it may not change before the next
                flush. Magnitudes beyond float32 count as infinite.
            divisor: What the numbers are divided by first, such as the loss scale.
        """
        if not tensor.numel():
            return
        self._waiting.setdefault((tensor.dtype, divisor), []).append((slot, tensor))
        self._numbers += tensor.numel()
        if self._numbers >= _BATCH:
            self.flush()

    @torch.no_grad()
    def flush(self) -> None:
        """Count what waits, with no synchronisation of the device."""
        waiting, self._waiting, self._numbers = self._waiting, {}, 0
        for (_, divisor), parts in waiting.items():
            self._count(parts, divisor)

    def _count(self, parts: Sequence[tuple[int, Tensor]], divisor: float) -> None:
        """Count tensors of one dtype; neighbours of the same slot count as one."""
        slots: list[int] = []
        lengths: list[int] = []
        for slot, part in parts:
            if slots and slots[-1] == slot:
                lengths[-1] += part.numel()
            else:
                slots.append(slot)
                lengths.append(part.numel())
        numbers = torch.cat([part for _, part in parts]).to(torch.float32)
        if divisor != 1.0:
            numbers.div_(divisor)
        bits = numbers.view(torch.int32).bitwise_and_(_MAGNITUDE).clamp_(max=_INFINITY + 1)
        finite = torch.where(bits < _INFINITY, bits, 0).view(torch.float32)
        largest = torch.stack(norms(finite.split(lengths), math.inf))
        bits.add_(bits >= _INFINITY, alpha=1 << _SHIFT)
        bits.add_((1 << _SHIFT) - 1).bitwise_right_shift_(_SHIFT)
        rows = torch.stack([_histogram(one) for one in bits.split(lengths)])
        index = index_on(slots, self.counts.device)
        self.counts.index_add_(0, index, rows.long())
        self.largest.scatter_reduce_(0, index, largest, "amax")


def _histogram(buckets: Tensor) -> Tensor:
    """Return how often each bucket occurs; ``bincount`` waits for a GPU, and ``histc`` takes no integers on a CPU."""
    if buckets.device.type == "cpu":
        return torch.bincount(buckets, minlength=BUCKETS)
    return torch.histc(buckets, bins=_BINS, min=0, max=_BINS)[:BUCKETS]


def index_on(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Return row numbers as int64 on a device, without waiting for it: from pageable memory a copy would."""
    rows = torch.tensor(numbers, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return rows.to(device, non_blocking=True)


def dense_view(tensor: Tensor) -> Tensor:
    """Return a tensor's numbers in one dimension, in any order: without a copy if they lie densely in memory."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    permuted = tensor.permute(order)
    return permuted.view(-1) if permuted.is_contiguous() else tensor.reshape(-1)


def spacing(numbers: int, limit: int) -> int:
    """Return the distance between sampled numbers, for at most ``limit`` of them.

    It has no divisor in common with how many there are, nor so with any axis: samples come from every channel, row and
    column in turn, whatever the layout.
    """
    if numbers <= limit:
        return 1
    distance = -(-numbers // limit)
    while math.gcd(distance, numbers) > 1:
        distance += 1
    return distance


def sampled(tensor: Tensor, limit: int) -> Tensor:
    """Return a copy of a tensor's numbers in one dimension, or of a sample of them if there are more than ``limit``.

    The sample is at most ``limit`` numbers, evenly spaced in memory, and the tensor's least and greatest: the largest
    magnitude is exact, and if a number anywhere is infinite or NaN, so is one of the sample.

    Args:
        tensor: Floating point or complex (real and imaginary parts count apart), any shape.
        limit: How many.
    """
    tensor = tensor.detach()
    flat = dense_view(torch.view_as_real(tensor) if tensor.is_complex() else tensor)
    if flat.dtype.itemsize == 1:  # PyTorch computes little with 8 bits
        flat = flat.float()
    if flat.numel() <= limit:
        return flat.clone()
    least, greatest = torch.aminmax(flat)  # one pass; both are NaN if any number is
    return torch.cat([flat[:: spacing(flat.numel(), limit)], least.view(1), greatest.view(1)])
