"""Triton kernels: unscale, norm, clip and AdamW over all parameters in two passes that wait for nothing.

The first pass reads every gradient once and leaves a partial sum of squares per chunk; a small kernel adds them in a fixed
order, decides whether the update counts, and moves the step counters; the second pass reads that on the device and updates.
A table of addresses on the device lets one launch serve all tensors of a kind. The arithmetic is that of
``adamw_reference``, rounded as IEEE 754 says: no product is fused into a sum.
"""
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# Triton's language has no types that a checker could follow.

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import triton
import triton.language as tl

from narrowcast.training.adamw_reference import LARGEST_SQUARE, NAN, Group, Verdict
from narrowcast.training.adamw_tables import Launch, Layout, Tables

__all__ = ["Kernels"]

_CHUNK = 16384  # elements that one program works on, in tiles; fewer than NAN, so that counts of both kinds fit
_TILE = 1024
_WARPS = 4

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Kernels:
    """The update of ``adamw_reference.update`` by kernels; it keeps the tables while no tensor moves."""

    def __init__(self) -> None:
        self._tables: Tables | None = None

    def update(
        self,
        groups: Sequence[Group],
        steps: torch.Tensor,
        inverse_scale: torch.Tensor,
        clip_norm: float | None,
        *,
        zero: bool,
    ) -> Verdict:
        """As :func:`narrowcast.training.adamw_reference.update`."""
        device = steps.device
        norm, factor = torch.empty(2, dtype=torch.float32, device=device).unbind()
        finite = torch.empty((), dtype=torch.bool, device=device)
        if self._tables is None:
            self._tables = Tables(device, _CHUNK)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            layout = self._tables.of(groups)
            sums, corrections = _measure(layout, inverse_scale, device)
            _decide[(1,)](
                *(*sums, len(layout.chunk_rows)),
                *(inverse_scale, float("inf") if clip_norm is None else float(clip_norm)),
                *(steps, layout.places, layout.logarithms, corrections, len(layout.rows)),
                *(norm, factor, finite),
                largest=LARGEST_SQUARE,
                block=1024,
                num_warps=8,
            )
            for launch in layout.launches:
                _run(launch, groups[launch.group], layout, steps, corrections, factor, finite, zero)
        return Verdict(norm, finite, sums[1], layout.chunk_members)


def _measure(
    layout: Layout, inverse_scale: torch.Tensor, device: torch.device
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Run the first pass; return each chunk's sum of squares and non-finite elements, and room for the corrections."""
    count = len(layout.chunk_rows)
    sums = torch.empty(count, dtype=torch.float32, device=device)
    broken = torch.empty(count, dtype=torch.int32, device=device)
    for (gradient, aligned), same in groupby(layout.launches, key=lambda launch: (launch.gradient, launch.aligned)):
        joined = list(same)
        _sum_squares[(sum(launch.chunks for launch in joined),)](
            *(layout.addresses[1], layout.lengths, layout.chunk_rows, layout.chunk_starts, joined[0].first),
            *(inverse_scale, sums, broken),
            dtype=_DTYPES[gradient],
            nan=NAN,
            **_shape(aligned, gradient),
        )
    return (sums, broken), torch.empty(len(layout.rows), 2, dtype=torch.float32, device=device)


def _run(
    launch: Launch,
    group: Group,
    layout: Layout,
    steps: torch.Tensor,
    corrections: torch.Tensor,
    factor: torch.Tensor,
    finite: torch.Tensor,
    zero: bool,
) -> None:
    """Run the second pass over one launch's chunks."""
    beta1, beta2 = group.betas
    _update[(launch.chunks,)](
        *(layout.addresses, len(layout.rows), layout.lengths, layout.chunk_rows, layout.chunk_starts, launch.first),
        *(layout.indices, layout.places, steps, corrections, factor, finite),
        *(float(group.lr), 1 - group.lr * group.weight_decay, 1 - beta1, float(beta2), 1 - beta2, float(group.eps)),
        group.seed,
        parameter_dtype=_DTYPES[launch.parameter],
        gradient_dtype=_DTYPES[launch.gradient],
        compensated=launch.compensated,
        stochastic=group.stochastic and launch.parameter is torch.bfloat16,
        zero=zero,
        **_shape(launch.aligned, launch.gradient, launch.parameter),
    )


def _shape(aligned: bool, *dtypes: torch.dtype) -> dict[str, Any]:
    """Return how a program works; eight neighbours where a thread's 16 bytes may hold as many."""
    vector = 16 // min(dtype.itemsize for dtype in dtypes)
    return {
        "aligned": aligned,
        "chunk": _CHUNK,
        "tile": _TILE,
        "vector": vector,
        "num_warps": _WARPS,
        "enable_fp_fusion": False,
    }


@triton.jit
def _pointer(addresses_ptr, row, start, dtype: tl.constexpr, aligned: tl.constexpr):
    """Return the address of element ``start`` of a row's tensor."""
    pointer = tl.load(addresses_ptr + row).to(tl.pointer_type(dtype)) + start
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _read(pointer, offsets, count, masked: tl.constexpr):
    """Return numbers as float32; zeros beyond ``count`` if masked."""
    x = tl.load(pointer + offsets, mask=offsets < count, other=0) if masked else tl.load(pointer + offsets)
    if x.dtype == tl.bfloat16:  # the interpreter knows no such numbers
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _write(pointer, offsets, values, count, masked: tl.constexpr):
    if masked:
        tl.store(pointer + offsets, values, mask=offsets < count)
    else:
        tl.store(pointer + offsets, values)


@triton.jit
def _offsets(tile: tl.constexpr, vector: tl.constexpr):
    """Return a tile's offsets, shape [groups, vector]: neighbours in a row are one thread's."""
    return tl.arange(0, tile // vector)[:, None] * vector + tl.arange(0, vector)[None, :]


@triton.jit
def _add_squares(total, broken, pointer, offsets, count, inverse, masked: tl.constexpr, nan: tl.constexpr):
    gradient = _read(pointer, offsets, count, masked)
    bits = gradient.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    lost = (bits >= 0x7F800000).to(tl.int32) + (bits > 0x7F800000).to(tl.int32) * (nan - 1)
    unscaled = gradient * inverse
    return total + unscaled * unscaled, broken + lost


@triton.jit(do_not_specialize=["first"])
def _sum_squares(
    addresses_ptr,
    lengths_ptr,
    chunk_rows_ptr,
    chunk_starts_ptr,
    first,
    inverse_ptr,
    sums_ptr,
    broken_ptr,
    dtype: tl.constexpr,
    aligned: tl.constexpr,
    chunk: tl.constexpr,
    tile: tl.constexpr,
    vector: tl.constexpr,
    nan: tl.constexpr,
):
    """Write a chunk's sum of squares of unscaled gradients, and its infinite elements plus ``nan`` for each NaN."""
    number = first + tl.program_id(0)
    row = tl.load(chunk_rows_ptr + number)
    start = tl.load(chunk_starts_ptr + number)
    count = tl.minimum(tl.load(lengths_ptr + row) - start, chunk).to(tl.int32)
    pointer = _pointer(addresses_ptr, row, start, dtype, aligned)
    inverse = tl.load(inverse_ptr)
    offsets = _offsets(tile, vector)
    total = tl.zeros([tile // vector, vector], tl.float32)
    broken = tl.zeros([tile // vector, vector], tl.int32)
    whole = count // tile * tile
    for at in range(0, whole, tile):
        total, broken = _add_squares(total, broken, pointer + at, offsets, count, inverse, False, nan)
    if whole < count:
        total, broken = _add_squares(total, broken, pointer + whole, offsets, count - whole, inverse, True, nan)
    tl.store(sums_ptr + number, tl.sum(total))
    tl.store(broken_ptr + number, tl.sum(broken))


@triton.jit(do_not_specialize=["chunks", "rows"])
def _decide(
    sums_ptr,
    broken_ptr,
    chunks,
    inverse_ptr,
    clip_norm,
    steps_ptr,
    places_ptr,
    logarithms_ptr,
    corrections_ptr,
    rows,
    norm_ptr,
    factor_ptr,
    finite_ptr,
    largest: tl.constexpr,
    block: tl.constexpr,
):
    """Write norm, factor and verdict; move the step counters, and write what corrects the moments' bias."""
    offsets = tl.arange(0, block)
    total = tl.zeros([block], tl.float64)
    broken = tl.zeros([block], tl.int32)
    for at in range(0, chunks, block):
        inside = at + offsets < chunks
        total += tl.load(sums_ptr + at + offsets, mask=inside, other=0.0).to(tl.float64)
        broken |= tl.load(broken_ptr + at + offsets, mask=inside, other=0)
    squared = tl.sum(total)
    norm = tl.sqrt(squared).to(tl.float32)
    finite = (tl.max(broken) == 0) & (squared <= largest)
    factor = tl.load(inverse_ptr)
    if clip_norm < float("inf"):
        factor = factor * tl.minimum(tl.div_rn(clip_norm, norm + 1e-6), 1.0)
    tl.store(norm_ptr, norm)
    tl.store(factor_ptr, factor)
    tl.store(finite_ptr, finite)
    for at in range(0, rows, block):
        row = at + offsets
        inside = row < rows
        place = tl.load(places_ptr + row, mask=inside, other=0)
        step = tl.load(steps_ptr + place, mask=inside, other=0.0) + finite.to(tl.float32)
        tl.store(steps_ptr + place, step, mask=inside)
        exact = step.to(tl.float64)
        log1 = tl.load(logarithms_ptr + 2 * row, mask=inside, other=0.0)
        log2 = tl.load(logarithms_ptr + 2 * row + 1, mask=inside, other=0.0)
        first = 1.0 / (1.0 - tl.exp(exact * log1))
        second = 1.0 / tl.sqrt(1.0 - tl.exp(exact * log2))
        tl.store(corrections_ptr + 2 * row, first.to(tl.float32), mask=inside)
        tl.store(corrections_ptr + 2 * row + 1, second.to(tl.float32), mask=inside)


@triton.jit
def _nearest(value):
    """Return the bits of BF16 numbers, in int32, rounded to nearest even."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(value == value, rounded, 0x7FC0)


@triton.jit
def _stochastic(value, first_block, index, step, seed):
    """As :func:`_nearest`, rounded up with the probability that the lost digits make.

    Each row of 8 numbers shares a random block of four words; the selection by column costs nothing, as a thread's
    columns are known when it is compiled.
    """
    block = first_block + tl.arange(0, value.shape[0])
    none = block * 0
    word0, word1, word2, word3 = tl.philox(seed, block, none + index, none + step, none)
    column = tl.arange(0, 8)[None, :]
    low = tl.where(column < 2, word0[:, None], word1[:, None])
    high = tl.where(column < 6, word2[:, None], word3[:, None])
    word = tl.where(column < 4, low, high)
    half = tl.where((column & 1) == 0, word & 0xFFFF, word >> 16).to(tl.int32)
    bits = (value.to(tl.int32, bitcast=True) + half) >> 16
    return tl.where(value == value, bits, 0x7FC0)


@triton.jit
def _as_bfloat16(bits):
    """Return BF16 numbers from their bits in int32."""
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _as_float32(bits):
    """Return float32 numbers from the bits of BF16, in int32."""
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _update_tile(
    tensors,
    offsets,
    count,
    settings,
    randomness,
    compensated: tl.constexpr,
    stochastic: tl.constexpr,
    zero: tl.constexpr,
    masked: tl.constexpr,
):
    """Update one tile; ``tensors`` are pointers to its first elements."""
    parameter_ptr, gradient_ptr, first_ptr, second_ptr, compensation_ptr = tensors
    factor, rate, correction, keep, gain1, beta2, gain2, eps = settings
    gradient = _read(gradient_ptr, offsets, count, masked) * factor
    first = _read(first_ptr, offsets, count, masked)
    second = _read(second_ptr, offsets, count, masked)
    value = _read(parameter_ptr, offsets, count, masked)
    if compensated:
        value = value + _read(compensation_ptr, offsets, count, masked)
    first = first + (gradient - first) * gain1
    second = second * beta2 + (gradient * gradient) * gain2
    divisor = tl.sqrt_rn(second) * correction + eps
    value = value * keep - tl.div_rn(first, divisor) * rate
    _write(first_ptr, offsets, first, count, masked)
    _write(second_ptr, offsets, second, count, masked)
    if parameter_ptr.dtype.element_ty == tl.bfloat16:
        if stochastic:
            start, index, step, seed = randomness
            bits = _stochastic(value, start, index, step, seed)
        else:
            bits = _nearest(value)
        _write(parameter_ptr, offsets, _as_bfloat16(bits), count, masked)
        if compensated:
            lost = _nearest(value - _as_float32(bits))
            _write(compensation_ptr, offsets, _as_bfloat16(lost), count, masked)
    else:
        _write(parameter_ptr, offsets, value, count, masked)
    if zero:
        _write(gradient_ptr, offsets, tl.zeros_like(gradient).to(gradient_ptr.dtype.element_ty), count, masked)


@triton.jit(do_not_specialize=["rows", "launch", "seed"])
def _update(
    addresses_ptr,
    rows,
    lengths_ptr,
    chunk_rows_ptr,
    chunk_starts_ptr,
    launch,
    indices_ptr,
    places_ptr,
    steps_ptr,
    corrections_ptr,
    factor_ptr,
    finite_ptr,
    lr,
    keep,
    gain1,
    beta2,
    gain2,
    eps,
    seed,
    parameter_dtype: tl.constexpr,
    gradient_dtype: tl.constexpr,
    compensated: tl.constexpr,
    stochastic: tl.constexpr,
    zero: tl.constexpr,
    aligned: tl.constexpr,
    chunk: tl.constexpr,
    tile: tl.constexpr,
    vector: tl.constexpr,
):
    """Update a chunk if every gradient is finite; otherwise write nothing but zeros into gradients, if asked to.

    The names of the settings: keep = 1 - lr * weight_decay, gain1 = 1 - beta1, gain2 = 1 - beta2.
    """
    number = launch + tl.program_id(0)
    row = tl.load(chunk_rows_ptr + number)
    start = tl.load(chunk_starts_ptr + number)
    count = tl.minimum(tl.load(lengths_ptr + row) - start, chunk).to(tl.int32)
    whole = count // tile * tile
    offsets = _offsets(tile, vector)
    gradient = _pointer(addresses_ptr + rows, row, start, gradient_dtype, aligned)
    if tl.load(finite_ptr):
        parameter = _pointer(addresses_ptr, row, start, parameter_dtype, aligned)
        first = _pointer(addresses_ptr + 2 * rows, row, start, tl.float32, aligned)
        second = _pointer(addresses_ptr + 3 * rows, row, start, tl.float32, aligned)
        low = _pointer(addresses_ptr + 4 * rows, row, start, tl.bfloat16, aligned)
        factor = tl.load(factor_ptr)
        rate = tl.load(corrections_ptr + 2 * row) * lr
        settings = (factor, rate, tl.load(corrections_ptr + 2 * row + 1), keep, gain1, beta2, gain2, eps)
        index = tl.load(indices_ptr + row)
        step = tl.load(steps_ptr + tl.load(places_ptr + row)).to(tl.int32)
        for at in range(0, whole, tile):
            tensors = (parameter + at, gradient + at, first + at, second + at, low + at)
            random = (((start + at) // 8).to(tl.int32), index, step, seed)
            _update_tile(tensors, offsets, tile, settings, random, compensated, stochastic, zero, False)
        if whole < count:
            tensors = (parameter + whole, gradient + whole, first + whole, second + whole, low + whole)
            random = (((start + whole) // 8).to(tl.int32), index, step, seed)
            _update_tile(tensors, offsets, count - whole, settings, random, compensated, stochastic, zero, True)
    elif zero:
        none = tl.zeros([tile // vector, vector], gradient_dtype)
        for at in range(0, count, tile):
            tl.store(gradient + at + offsets, none, mask=offsets < count - at)
