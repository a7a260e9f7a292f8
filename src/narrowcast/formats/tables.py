"""The codecs of ``bits`` on NumPy arrays, and the tables that follow from them.

A float32 number and a narrow format: the upper 16 bits, with the lowest of them set if anything follows, decide the code,
because no rounding boundary of a format with few significand bits has a digit further down. So every rounding, overflow
and NaN rule is one table of 65,536 codes.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from narrowcast.formats import bits
from narrowcast.formats.arrays import code_dtype
from narrowcast.formats.kinds import Codebook, ElementFormat, Format, Integer, Nan
from narrowcast.formats.portable import ExponentCodes, SpecialCodes, Values
from narrowcast.formats.rules import Below, Overflow, Rounding, Rules

__all__ = [
    "by_arithmetic",
    "by_table",
    "casting_table",
    "decode_exactly",
    "decoded_by_arithmetic",
    "encode_exactly",
    "encoding_table",
    "exact_in_float32",
    "exponent_codes",
    "is_exponent",
    "narrows_first",
    "special_codes",
    "values_of",
]

_LOWEST_OF_A_TABLE = -131  # exponent of the smallest step: its half is the last digit but one of an upper half
_MOST_FRACTION = 21  # bits of a significand that a float32 rounded to odd rounds rightly: two less than its own
_DIGITS_OF_A_TABLE = 7  # significant bits of the upper half of a float32, less one for "something follows"


@lru_cache(maxsize=64)
def exact_in_float32(format: ElementFormat) -> bool:
    """Return whether float32 holds every value of the format."""
    match format:
        case Codebook():
            return all(float(np.float32(value)) == value for value in format.values)
        case Integer():
            return format.fraction_bits <= 64
        case Format():
            lowest = format.minimum_exponent - format.mantissa_bits
            return format.mantissa_bits <= 23 and lowest >= -149 and format.maximum_exponent <= 127


def encode_exactly(x: np.ndarray, format: Format | Integer, rules: Rules, start: int, seed: int) -> np.ndarray:
    """Return the codes of numbers of any dtype, as int64: shape [n]."""
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes quiet
        word = x.astype(np.float64, copy=False).view(np.int64)
    places = np.arange(start, start + x.size) if rules.rounding is Rounding.STOCHASTIC else word
    encoder = bits.encode_float if isinstance(format, Format) else bits.encode_integer
    return encoder(word, format, rules, np.where, places, seed)  # type: ignore[arg-type]


def decode_exactly(codes: np.ndarray, format: ElementFormat) -> np.ndarray:
    """Return the values of codes, as float64."""
    whole = codes.astype(np.int64)
    match format:
        case Codebook():
            return np.array(format.values)[np.minimum(whole, len(format.values) - 1)]
        case Integer():
            return bits.decode_integer(whole, format, np.where) * format.step
        case Format():
            return bits.decode_float(whole, format, np.where).view(np.float64)


def by_table(format: Format | Integer, rules: Rules) -> bool:
    """Return whether the upper halves of float32 numbers decide their codes."""
    digits = format.mantissa_bits + 1 if isinstance(format, Format) else format.bits - format.signed
    lowest = format.minimum_exponent - format.mantissa_bits if isinstance(format, Format) else -format.fraction_bits
    return (
        digits + 1 <= _DIGITS_OF_A_TABLE
        and lowest >= _LOWEST_OF_A_TABLE
        and rules.rounding is not Rounding.STOCHASTIC
        and rules.overflow is not Overflow.WRAP  # which looks at the lowest digits
    )


def narrows_first(format: ElementFormat, rules: Rules) -> bool:
    """Return whether float64 numbers may become float32, rounded to odd, before :func:`by_table` looks at them.

    A format that reaches as far as float32 must round what lies beyond away from zero: float32's largest number would not.
    """
    if not isinstance(format, Format) or format.maximum_exponent < 127:
        return True
    away = {Rounding.NEAREST_EVEN, Rounding.NEAREST_AWAY} | (set() if format.signed else {Rounding.UP})
    return format.maximum_exponent == 127 and rules.rounding in away


def is_exponent(format: ElementFormat) -> bool:
    """Return whether a format is E8M0, whatever it is called: float32's exponents alone, and NaN."""
    return (
        isinstance(format, Format)
        and (format.exponent_bits, format.mantissa_bits, format.bias) == (8, 0, 127)
        and (format.signed, format.has_zero, format.nan) == (False, False, Nan.ALL_ONES)
    )


@lru_cache(maxsize=64)
def exponent_codes(format: Format, rules: Rules) -> ExponentCodes | None:
    """Return how float32 numbers become E8M0 codes by these rules; None by a rounding that needs more than an addition."""
    rounded = {
        Rounding.NEAREST_EVEN: (1 << 22, 3 << 21),
        Rounding.NEAREST_AWAY: (1 << 22, 3 << 21),
        Rounding.UP: ((1 << 23) - 1, (1 << 22) + 1),
    }.get(rules.rounding)
    if rounded is None:
        return None
    numbers = np.array([2.0**128, math.inf, math.nan, 0.0, -1.0, -math.inf])
    codes = [int(code) for code in encode_exactly(numbers, format, rules, 0, 0)]
    if rules.below is Below.MAGNITUDE:
        codes[4:] = [256, 256]
    return ExponentCodes(*rounded, *codes)


@lru_cache(maxsize=64)
def by_arithmetic(format: ElementFormat) -> bool:
    """Return whether a few operations on the bits of float32, or of float64 rounded to odd, lead to the format.

    It is signed, and has a zero and 1 to 21 significand bits. Its numbers are normal in float32, or they have float32's
    own exponents.
    """
    if not isinstance(format, Format) or not (format.signed and format.has_zero):
        return False
    if not 1 <= format.mantissa_bits <= _MOST_FRACTION:
        return False
    lowest = format.minimum_exponent
    normal = lowest - format.mantissa_bits >= -126 and lowest + 23 - format.mantissa_bits <= 127
    return (normal or format.bias == 127) and format.maximum_exponent <= 127


@lru_cache(maxsize=64)
def decoded_by_arithmetic(format: ElementFormat) -> bool:
    """Return whether such operations lead back from the format too: it has two zeros."""
    return isinstance(format, Format) and format.has_negative_zero and by_arithmetic(format)


@lru_cache(maxsize=64)
def special_codes(format: Format, rules: Rules) -> SpecialCodes:
    """Return the codes of what is no number of a signed format, or too large for it, rounded to nearest even."""
    numbers = np.array([math.ldexp(1.0, format.maximum_exponent + 1), math.inf, math.nan])
    beyond, infinite, nan = (int(code) for code in encode_exactly(numbers, format, rules, 0, 0))
    payload = (1 << format.mantissa_bits) - 1 if format.has_inf else 0
    return SpecialCodes(beyond, infinite, nan, payload, format.sign_bit if format.has_nan else 0)


@lru_cache(maxsize=64)
def encoding_table(format: Format | Integer, rules: Rules) -> np.ndarray:
    """Return the code of every upper half: shape [65536]."""
    halves = np.arange(1 << 16, dtype=np.uint32) << 16
    with np.errstate(invalid="ignore"):
        numbers = halves.view(np.float32).astype(np.float64)
    return encode_exactly(numbers, format, rules, 0, 0).astype(code_dtype(format.bits))


@lru_cache(maxsize=64)
def casting_table(format: Format | Integer, rules: Rules) -> np.ndarray:
    """Return what every upper half is rounded to: shape [65536], float32."""
    return values_of(format, "float32").single[encoding_table(format, rules)]


@lru_cache(maxsize=64)
def values_of(format: ElementFormat, dtype: str) -> Values:
    """Return the values of a format of up to 16 bits, rounded to ``dtype`` where it does not hold them."""
    values = decode_exactly(np.arange(1 << format.bits), format)
    with np.errstate(invalid="ignore", over="ignore"):  # a signalling NaN becomes quiet
        return Values(values.astype(dtype))
