"""The inner loops of the codecs, compiled by numba: what ``portable`` says there, bit for bit, several times faster."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from narrowcast.formats import conversions, vectors
from narrowcast.formats.kinds import Format
from narrowcast.formats.portable import ErrorSums, ExponentCodes, SpecialCodes, Values
from narrowcast.formats.vectors import LANES, loop, summing_loop

__all__ = [
    "absmax",
    "casting_loop",
    "codes_above",
    "codes_above_scaled",
    "codes_by_half",
    "codes_of_scaled",
    "converted",
    "counted",
    "decoded",
    "decoded_floats",
    "decoded_nibbles",
    "decoding_loop",
    "errors",
    "exponent_loop",
    "narrowed_to_odd",
    "nearest_loop",
    "quieted",
    "rounded_steps",
    "rounded_to_nearest",
    "values_by_half",
]

NAME = "numba"
COMPILED = True
CHUNK = 1 << 18
_LARGEST = float(np.finfo(np.float64).max)
_STRIP = 256  # numbers that are held against one edge after the other

Loop = Callable[[np.ndarray, np.ndarray], None]


@loop
def _half(word: Any) -> Any:
    return (word >> np.uint32(16)) | np.uint32((word & np.uint32(0xFFFF)) != 0)


@loop
def _by_half(words: Any, table: Any, out: Any) -> None:
    for i in range(words.size):
        out[i] = table[_half(words[i])]


def codes_by_half(x: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """See ``portable``."""
    _by_half(x.view(np.uint32), table, out)


values_by_half = codes_by_half


@loop
def codes_above(x: Any, edges: Any, out: Any) -> None:
    """See ``portable``."""
    above = np.empty(_STRIP, np.int32)
    for start in range(0, x.size, _STRIP):
        part, codes = x[start : start + _STRIP], out[start : start + _STRIP]
        for j in range(part.size):
            above[j] = 0
        for k in range(edges.size):
            edge = edges[k]
            for j in range(part.size):
                above[j] += np.int32(part[j] > edge)
        for j in range(part.size):
            codes[j] = above[j]


@loop
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


@loop
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


@loop
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


@loop
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


@loop
def _decoded(codes: Any, values: Any, out: Any) -> None:
    for i in range(codes.size):
        out[i] = values[codes[i]]


def decoded(codes: np.ndarray, values: Values, out: np.ndarray) -> None:
    """See ``portable``."""
    _decoded(codes, values.single, out)


def decoded_nibbles(packed: np.ndarray, scales: np.ndarray, values: Values, out: np.ndarray) -> None:
    """See ``portable``."""
    length, first = out.shape[1], 0
    if out.dtype == np.float32 and vectors.permutes():
        vectors.decode_nibbles(packed, scales, values.single, out)
        first = length // LANES * LANES
    if first < length:
        vectors.decode_pairs(packed, scales, values.nibbles.view(out.dtype).reshape(256, 2), first, out)


def rounded_to_nearest(x: np.ndarray, format: Format, special: SpecialCodes, out: np.ndarray) -> None:
    """See ``portable``."""
    nearest_loop(format, special)(x, out)


def nearest_loop(format: Format, special: SpecialCodes) -> Loop:
    """Return what writes codes as ``portable.rounded_to_nearest`` says: all that depends on the format is worked out."""
    if _overflows(format, special) and _is_half(format) and vectors.converts_half():
        return vectors.encode_half
    if _overflows(format, special) and _is_cut(format):
        dropped = np.uint32(23 - format.mantissa_bits)
        return lambda x, out: vectors.encode_cut(x.view(np.uint32), dropped, out)
    constants = _encoding_constants(format, special)
    return lambda x, out: vectors.encode_nearest(x.view(np.uint32), constants, out)


def casting_loop(format: Format, special: SpecialCodes) -> Loop | None:
    """Return what writes the float32 numbers that those codes stand for, in one pass; None where there is no such loop."""
    if _overflows(format, special) and _is_half(format) and vectors.converts_half():
        return vectors.cast_half
    if _overflows(format, special) and _is_cut(format):
        dropped = np.uint32(23 - format.mantissa_bits)
        return lambda x, out: vectors.cast_cut(x.view(np.uint32), dropped, out.view(np.uint32))
    return None


def exponent_loop(codes: ExponentCodes) -> Loop:
    """Return what writes the E8M0 codes of float32 numbers."""
    constants = _words(*codes)
    return lambda x, out: conversions.encode_exponents(x.view(np.uint32), constants, out)


def narrowed_to_odd(x: np.ndarray) -> np.ndarray:
    """See ``portable``."""
    out = np.empty(x.shape, np.float32)
    vectors.narrow_to_odd(x, out.view(np.uint32))
    return out


def decoded_floats(codes: np.ndarray, format: Format, out: np.ndarray) -> bool:
    """See ``portable``."""
    decoding_loop(format)(codes, out)
    return True


def decoding_loop(format: Format) -> Loop:
    """Return what writes values as ``portable.decoded_floats`` says; E8M0's too."""
    if _is_half(format) and vectors.converts_half():
        return vectors.decode_half
    if _is_cut(format):
        dropped = np.uint32(23 - format.mantissa_bits)
        return lambda codes, out: vectors.decode_cut(codes, dropped, out)
    if not format.has_zero:
        return conversions.decode_exponents
    constants = _decoding_constants(format)
    return lambda codes, out: vectors.decode_arithmetically(codes, constants, out)


def converted(x: np.ndarray, out: np.ndarray) -> None:
    """See ``portable``."""
    conversions.convert(x, out)


def quieted(codes: np.ndarray, format: Format, out: np.ndarray) -> None:
    """See ``portable``."""
    word = codes.dtype.type
    mask, infinity, quiet = word(format.magnitude_mask), word(format.infinity_code), word(1 << format.mantissa_bits - 1)
    conversions.copy_quiet(codes, mask, infinity, quiet, out)


def _overflows(format: Format, special: SpecialCodes) -> bool:
    """Return whether what is too large becomes infinity."""
    return format.has_inf and special.beyond == special.infinite == format.infinity_code


def _is_half(format: Format) -> bool:
    return (format.exponent_bits, format.mantissa_bits, format.bias, format.has_inf) == (5, 10, 15, True)


def _is_cut(format: Format) -> bool:
    """Return whether codes are the upper bits of float32, as BF16's are."""
    return (format.exponent_bits, format.bias, format.has_inf) == (8, 127, True)


@lru_cache(maxsize=64)
def _encoding_constants(format: Format, special: SpecialCodes) -> np.ndarray:
    """Return what ``vectors.encode_nearest`` asks for, in its order."""
    dropped, lowest = 23 - format.mantissa_bits, _lowest(format)
    half_a_step_less = (1 << (dropped - 1)) - 1 - ((127 - format.bias) << 23)  # and float32's bias made the format's
    shift = lowest + (dropped << 23)
    codes = (format.max_code, *special, format.sign_bit)
    unsigned_zero = -1 if format.has_negative_zero else 0  # no code is -1
    return _words(dropped, lowest, half_a_step_less, shift, *codes, 32 - format.bits, unsigned_zero)


@lru_cache(maxsize=64)
def _decoding_constants(format: Format) -> np.ndarray:
    """Return what ``vectors.decode_arithmetically`` asks for, in its order."""
    dropped, first_normal = 23 - format.mantissa_bits, format.first_normal_code if _lowest(format) else 0
    step = int(np.float32(format.smallest_subnormal).view(np.uint32)) if first_normal else 0
    infinite = (format.infinity_code, 0x7F800000, 0x7FFFFF, 0x400000)  # the payload stays, but a NaN is quiet
    special = infinite if format.has_inf else (format.magnitude_mask, 0x7FC00000, 0, 0)
    sizes = (dropped, format.magnitude_mask, first_normal, (127 - format.bias) << 23, step, format.max_code)
    return _words(*sizes, *special, 32 - format.bits)


def _lowest(format: Format) -> int:
    """Return the bits of the smallest normal number; 0 for subnormal numbers that are float32's, cut like any other."""
    return 0 if format.bias == 127 else (format.minimum_exponent + 127) << 23


def _words(*numbers: int) -> np.ndarray:
    """Return constants as loops take them: an array is handed over in less time than so many numbers."""
    return np.array([number % (1 << 32) for number in numbers], np.uint32)


@loop
def _counted(codes: Any, last: Any, counts: Any) -> None:
    for i in range(codes.size):
        counts[i & last, codes[i]] += 1


def counted(codes: np.ndarray, bins: int) -> np.ndarray:
    """See ``portable``. Few bins are kept four times: adding to a place that was just written waits for the writing."""
    tables = 4 if bins <= 1 << 12 else 1
    counts = np.zeros((tables, bins), np.int64)
    _counted(codes, np.int64(tables - 1), counts)
    return counts.sum(axis=0)


@summing_loop
def _errors(x: Any, y: Any, low: Any, high: Any, smallest: Any) -> Any:
    finite = overflowed = zero = underflowed = subnormal = np.int64(0)
    signal = noise = np.float64(0)
    largest = np.int64(0)  # as bits: magnitudes of float64 are ordered as those are
    for row in range(x.shape[0]):
        lowest, highest, normal = low[row], high[row], smallest[row]
        for column in range(x.shape[1]):
            number, became = np.float64(x[row, column]), np.float64(y[row, column])
            judged = abs(number) <= _LARGEST
            number = number if judged else 0.0
            became = became if judged else 1.0
            difference = number - became if judged else 0.0
            magnitude = abs(became)
            finite += judged
            signal += number * number
            noise += difference * difference
            largest = max(largest, np.float64(abs(difference)).view(np.int64))
            overflowed += judged & ((number < lowest) | (number > highest))
            zero += magnitude == 0
            underflowed += (magnitude == 0) & (number != 0)
            subnormal += judged & (magnitude < normal) & (magnitude > 0)
    return finite, signal, noise, largest, overflowed, zero, underflowed, subnormal


def errors(x: np.ndarray, y: np.ndarray, low: np.ndarray, high: np.ndarray, smallest: np.ndarray) -> ErrorSums:
    """See ``portable``."""
    finite, signal, noise, largest, *counts = _errors(x, y, low, high, smallest)
    magnitude = float(np.int64(largest).view(np.float64))
    return ErrorSums(finite, x.size - finite, signal, noise, magnitude, *counts)
