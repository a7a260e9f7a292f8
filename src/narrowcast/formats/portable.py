"""The inner loops of the codecs in NumPy. ``compiled`` has the same functions, with the same results, and is faster.

Arrays are contiguous; rows have shape [rows, length], scales [rows].
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np

from narrowcast.formats.kinds import Format

__all__ = [
    "ErrorSums",
    "ExponentCodes",
    "SpecialCodes",
    "Values",
    "absmax",
    "codes_above",
    "codes_above_scaled",
    "codes_by_half",
    "codes_of_scaled",
    "converted",
    "counted",
    "decoded",
    "decoded_floats",
    "decoded_nibbles",
    "errors",
    "narrowed_to_odd",
    "quieted",
    "rounded_steps",
    "rounded_to_nearest",
    "values_by_half",
]

NAME = "numpy"
COMPILED = False
CHUNK = 1 << 15  # elements worked on at a time: every step passes over them, so they stay in the cache


class SpecialCodes(NamedTuple):
    """Codes of what no rounding decides. Finite and infinite ones take the number's sign."""

    beyond: int  # of a finite number that is too large
    infinite: int
    nan: int
    payload: int  # mask of the code bits that a NaN fills from its own upper ones
    nan_sign: int  # mask of the sign bit, if a NaN keeps it


class ErrorSums(NamedTuple):
    """What became of numbers: counts, and sums of squares. Only finite numbers are judged."""

    finite: int
    not_finite: int
    signal: float  # sum of the squared numbers
    noise: float  # sum of the squared errors; NaN if a number became NaN
    largest: float  # error; anything if a number became NaN
    overflowed: int  # below the lowest or above the highest that the format reaches
    zero: int  # afterwards
    underflowed: int  # zero afterwards, but not before
    subnormal: int  # afterwards smaller than the smallest normal number, but not zero


class ExponentCodes(NamedTuple):
    """How float32 numbers become E8M0 codes; ``conversions.encode_exponents`` says what each one is."""

    added: int
    edge: int
    beyond: int
    infinite: int
    nan: int
    zero: int
    negative: int
    minus_infinite: int


class Values:
    """The values of a format's codes, and of two codes side by side: half as many look-ups.

    Args:
        single: Value of each code, shape [2**bits], float32 or float64.
    """

    def __init__(self, single: np.ndarray) -> None:
        self.single = single

    @cached_property
    def pairs(self) -> np.ndarray:
        """Both values of two 8-bit codes in one 16-bit number, as one complex number: shape [65536]."""
        of_byte = np.resize(self.single, 256)  # codes above the format's are never looked up
        both = np.arange(1 << 16)
        return self._joined(of_byte[both & 0xFF], of_byte[both >> 8])

    @cached_property
    def nibbles(self) -> np.ndarray:
        """Both values of two 4-bit codes in one byte, the first one low, as one complex number: shape [256]."""
        both = np.arange(256)
        return self._joined(self.single[both & 15], self.single[both >> 4])

    def _joined(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        wide = np.dtype(f"complex{16 * self.single.itemsize}")
        return np.ascontiguousarray(np.stack([first, second], axis=1)).view(wide)[:, 0]


def upper_half(x: np.ndarray) -> np.ndarray:
    """Return the upper 16 bits of float32 numbers, the lowest of them set if any lower bit is: shape [n]."""
    word = x.view(np.uint32)
    return (word >> 16) | ((word & 0xFFFF) != 0)


def codes_by_half(x: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """Write the code that the table of 65,536 gives for the upper half of each float32 number."""
    np.take(table, upper_half(x), out=out, mode="clip")


def values_by_half(x: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """As :func:`codes_by_half`, with a table of float32 values."""
    np.take(table, upper_half(x), out=out, mode="clip")


def codes_above(x: np.ndarray, edges: np.ndarray, out: np.ndarray) -> None:
    """Write, for each number, how many of the increasing edges lie below it."""
    out[...] = 0
    for edge in edges:
        out += x > edge


def absmax(rows: np.ndarray) -> np.ndarray:
    """Return the largest magnitude of each row; NaN if the row holds one."""
    magnitude = np.abs(rows)
    length = magnitude.shape[1]
    while length > 1 and length % 2 == 0:  # halving beats NumPy's reduction of short rows
        flat = magnitude.reshape(-1)
        magnitude = np.maximum(flat[::2], flat[1::2])
        length //= 2
    return magnitude.reshape(rows.shape[0], length).max(axis=1)


def codes_of_scaled(rows: np.ndarray, scales: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """Write the codes of float32 rows divided by their scales, from the table of :func:`codes_by_half`."""
    codes_by_half((rows / scales[:, None]).reshape(-1), table, out.reshape(-1))


def codes_above_scaled(rows: np.ndarray, scales: np.ndarray, edges: np.ndarray, out: np.ndarray) -> None:
    """Write the codes of float32 rows divided by their scales, as :func:`codes_above` does."""
    codes_above(rows / scales[:, None], edges, out)


def rounded_steps(
    rows: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, lowest: int, highest: int, mask: int, out: np.ndarray
) -> None:
    """Write ``clip(round(row / scale) + zero_point)`` in two's complement, for float32 rows."""
    steps = np.rint(rows / scales[:, None])
    steps += zero_points[:, None].astype(steps.dtype)
    np.clip(steps, lowest, highest, out=steps)
    out[...] = steps.astype(np.int32) & mask


def decoded(codes: np.ndarray, values: Values, out: np.ndarray) -> None:
    """Write the values of codes."""
    if codes.dtype == np.uint8 and codes.size % 2 == 0:
        np.take(values.pairs, codes.view("<u2"), out=out.view(values.pairs.dtype), mode="clip")
    else:
        np.take(values.single, codes, out=out, mode="clip")


def decoded_nibbles(packed: np.ndarray, scales: np.ndarray, values: Values, out: np.ndarray) -> None:
    """Write the values of packed 4-bit codes times their rows' scales, for rows of even length."""
    table, length = values.nibbles, out.shape[1]
    step = max(CHUNK // length, 1)
    for start in range(0, out.shape[0], step):
        rows = out[start : start + step]
        first = start * length // 2
        part = packed[first : first + rows.size // 2]
        np.take(table, part, out=rows.reshape(-1).view(table.dtype), mode="clip")
        with np.errstate(invalid="ignore", over="ignore"):
            rows *= scales[start : start + step, None]


def rounded_to_nearest(x: np.ndarray, format: Format, special: SpecialCodes, out: np.ndarray) -> None:
    """Write the codes of float32 numbers, rounded to nearest even, for a format that ``tables.by_arithmetic`` allows."""
    word = x.view(np.uint32)
    magnitude = word & 0x7FFFFFFF
    code = _rounded(magnitude, format)
    sign = (word >> (32 - format.bits)) & format.sign_bit
    large = code > format.max_code
    if large.any():
        code[large], sign[large] = _large(magnitude[large], sign[large], format, special)
    if not format.has_negative_zero:
        sign[code == 0] = 0
    out[...] = code | sign


def _rounded(magnitude: np.ndarray, format: Format) -> np.ndarray:
    """Return the codes of magnitudes given as bits of float32; those of too large ones go on beyond the largest."""
    dropped = 23 - format.mantissa_bits
    offset = (127 - format.bias) << 23
    normal = (magnitude - offset + ((1 << (dropped - 1)) - 1) + ((magnitude >> dropped) & 1)) >> dropped
    if not offset:  # the format's subnormal numbers are float32's
        return normal
    lowest = (format.minimum_exponent + 127) << 23
    # A number plus a power of two that far above it is rounded by the addition itself, at the format's last digit.
    shift = np.array(lowest + (dropped << 23), np.uint32)
    with np.errstate(over="ignore", invalid="ignore"):
        tiny = (magnitude.view(np.float32) + shift.view(np.float32)).view(np.uint32) - shift
    return np.where(magnitude < lowest, tiny, normal)


def _large(
    magnitude: np.ndarray, sign: np.ndarray, format: Format, special: SpecialCodes
) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes and the signs of magnitudes, as bits of float32, that are too large, infinite or NaN."""
    nan = magnitude > 0x7F800000
    payload = (magnitude >> (23 - format.mantissa_bits)) & special.payload
    code = np.where(magnitude == 0x7F800000, special.infinite, special.beyond)
    return np.where(nan, special.nan | payload, code), np.where(nan, sign & special.nan_sign, sign)


def narrowed_to_odd(x: np.ndarray) -> np.ndarray:
    """Return float64 numbers as float32 rounded to odd: rounding them again, to two digits less, is still right.

    A number beyond float32 becomes its largest, one below all of it the smallest; a NaN is quiet with its upper payload.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        nearest = x.astype(np.float32)
        back = nearest.astype(np.float64)
        word = nearest.view(np.uint32)
        word -= np.abs(back) > np.abs(x)
        word |= (back < x) | (back > x)
    return nearest


def decoded_floats(codes: np.ndarray, format: Format, out: np.ndarray) -> bool:
    """Write the values of codes of a format that ``tables.decoded_by_arithmetic`` allows; a NaN is quiet.

    Args:
        codes: Shape [n].
        format: Of the codes.
        out: Shape [n], float32 or float64.

    Returns:
        Whether anything was written: False where a look-up is quicker.
    """
    if format.mantissa_bits != 7 or format.bias != 127 or out.dtype != np.float32:
        return False
    word = out.view(np.uint32)
    np.left_shift(codes, 16, out=word, dtype=np.uint32)
    nan = (word & 0x7FFFFFFF) > 0x7F800000
    if nan.any():
        word[nan] |= 0x400000
    return True


def converted(x: np.ndarray, out: np.ndarray) -> None:
    """Write float32 numbers as float64, or float64 ones as float32, rounded to nearest even; a NaN is quiet."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        np.copyto(out, x, casting="same_kind")


def quieted(codes: np.ndarray, format: Format, out: np.ndarray) -> None:
    """Write codes of a format with infinity as they are, but NaN quiet."""
    np.copyto(out, codes)
    word = codes.dtype.type
    lost = (codes & word(format.magnitude_mask)) > word(format.infinity_code)
    if lost.any():
        out[lost] |= word(1 << (format.mantissa_bits - 1))


def counted(codes: np.ndarray, bins: int) -> np.ndarray:
    """Return how often each code below ``bins`` occurs: shape [bins], int64. No code is ``bins`` or more."""
    return np.bincount(codes, minlength=bins)


def errors(x: np.ndarray, y: np.ndarray, low: np.ndarray, high: np.ndarray, smallest: np.ndarray) -> ErrorSums:
    """Return what became of rows of numbers; sums depend on the order of their terms in the last digits.

    Args:
        x: The numbers, shape [rows, length], float32 or float64.
        y: What they became.
        low: The lowest number of each row that does not overflow, shape [rows], float64.
        high: The highest one.
        smallest: The smallest normal magnitude of each row.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        x, y = x.astype(np.float64), y.astype(np.float64)
        signal = float((x * x).sum())
        finite = np.isfinite(x) if not np.isfinite(signal) else np.True_  # else the squares may just leave float64
        if not finite.all():
            signal = float(np.square(x, where=finite, out=np.zeros_like(x)).sum())
        difference = np.where(finite, x - y, 0.0)
        zero = (y == 0) & finite
        magnitude = np.abs(y)
        count = x.size if finite.ndim == 0 else int(np.count_nonzero(finite))
        return ErrorSums(
            count,
            x.size - count,
            signal,
            float((difference * difference).sum()),
            float(np.abs(difference).max(initial=0.0)),
            int(np.count_nonzero(((x < low[:, None]) | (x > high[:, None])) & finite)),
            int(np.count_nonzero(zero)),
            int(np.count_nonzero(zero & (x != 0))),
            int(np.count_nonzero((magnitude < smallest[:, None]) & (magnitude > 0) & finite)),
        )
