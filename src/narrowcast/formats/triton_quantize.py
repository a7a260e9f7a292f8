"""Triton kernels: tensors to packed codes with scales, each element read once (twice where a scale spans programs).

Rows that share a scale lie one after the other. Short ones (blocks) are scaled and encoded in one kernel; for long ones a
first kernel finds the largest magnitudes. Divisions are rounded as IEEE 754 says: the codes are the CPU's, bit for bit.
"""
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# Triton's language has no types that a checker could follow.

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from narrowcast.formats.kinds import Codebook
from narrowcast.formats.rows import Rows
from narrowcast.formats.scales import element_max
from narrowcast.formats.scheme import Scheme
from narrowcast.formats.triton_codec import magnitude_code, on, readable, word_of
from narrowcast.formats.triton_specs import LONGEST_BLOCK, Elements, Scales, edge_words, fits, scale_kind

__all__ = ["quantize", "takes"]

_TILE = 4096
_WARPS = 4
_NOWHERE = (1 << 63) - 1  # no broken row found


def takes(x: torch.Tensor, scheme: Scheme, layout: Rows) -> bool:
    """Return whether :func:`quantize` does just what the scheme says."""
    kind = scale_kind(scheme)
    if kind is None or (
        kind != "fp32" and isinstance(scheme.element, Codebook)
    ):  # a broken block's code is not 0 there
        return False
    plain = (
        scheme.range == "minmax" and scheme.rounding == "nearest_even" and scheme.symmetric and not scheme.double_quant
    )
    return plain and readable(x) and fits(layout, scheme) and Elements.of(scheme.element, fused=True) is not None


def quantize(x: torch.Tensor, scheme: Scheme, layout: Rows) -> tuple[torch.Tensor, torch.Tensor, float, int]:
    """Return what :class:`~narrowcast.formats.device.Packed` holds, of a contiguous tensor."""
    bits, count, length = scheme.element.bits, layout.count, layout.length
    fp32 = scale_kind(scheme) == "fp32"
    codes = torch.empty(x.numel() // 2 if bits == 4 else x.numel(), dtype=torch.uint8, device=x.device)
    scales = torch.empty(layout.scale_shape, dtype=torch.float32 if fp32 else torch.uint8, device=x.device)
    broken = torch.full((1,), _NOWHERE, dtype=torch.int64, device=x.device) if fp32 else scales
    largest = torch.zeros(1, dtype=torch.int32, device=x.device) if scheme.tensor_scale else scales
    fused = not triton.knobs.runtime.interpret  # interpreted, a fused multiply-add rounds twice
    elements = Elements.of(scheme.element, fused=fused)
    guessed = elements is not None and elements.guess is not None
    edges = _edges(scheme.element, str(x.device)) if guessed else scales
    known: dict[str, Any] = {
        "elements": elements,
        "scales": Scales.of(scheme, fused=fused),
        "num_warps": _WARPS,
    }
    with on(x):
        answer = None
        if scheme.tensor_scale:
            _find_largest(x, largest, 1, x.numel(), finite=True)
            answer = _on_its_way(largest)
        if length <= LONGEST_BLOCK:
            rows, vector = _TILE // length, 16 // x.element_size()
            _quantize_blocks[(triton.cdiv(count, rows),)](
                x,
                codes.view(torch.int32),
                scales,
                broken,
                largest,
                edges,
                count,
                block=length,
                rows=rows,
                vector=vector,
                **known,
            )
        else:
            magnitudes = torch.zeros(count, dtype=torch.int32, device=x.device)
            _find_largest(x, magnitudes, count, length, finite=False)
            chunks = triton.cdiv(length, _TILE)
            _quantize_rows[(count * chunks,)](
                x, codes, scales, broken, largest, magnitudes, length, chunks, tile=_TILE, **known
            )
    tensor_scale = 1.0 if answer is None else _tensor_scale(answer(), scheme)
    first = int(broken.item()) if fp32 else _NOWHERE
    return codes if bits in (4, 8) else _pack(codes, bits), scales, tensor_scale, -1 if first == _NOWHERE else first


def _on_its_way(number: torch.Tensor) -> Callable[[], int]:
    """Have a number copied to main memory behind what its device has to do by now.

    Returns:
        What waits for the number, and for nothing that the device was given after it.
    """
    if not number.is_cuda:
        return lambda: int(number.item())
    there = torch.empty(number.shape, dtype=number.dtype, pin_memory=True)
    there.copy_(number, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> int:
        arrived.synchronize()
        return int(there.item())

    return wait


@lru_cache(maxsize=64)
def _edges(element: Codebook, device: str) -> torch.Tensor:
    return torch.from_numpy(edge_words(element)).to(device)


def _find_largest(x: torch.Tensor, out: torch.Tensor, count: int, length: int, *, finite: bool) -> None:
    chunks = triton.cdiv(length, 2 * _TILE)
    _largest_of_rows[(count * chunks,)](x, out, length, chunks, finite=finite, tile=2 * _TILE, num_warps=_WARPS)


def _tensor_scale(bits: int, scheme: Scheme) -> float:
    """Return the tensor's scale as the kernel computed it, from the bits of the largest magnitude."""
    largest = np.array([bits], np.int32).view(np.float32)[0]
    wanted = largest / np.float32(element_max(scheme) * scheme.scale.max)
    return float(max(wanted, np.finfo(np.float32).tiny)) if bits else 1.0


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return uint8 codes without gaps, as ``packing.pack`` does: eight codes become ``bits`` bytes."""
    count = codes.numel()
    whole = torch.nn.functional.pad(codes, (0, -count % 8)).view(-1, 8).to(torch.int64)
    places = torch.arange(8, device=codes.device) * bits
    spread = (whole << places).sum(dim=1).view(torch.uint8).view(-1, 8)[:, :bits]
    return spread.reshape(-1)[: -(-count * bits // 8)].contiguous()


@triton.jit
def _largest_of_rows(x_ptr, out_ptr, length, chunks, finite: tl.constexpr, tile: tl.constexpr):
    """Write the largest magnitude of each row, as the bits of float32: NaN's are larger than any number's."""
    program = tl.program_id(0)
    row = program // chunks
    start = (program % chunks).to(tl.int64) * tile
    offsets = tl.arange(0, tile)
    x = tl.load(x_ptr + row.to(tl.int64) * length + start + offsets, mask=offsets < length - start, other=0.0)
    bits = word_of(x) & 0x7FFFFFFF
    if finite:
        bits = tl.where(bits < 0x7F800000, bits, 0)
    tl.atomic_max(out_ptr + row, tl.max(bits, axis=0), sem="relaxed")


@triton.jit
def _tensor_scale_of(largest_ptr, scales: tl.constexpr):
    if scales.tensor_max == 0.0:
        scale = 1.0
    else:
        bits = tl.load(largest_ptr)
        wanted = tl.div_rn(bits.to(tl.float32, bitcast=True), scales.tensor_max)
        scale = tl.where(bits == 0, 1.0, tl.maximum(wanted, 1.1754943508222875e-38))  # float32's smallest normal number
    return scale


@triton.jit
def _scale_of(bits, tensor_scale, scales: tl.constexpr):
    """Return, for rows of these largest magnitudes: the scale as stored, what to divide by, and whether it is broken.

    For a power of two, the second is what to multiply by.
    """
    largest = bits.to(tl.float32, bitcast=True)
    if scales.kind == "e8m0":
        # One more binade below the normal numbers, down to the smallest scale.
        word = tl.where(bits >= 0x800000, bits, tl.maximum((bits << 1) - 0x800000, 0))
        exponent = tl.minimum(tl.maximum(((word + scales.carry) >> 23) - scales.exponent, 0), 254)
        broken = bits >= 0x7F800000
        stored = tl.where(broken, 255, exponent).to(tl.uint8)
        inverse = tl.where(exponent == 254, 0x00400000, (254 - exponent) << 23)
        factor = inverse.to(tl.float32, bitcast=True)
    elif scales.kind == "e4m3fn":
        steps: tl.constexpr = scales.steps
        wanted = tl.div_rn(largest, tensor_scale * scales.largest)
        word = tl.maximum(wanted, 0.001953125).to(tl.int32, bitcast=True)  # no block loses its scale to rounding
        broken = wanted.to(tl.int32, bitcast=True) >= 0x7F800000
        code = tl.minimum(magnitude_code(tl.minimum(word, steps.limit), steps), steps.max_code)
        code = tl.where(bits == 0, 0, code)
        stored = tl.where(broken, steps.nan, code).to(tl.uint8)
        factor = (code << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36 * tensor_scale  # 2**120
        factor = tl.where(factor == 0.0, 1.0, factor)
    else:
        stored = largest
        if scales.largest != 1.0:
            stored = tl.div_rn(largest, scales.largest)
        broken = stored.to(tl.int32, bitcast=True) >= 0x7F800000
        factor = tl.where(stored == 0.0, 1.0, stored)
    return stored, factor, broken


@triton.jit
def _scaled(word, factor, scales: tl.constexpr):
    """Return numbers, given as bits, over their rows' factors, rounded once; the factors are broadcast."""
    number = word.to(tl.float32, bitcast=True)
    if scales.kind == "e8m0":
        quotient = number * factor
    elif scales.fused:
        # Markstein's theorem: two corrections of the product with a rounded reciprocal are the rounded quotient.
        number, divisor = _normalised(word, -factor)
        reciprocal = tl.div_rn(-1.0, divisor)
        quotient = number * reciprocal
        quotient = tl.fma(tl.fma(quotient, divisor, number), reciprocal, quotient)
        quotient = tl.fma(tl.fma(quotient, divisor, number), reciprocal, quotient)
    else:
        quotient = tl.div_rn(number, factor)
    return quotient


@triton.jit
def _element_codes(word, scaled, elements: tl.constexpr):
    """Return the codes, in int32, of scaled numbers; ``word`` holds their signs."""
    if elements.kind == "float":
        steps: tl.constexpr = elements.steps
        code = tl.minimum(magnitude_code(scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF, steps), steps.max_code)
        sign = (word >> steps.sign_shift) & steps.sign
        if steps.one_zero:
            sign = tl.where(code != 0, sign, 0)
        code = code | sign
    elif elements.kind == "integer":
        clamped = tl.minimum(tl.maximum(scaled * elements.factor, elements.low), elements.high)
        code = (clamped + 12582912.0).to(tl.int32, bitcast=True) & elements.mask  # 1.5 * 2**23: whole steps are left
    else:
        code = _codebook_codes(scaled, elements)
    return code


@triton.jit
def _codebook_codes(x, elements: tl.constexpr):
    """Return how many of 15 edges lie below each number."""
    e: tl.constexpr = elements.edges
    upper = x > e[7]
    four = x > tl.where(upper, e[11], e[3])
    two = x > tl.where(upper, tl.where(four, e[13], e[9]), tl.where(four, e[5], e[1]))
    high = tl.where(four, tl.where(two, e[14], e[12]), tl.where(two, e[10], e[8]))
    low = tl.where(four, tl.where(two, e[6], e[4]), tl.where(two, e[2], e[0]))
    one = x > tl.where(upper, high, low)
    return tl.where(upper, 8, 0) + tl.where(four, 4, 0) + tl.where(two, 2, 0) + tl.where(one, 1, 0)


@triton.jit
def _normalised(word, factor):
    """Return numbers, given as bits, and their rows' factors, times a power of two that brings the factors near one.

    There no product with a factor underflows, unless a number is too small for any code but zero's.
    """
    exponent = factor.to(tl.int32, bitcast=True) & 0x7F800000
    power = tl.maximum(0x7F000000 - exponent, 0x00800000).to(tl.float32, bitcast=True)
    return word.to(tl.float32, bitcast=True) * power, factor * power


@triton.jit
def _guessed_codes(word, factor, edges_ptr, elements: tl.constexpr):
    """Return how many edges lie below each number over its row's factor.

    That the quotient, rounded, lies above an edge is the same as that the number lies above the factor times the middle
    after the edge: it never lies on it, since that product has more digits than float32. The product is rounded down, so
    the comparison with a number of float32 is exact.
    """
    guess: tl.constexpr = elements.guess
    number, divisor = _normalised(word, factor)
    shifted = tl.fma(number, tl.div_rn(1.0, divisor), guess.shift)
    code = tl.fma(shifted, tl.fma(tl.abs(shifted), guess.bend, guess.slope), 12582912.0 + guess.start)  # 1.5 * 2**23
    edge = tl.load(edges_ptr + (code.to(tl.int32, bitcast=True) & 15))
    above = tl.inline_asm_elementwise(
        """
        {
            .reg .f32 middle;
            mul.rn.f32 middle, $2, $4;
            fma.rm.f32 middle, $2, $3, middle;
            neg.f32 middle, middle;
            fma.rn.sat.f32 $0, $1, 0f71800000, middle;
        }
        """,
        "=f,f,f,f,f",
        [
            number,
            tl.broadcast_to(divisor, number.shape),
            edge.to(tl.int32).to(tl.float32, bitcast=True),
            (edge >> 32).to(tl.int32).to(tl.float32, bitcast=True),
        ],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )
    return (code + above).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _block_codes(word, factor, edges_ptr, elements: tl.constexpr, scales: tl.constexpr):
    """Return the codes, in int32, of numbers given as bits."""
    if elements.guess is None:
        code = _element_codes(word, _scaled(word, factor, scales), elements)
    else:
        code = _guessed_codes(word, factor, edges_ptr, elements)
    return code


@triton.jit
def _packed(codes, broken, rows: tl.constexpr, length: tl.constexpr, width: tl.constexpr, masked: tl.constexpr):
    """Return codes of shape [rows, length] as bytes, two codes of four bits in each; zeros in broken rows."""
    if width == 4:
        low, high = tl.split(tl.reshape(codes, (rows, length // 2, 2)))
        codes = low | (high << 4)
    if masked:
        codes = tl.where(broken[:, None], 0, codes)
    return codes.to(tl.uint8)


@triton.jit
def _words_of_codes(codes, width: tl.constexpr):
    """Return codes of shape [rows, groups, vector] packed along the last axis, in int32 words (or a half of one)."""
    rows: tl.constexpr = codes.shape[0]
    groups: tl.constexpr = codes.shape[1]
    vector: tl.constexpr = codes.shape[2]
    if vector * width <= 32:
        words = tl.sum(codes << (tl.arange(0, vector) * width)[None, None, :], axis=2)
    else:
        halves = tl.reshape(codes, (rows, groups, 2, vector // 2))
        words = tl.sum(halves << (tl.arange(0, vector // 2) * width)[None, None, None, :], axis=3)
    return words


@triton.jit
def _quantize_blocks(
    x_ptr,
    words_ptr,
    scales_ptr,
    broken_ptr,
    largest_ptr,
    edges_ptr,
    count,
    block: tl.constexpr,
    rows: tl.constexpr,
    vector: tl.constexpr,
    elements: tl.constexpr,
    scales: tl.constexpr,
):
    """Quantise ``rows`` blocks; a thread works on 16 neighbours, read in two or four vectors of 16 bytes.

    So what a row's scale costs is shared by 16 elements, and codes are packed without leaving the thread.
    """
    first = tl.program_id(0).to(tl.int64) * rows
    row = tl.arange(0, rows)
    inside = row < count - first
    groups: tl.constexpr = block // 16
    group = row[:, None, None] * block + tl.arange(0, groups)[None, :, None] * 16
    here = x_ptr + first * block + group + tl.arange(0, vector)[None, None, :]
    within = inside[:, None, None]
    a = word_of(tl.load(here, mask=within, other=0.0))
    b = word_of(tl.load(here + vector, mask=within, other=0.0))
    largest = tl.maximum(a & 0x7FFFFFFF, b & 0x7FFFFFFF)
    if vector == 4:
        c = word_of(tl.load(here + 8, mask=within, other=0.0))
        d = word_of(tl.load(here + 12, mask=within, other=0.0))
        largest = tl.maximum(largest, tl.maximum(c & 0x7FFFFFFF, d & 0x7FFFFFFF))
    bits = tl.max(tl.max(largest, axis=2), axis=1)
    stored, factor, broken = _scale_of(bits, _tensor_scale_of(largest_ptr, scales), scales)
    tl.store(scales_ptr + first + row, stored, mask=inside)
    if scales.kind == "fp32":
        tl.atomic_min(broken_ptr + row * 0, first + row, mask=broken & inside, sem="relaxed")
    factor = factor[:, None, None]
    width: tl.constexpr = elements.width
    a = _words_of_codes(_block_codes(a, factor, edges_ptr, elements, scales), width)
    b = _words_of_codes(_block_codes(b, factor, edges_ptr, elements, scales), width)
    if vector == 4:
        c = _words_of_codes(_block_codes(c, factor, edges_ptr, elements, scales), width)
        d = _words_of_codes(_block_codes(d, factor, edges_ptr, elements, scales), width)
        if width == 4:
            words = tl.join(a | (b << 16), c | (d << 16))
        else:
            words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (rows, groups, 4))
    elif width == 4:
        words = tl.join(a, b)
    else:
        words = tl.reshape(tl.permute(tl.join(a, b), (0, 1, 3, 2)), (rows, groups, 4))
    if scales.kind != "fp32":
        words = tl.where(broken[:, None, None], 0, words)
    per_group: tl.constexpr = width // 2
    at = row[:, None, None] * (groups * per_group) + tl.arange(0, groups)[None, :, None] * per_group
    at += tl.arange(0, per_group)[None, None, :]
    tl.store(words_ptr + first * (groups * per_group) + at, words, mask=within)


@triton.jit
def _quantize_rows(
    x_ptr,
    codes_ptr,
    scales_ptr,
    broken_ptr,
    largest_ptr,
    magnitudes_ptr,
    length,
    chunks,
    tile: tl.constexpr,
    elements: tl.constexpr,
    scales: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // chunks
    start = (program % chunks).to(tl.int64) * tile
    begin = row.to(tl.int64) * length + start
    offsets = tl.arange(0, tile)[None, :]
    word = word_of(tl.load(x_ptr + begin + offsets, mask=offsets < length - start, other=0.0))
    tensor_scale = _tensor_scale_of(largest_ptr, scales)
    one = tl.arange(0, 1)  # this row's scale, as a tensor of one
    stored, factor, broken = _scale_of(tl.load(magnitudes_ptr + row + one), tensor_scale, scales)
    own = one + start == 0
    tl.store(scales_ptr + row + one, stored, mask=own)
    if scales.kind == "fp32":
        tl.atomic_min(broken_ptr + one, row.to(tl.int64) + one, mask=broken & own, sem="relaxed")
    codes = _element_codes(word, _scaled(word, factor[:, None], scales), elements)
    at = tl.arange(0, tile * elements.width // 8)[None, :]
    packed = _packed(codes, broken, 1, tile, elements.width, scales.kind != "fp32")
    tl.store(codes_ptr + begin * elements.width // 8 + at, packed, mask=at < (length - start) * elements.width // 8)
