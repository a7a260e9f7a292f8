"""Triton kernels: encode, decode and cast of narrow floating-point formats, rounded to nearest even, in one pass.

The kernels work on the bits of float32. Adding a power of two whose last digit is the format's rounds a magnitude exactly
as the addition rounds, to nearest even; what was added is then taken from the bits, and whole steps are left. One text,
compiled once per format, serves them all.
"""
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# Triton's language has no types that a checker could follow.

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl

from narrowcast.formats.arrays import code_dtype
from narrowcast.formats.kinds import ElementFormat, Format
from narrowcast.formats.rules import NanInput, Rounding, Rules
from narrowcast.formats.triton_specs import Steps, Values, has_steps, has_values

__all__ = [
    "cast",
    "casts",
    "code_of",
    "decode",
    "decodes",
    "encode",
    "magnitude_code",
    "on",
    "readable",
    "takes",
    "value_of",
    "word_of",
]

_TILE = 4096
_WARPS = 4
_NOWHERE = (1 << 63) - 1  # no NaN found


def readable(x: torch.Tensor) -> bool:
    """Return whether kernels read the tensor's numbers."""
    strided = x.layout is torch.strided and not x.is_neg()
    return strided and x.numel() > 0 and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def takes(x: torch.Tensor, format: ElementFormat, rules: Rules) -> bool:
    """Return whether :func:`encode` does just that."""
    return readable(x) and rules.rounding is Rounding.NEAREST_EVEN and has_steps(format)


def casts(x: torch.Tensor, format: ElementFormat, rules: Rules) -> bool:
    """Return whether :func:`cast` does just that."""
    return takes(x, format, rules) and has_values(format)


def decodes(codes: torch.Tensor, format: ElementFormat, dtype: str) -> bool:
    """Return whether :func:`decode` does just that; codes of 8 bits need no check."""
    known = has_values(format) and format.bits == 8
    return known and dtype == "float32" and codes.dtype is torch.uint8 and codes.numel() > 0


def encode(x: torch.Tensor, format: Format, rules: Rules) -> tuple[torch.Tensor, int]:
    """Return the codes of contiguous numbers, and the position of a NaN that has no place (-1 without one)."""
    codes = torch.empty(x.shape, dtype=getattr(torch, code_dtype(format.bits)), device=x.device)
    plain = codes if format.bits <= 8 else codes.view(torch.int16)
    return codes, _run(_encode, x, plain, format, rules)


def cast(x: torch.Tensor, format: Format, rules: Rules) -> tuple[torch.Tensor, int]:
    """Return contiguous numbers rounded to the format's, and the position of a NaN that has no place."""
    rounded = torch.empty_like(x)
    return rounded, _run(_cast, x, rounded, format, rules, values=Values.of(format))


def decode(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """Return the float32 values of contiguous uint8 codes."""
    numbers = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    count = codes.numel()
    with on(codes):
        _decode[(triton.cdiv(count, _TILE),)](
            codes, numbers, count, values=Values.of(format), tile=_TILE, num_warps=_WARPS
        )
    return numbers


def _run(kernel: Any, x: torch.Tensor, out: torch.Tensor, format: Format, rules: Rules, **more: Any) -> int:
    check = not format.has_nan and rules.nan is NanInput.ERROR
    lost = torch.full((1,), _NOWHERE, dtype=torch.int64, device=x.device) if check else x
    count = x.numel()
    with on(x):
        kernel[(triton.cdiv(count, _TILE),)](
            x, out, lost, count, steps=Steps.of(format, rules), check=check, tile=_TILE, num_warps=_WARPS, **more
        )
    place = int(lost.item()) if check else _NOWHERE
    return -1 if place == _NOWHERE else place


def on(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which a kernel runs on ``x``'s device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@triton.jit
def word_of(x):
    """Return the bits of numbers as float32, in int32; a NaN keeps its payload."""
    if x.dtype == tl.float32:
        word = x.to(tl.int32, bitcast=True)
    elif x.dtype == tl.bfloat16:
        word = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
    else:
        half = x.to(tl.int16, bitcast=True).to(tl.int32)
        lost = ((half >> 15) << 31) | 0x7F800000 | ((half & 0x3FF) << 13)
        word = tl.where((half & 0x7FFF) > 0x7C00, lost, x.to(tl.float32).to(tl.int32, bitcast=True))
    return word


@triton.jit
def magnitude_code(bits, steps: tl.constexpr):
    """Return the codes of magnitudes below the limit, given as the bits of float32, as if the largest had no end."""
    binade = tl.maximum(bits & 0x7F800000, steps.lowest)
    added = binade + (steps.dropped << 23)
    total = bits.to(tl.float32, bitcast=True) + added.to(tl.float32, bitcast=True)
    return total.to(tl.int32, bitcast=True) - added + ((binade - steps.lowest) >> steps.dropped)


@triton.jit
def code_of(word, steps: tl.constexpr):
    """Return the codes of numbers given as the bits of float32."""
    bits = word & 0x7FFFFFFF
    code = magnitude_code(tl.minimum(bits, steps.limit), steps)
    code = tl.where(code > steps.max_code, steps.too_large, code)
    if steps.infinite != steps.too_large:
        code = tl.where(bits >= 0x7F800000, steps.infinite, code)
    nan = tl.full(bits.shape, steps.nan, tl.int32)
    if steps.payload:
        nan = nan | ((bits & 0x7FFFFF) >> steps.dropped)
    code = tl.where(bits > 0x7F800000, nan, code)
    sign = (word >> steps.sign_shift) & steps.sign
    if steps.one_zero:
        sign = tl.where((code != 0) & (code != steps.sign), sign, 0)
    elif not steps.signed_nan:
        sign = tl.where(bits > 0x7F800000, 0, sign)
    return code | sign


@triton.jit
def value_of(code, values: tl.constexpr):
    """Return the bits of float32 that codes, in int32, stand for; a NaN is quiet."""
    magnitude = code & values.mask
    placed = magnitude << values.shift
    # As a float32 this is the value with float32's bias: subnormal where the format's is, so multiplying normalises it.
    bits = (placed.to(tl.float32, bitcast=True) * values.rescale).to(tl.int32, bitcast=True)
    if values.ieee:
        fraction = placed & 0x7FFFFF
        special = tl.where(fraction != 0, fraction | 0x7FC00000, 0x7F800000)
        bits = tl.where(magnitude > values.max_code, special, bits)
    if values.all_ones:
        bits = tl.where(magnitude > values.max_code, 0x7FC00000, bits)
    bits = bits | ((code & values.sign) << values.sign_shift)
    if values.one_zero:
        bits = tl.where(code == values.sign, 0x7FC00000, bits)
    return bits


@triton.jit
def _narrowed(bits, dtype: tl.constexpr):
    """Return float32 bits as numbers of ``dtype``, rounded to nearest even; a quiet NaN keeps what fits of its payload."""
    number = bits.to(tl.float32, bitcast=True)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if dtype == tl.float32:
        result = number
    elif dtype == tl.bfloat16:
        kept = (bits >> 16).to(tl.int16)
        result = tl.where(nan, kept, number.to(tl.bfloat16).to(tl.int16, bitcast=True)).to(tl.bfloat16, bitcast=True)
    else:
        kept = (((bits >> 31) << 15) | 0x7E00 | ((bits & 0x7FFFFF) >> 13)).to(tl.int16)
        result = tl.where(nan, kept, number.to(tl.float16).to(tl.int16, bitcast=True)).to(tl.float16, bitcast=True)
    return result


@triton.jit
def _coded(x_ptr, lost_ptr, start, offsets, inside, steps: tl.constexpr, check: tl.constexpr):
    """Return the codes of a tile; the first NaN that has no place is noted."""
    word = word_of(tl.load(x_ptr + start + offsets, mask=inside, other=0.0))
    if check:
        nan = ((word & 0x7FFFFFFF) > 0x7F800000) & inside
        tl.atomic_min(lost_ptr + offsets * 0, start + offsets, mask=nan, sem="relaxed")
    return code_of(word, steps)


@triton.jit
def _encode(x_ptr, codes_ptr, lost_ptr, count, steps: tl.constexpr, check: tl.constexpr, tile: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * tile
    offsets = tl.arange(0, tile)
    inside = offsets < count - start
    code = _coded(x_ptr, lost_ptr, start, offsets, inside, steps, check)
    tl.store(codes_ptr + start + offsets, code.to(codes_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _cast(
    x_ptr,
    rounded_ptr,
    lost_ptr,
    count,
    steps: tl.constexpr,
    values: tl.constexpr,
    check: tl.constexpr,
    tile: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * tile
    offsets = tl.arange(0, tile)
    inside = offsets < count - start
    bits = value_of(_coded(x_ptr, lost_ptr, start, offsets, inside, steps, check), values)
    tl.store(rounded_ptr + start + offsets, _narrowed(bits, rounded_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _decode(codes_ptr, numbers_ptr, count, values: tl.constexpr, tile: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * tile
    offsets = tl.arange(0, tile)
    inside = offsets < count - start
    code = tl.load(codes_ptr + start + offsets, mask=inside, other=0).to(tl.int32)
    tl.store(numbers_ptr + start + offsets, value_of(code, values).to(tl.float32, bitcast=True), mask=inside)
