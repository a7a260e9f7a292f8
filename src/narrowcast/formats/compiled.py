"""The inner loops of the codecs, compiled by numba: what ``portable`` says there, bit for bit, several times faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

from narrowcast.formats.kinds import Format
from narrowcast.formats.portable import Values

__all__ = [
    "absmax",
    "codes_above",
    "codes_above_scaled",
    "codes_by_half",
    "codes_of_scaled",
    "decoded",
    "decoded_nibbles",
    "from_bf16",
    "reaches",
    "round_to_nearest",
    "rounded_steps",
    "to_bf16",
    "values_by_half",
]

NAME = "numba"
CHUNK = 1 << 18
_BLOCK = 512

Loop = TypeVar("Loop", bound=Callable[..., Any])


def _loop(function: Loop) -> Loop:
    """Compile a loop at its first call; the machine code is kept for the next process."""
    compiled: Any = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    return compiled


@_loop
def _half(word: Any) -> Any:
    return (word >> np.uint32(16)) | np.uint32((word & np.uint32(0xFFFF)) != 0)


@_loop
def _by_half(words: Any, table: Any, out: Any) -> None:
    for i in range(words.size):
        out[i] = table[_half(words[i])]


def codes_by_half(x: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """See ``portable``."""
    _by_half(x.view(np.uint32), table, out)


values_by_half = codes_by_half


@_loop
def codes_above(x: Any, edges: Any, out: Any) -> None:
    """See ``portable``."""
    for i in range(x.size):
        above = np.int32(0)
        for k in range(edges.size):
            above += np.int32(x[i] > edges[k])
        out[i] = above


@_loop
def _largest_bits(rows: Any, out: Any) -> None:
    for i in range(rows.shape[0]):
        largest = np.int32(0)
        for j in range(rows.shape[1]):
            largest = max(largest, rows[i, j] & np.int32(0x7FFFFFFF))
        out[i] = largest


def absmax(rows: np.ndarray) -> np.ndarray:
    """See ``portable``. Magnitudes of float32 are ordered as their bits are, NaN above all."""
    out = np.empty(rows.shape[0], np.int32)
    _largest_bits(rows.view(np.int32), out)
    return out.view(np.float32)


@_loop
def codes_of_scaled(rows: Any, scales: Any, table: Any, out: Any) -> None:
    """See ``portable``."""
    scaled = np.empty(rows.shape[1], np.float32)
    words = scaled.view(np.uint32)
    for i in range(rows.shape[0]):
        scale = scales[i]
        for j in range(rows.shape[1]):
            scaled[j] = rows[i, j] / scale
        for j in range(rows.shape[1]):
            out[i, j] = table[_half(words[j])]


@_loop
def codes_above_scaled(rows: Any, scales: Any, edges: Any, out: Any) -> None:
    """See ``portable``."""
    scaled = np.empty(rows.shape[1], np.float32)
    above = np.empty(rows.shape[1], np.int32)
    for i in range(rows.shape[0]):
        scale = scales[i]
        for j in range(rows.shape[1]):
            scaled[j] = rows[i, j] / scale
            above[j] = 0
        for k in range(edges.size):
            edge = edges[k]
            for j in range(rows.shape[1]):
                above[j] += np.int32(scaled[j] > edge)
        for j in range(rows.shape[1]):
            out[i, j] = above[j]


@_loop
def _reaches(codes: Any, mask: Any, limit: Any) -> Any:
    some = False
    for i in range(codes.size):
        some |= (codes[i] & mask) >= limit
    return some


def reaches(codes: np.ndarray, mask: int, limit: int) -> bool:
    """See ``portable``."""
    return bool(_reaches(codes, codes.dtype.type(mask), codes.dtype.type(limit)))


@_loop
def _steps(rows: Any, scales: Any, zero_points: Any, lowest: Any, highest: Any, mask: Any, out: Any) -> None:
    for i in range(rows.shape[0]):
        scale, zero_point = scales[i], np.float32(zero_points[i])
        for j in range(rows.shape[1]):
            step = np.rint(rows[i, j] / scale) + zero_point
            out[i, j] = np.int32(min(max(step, lowest), highest)) & mask


def rounded_steps(
    rows: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, lowest: int, highest: int, mask: int, out: np.ndarray
) -> None:
    """See ``portable``."""
    _steps(rows, scales, zero_points, np.float32(lowest), np.float32(highest), np.int32(mask), out)


@_loop
def _decoded(codes: Any, values: Any, out: Any) -> None:
    for i in range(codes.size):
        out[i] = values[codes[i]]


def decoded(codes: np.ndarray, values: Values, out: np.ndarray) -> None:
    """See ``portable``."""
    _decoded(codes, values.single, out)


@_loop
def _nibbles(packed: Any, scales: Any, pairs: Any, out: Any) -> None:
    half = out.shape[1] // 2
    for i in range(out.shape[0]):
        scale = scales[i]
        for j in range(half):
            both = packed[i * half + j]
            out[i, 2 * j] = pairs[both, 0] * scale
            out[i, 2 * j + 1] = pairs[both, 1] * scale


def decoded_nibbles(packed: np.ndarray, scales: np.ndarray, values: Values, out: np.ndarray) -> None:
    """See ``portable``."""
    _nibbles(packed, scales, values.nibbles.view(out.dtype).reshape(256, 2), out)


@_loop
def _bf16(words: Any, out: Any) -> None:
    for i in range(words.size):
        word = words[i]
        upper = word >> np.uint32(16)
        rounded = (word + (np.uint32(0x7FFF) + (upper & np.uint32(1)))) >> np.uint32(16)
        out[i] = upper | np.uint32(0x40) if (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else rounded


def to_bf16(x: np.ndarray, out: np.ndarray) -> None:
    """See ``portable``."""
    _bf16(x.view(np.uint32), out)


@_loop
def _from_bf16(codes: Any, words: Any) -> None:
    for i in range(codes.size):
        word = np.uint32(codes[i]) << np.uint32(16)
        quiet = np.uint32(0x400000) if (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else np.uint32(0)
        words[i] = word | quiet


def from_bf16(codes: np.ndarray, out: np.ndarray) -> None:
    """See ``portable``."""
    _from_bf16(codes, out.view(np.uint32))


@_loop
def _nearest(words: Any, dropped: Any, lowest: Any, cap: Any, mask: Any, sign: Any, shift: Any, out: Any) -> None:
    # A number plus a power of two ``dropped`` binades above it is rounded by the addition itself, at the last digit
    # that the format keeps. Blocks of numbers stay in the first-level cache between the three steps.
    number, magic = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    number_bits, magic_bits = number.view(np.int32), magic.view(np.int32)
    up = np.int32(dropped << 23)
    for start in range(0, words.size, _BLOCK):
        block = words[start : start + _BLOCK]
        codes = out[start : start + _BLOCK]
        for i in range(block.size):
            word = min(block[i] & np.int32(0x7FFFFFFF), cap)
            number_bits[i] = word
            magic_bits[i] = max(word & np.int32(0x7F800000), lowest) + up
        for i in range(block.size):
            number[i] = number[i] + magic[i]
        for i in range(block.size):
            code = number_bits[i] - magic_bits[i] + ((magic_bits[i] - up - lowest) >> dropped)
            codes[i] = min(code, mask) | ((block[i] >> shift) & sign)


def round_to_nearest(x: np.ndarray, format: Format, out: np.ndarray) -> None:
    """See ``portable``."""
    lowest, cap = (format.minimum_exponent + 127) << 23, (format.maximum_exponent + 128) << 23
    dropped = np.int32(23 - format.mantissa_bits)
    mask, sign, shift = np.int32(format.magnitude_mask), np.int32(format.sign_bit), np.int32(32 - format.bits)
    _nearest(x.view(np.int32), dropped, np.int32(lowest), np.int32(cap), mask, sign, shift, out)
