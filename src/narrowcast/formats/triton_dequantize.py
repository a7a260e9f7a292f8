"""Triton kernels: packed codes with scales back to a tensor, each byte read once and each number written once."""
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# Triton's language has no types that a checker could follow.

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from narrowcast.formats import fast
from narrowcast.formats.kinds import ElementFormat, Format
from narrowcast.formats.rows import Rows
from narrowcast.formats.scheme import Scheme
from narrowcast.formats.triton_codec import on, value_of
from narrowcast.formats.triton_specs import LONGEST_BLOCK, Values, fits, has_values, scale_kind

__all__ = ["dequantize", "gives"]

_TILE = 4096
_WARPS = 4


def gives(packed: torch.Tensor, scales: torch.Tensor, scheme: Scheme, layout: Rows, dtype: str) -> bool:
    """Return whether :func:`dequantize` gives that tensor."""
    known = dtype in ("float32", "bfloat16", "float16") and scale_kind(scheme) is not None and scheme.element.bits <= 8
    return known and fits(layout, scheme) and scales.is_contiguous() and packed.is_contiguous()


def dequantize(
    packed: torch.Tensor, scales: torch.Tensor, scheme: Scheme, layout: Rows, tensor_scale: float, dtype: str
) -> torch.Tensor:
    """Return the tensor that a contiguous one was quantised to."""
    element, count, length = scheme.element, layout.count, layout.length
    numbers = torch.empty(layout.shape, dtype=getattr(torch, dtype), device=packed.device)
    codes = packed if element.bits in (4, 8) else _unpack(packed, element.bits, count * length)
    arithmetic = element.bits > 4 and isinstance(element, Format) and has_values(element)
    known: dict[str, Any] = {
        "width": 4 if element.bits == 4 else 8,
        "kind": scale_kind(scheme),
        "values": Values.of(element) if arithmetic else None,
        "num_warps": _WARPS,
    }
    table = packed if arithmetic else _table(element, str(packed.device))
    with on(packed):
        if length <= LONGEST_BLOCK:
            rows = _TILE // length
            _dequantize_blocks[(triton.cdiv(count, rows),)](
                codes, scales, numbers, table, tensor_scale, count, block=length, rows=rows, **known
            )
        else:
            chunks = triton.cdiv(length, _TILE)
            _dequantize_rows[(count * chunks,)](
                codes, scales, numbers, table, tensor_scale, length, chunks, tile=_TILE, **known
            )
    return numbers


@lru_cache(maxsize=64)
def _table(element: ElementFormat, device: str) -> torch.Tensor:
    """Return the values of all codes on the device: shape [2**bits], float32."""
    codes = np.arange(1 << element.bits, dtype=np.uint8)
    return torch.from_numpy(fast.decode(codes, element, "float32")).to(device)


def _unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return codes as ``packing.unpack`` does: shape [count], uint8."""
    whole = torch.nn.functional.pad(packed, (0, -packed.numel() % bits)).view(-1, bits)
    words = torch.nn.functional.pad(whole, (0, 8 - bits)).view(torch.int64)
    places = torch.arange(8, device=packed.device) * bits
    return ((words >> places) & ((1 << bits) - 1)).to(torch.uint8).view(-1)[:count]


@triton.jit
def _scale_values(stored, tensor_scale, kind: tl.constexpr):
    """Return what elements are multiplied by, from scales as they are stored."""
    if kind == "fp32":
        scale = stored
    elif kind == "e8m0":
        exponent = stored.to(tl.int32)
        bits = tl.where(exponent == 0, 0x00400000, exponent << 23)
        scale = tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    else:
        code = stored.to(tl.int32)
        magnitude = code & 0x7F
        scale = (magnitude << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
        scale = tl.where(code > 0x7F, -scale, scale)
        scale = tl.where(magnitude == 0x7F, float("nan"), scale) * tensor_scale
    return scale


@triton.jit
def _element_values(
    byte, table_ptr, rows: tl.constexpr, length: tl.constexpr, width: tl.constexpr, values: tl.constexpr
):
    """Return the values of bytes of codes: float32, shape [rows, length]."""
    if width == 4:  # a table of 16 numbers lies in 16 banks: no two threads collide
        both = tl.join(tl.load(table_ptr + (byte & 15)), tl.load(table_ptr + (byte >> 4)))
        numbers = tl.reshape(both, (rows, length))
    elif values is None:
        numbers = tl.load(table_ptr + byte)
    else:
        numbers = value_of(byte, values).to(tl.float32, bitcast=True)
    return numbers


@triton.jit
def _dequantize_blocks(
    codes_ptr,
    scales_ptr,
    numbers_ptr,
    table_ptr,
    tensor_scale,
    count,
    block: tl.constexpr,
    rows: tl.constexpr,
    width: tl.constexpr,
    kind: tl.constexpr,
    values: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * rows
    row = tl.arange(0, rows)
    inside = row < count - first
    stride: tl.constexpr = block * width // 8
    at = row[:, None] * stride + tl.arange(0, stride)[None, :]
    byte = tl.load(codes_ptr + first * stride + at, mask=inside[:, None], other=0).to(tl.int32)
    scale = _scale_values(tl.load(scales_ptr + first + row, mask=inside, other=0), tensor_scale, kind)
    numbers = _element_values(byte, table_ptr, rows, block, width, values) * scale[:, None]
    places = row[:, None] * block + tl.arange(0, block)[None, :]
    numbers = numbers.to(numbers_ptr.dtype.element_ty)  # none is read again here: the cache is for others
    tl.store(numbers_ptr + first * block + places, numbers, mask=inside[:, None], eviction_policy="evict_first")


@triton.jit
def _dequantize_rows(
    codes_ptr,
    scales_ptr,
    numbers_ptr,
    table_ptr,
    tensor_scale,
    length,
    chunks,
    tile: tl.constexpr,
    width: tl.constexpr,
    kind: tl.constexpr,
    values: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // chunks
    start = (program % chunks).to(tl.int64) * tile
    begin = row.to(tl.int64) * length + start
    at = tl.arange(0, tile * width // 8)[None, :]
    byte = tl.load(codes_ptr + begin * width // 8 + at, mask=at < (length - start) * width // 8, other=0).to(tl.int32)
    scale = _scale_values(tl.load(scales_ptr + row), tensor_scale, kind)
    numbers = _element_values(byte, table_ptr, 1, tile, width, values) * scale
    offsets = tl.arange(0, tile)[None, :]
    numbers = numbers.to(numbers_ptr.dtype.element_ty)
    tl.store(numbers_ptr + begin + offsets, numbers, mask=offsets < length - start, eviction_policy="evict_first")
