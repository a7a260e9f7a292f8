"""The codecs in plain Python integers and fractions, one number at a time: slow, and meant to be read.

The array code is tested against this, code by code and at every rounding boundary.
"""

from __future__ import annotations

import math
from fractions import Fraction

from narrowcast.errors import FormatError
from narrowcast.formats.kinds import Codebook, ElementFormat, Format, Integer, Nan
from narrowcast.formats.rules import Below, NanInput, Overflow, Rounding, Rules

__all__ = ["decode", "encode", "rounded"]


def decode(code: int, format: ElementFormat) -> float:
    """Return the exact value of a code. NaN comes back without its payload; use the array codec to keep it."""
    match format:
        case Codebook():
            return format.values[code]
        case Integer():
            negative = format.signed and code >> (format.bits - 1)
            return (code - (1 << format.bits if negative else 0)) * format.step
        case Format():
            return _decode_float(code, format)


def _decode_float(code: int, format: Format) -> float:
    negative, magnitude = bool(code & format.sign_bit), code & format.magnitude_mask
    sign = -1.0 if negative else 1.0
    if format.nan is Nan.NEGATIVE_ZERO and negative and not magnitude:
        return math.nan
    if magnitude > format.max_code:
        infinite = format.has_inf and magnitude == format.infinity_code
        return math.copysign(math.inf if infinite else math.nan, sign)
    exponent, significand = magnitude >> format.mantissa_bits, magnitude & ((1 << format.mantissa_bits) - 1)
    if exponent or not format.has_zero:
        significand |= 1 << format.mantissa_bits  # the hidden bit
    else:
        exponent = 1  # subnormal
    return math.copysign(math.ldexp(significand, exponent - format.bias - format.mantissa_bits), sign)


def encode(
    value: float | Fraction, format: ElementFormat, rules: Rules | None = None, draw: Fraction = Fraction(1, 2)
) -> int:
    """Return the code of ``value``, rounded once.

    Args:
        value: Any float64, or an exact fraction.
        format: What to encode to.
        rules: Rounding, overflow and the rest; the format's own defaults unless given.
        draw: For stochastic rounding: away from zero if the distance to the lower neighbour, in steps, exceeds it.

    Raises:
        FormatError: NaN, and the format has none (unless the rules say what it becomes).
    """
    rules = rules or Rules.of(format)
    if _is_nan(value) and not (isinstance(format, Format) and format.has_nan):
        value = _instead_of_nan(format, rules)
    match format:
        case Codebook():
            return _encode_codebook(value, format, rules, draw)
        case Integer():
            return _encode_integer(value, format, rules, draw)
        case Format():
            return _encode_float(value, format, rules, draw)


def _is_nan(value: float | Fraction) -> bool:
    return not isinstance(value, Fraction) and math.isnan(value)


def _is_infinite(value: float | Fraction) -> bool:
    return not isinstance(value, Fraction) and math.isinf(value)


def _is_negative(value: float | Fraction) -> bool:
    return value < 0 if isinstance(value, Fraction) else math.copysign(1.0, value) < 0


def _exponent(value: Fraction) -> int:
    """Return the power of two that a positive number reaches."""
    estimate = value.numerator.bit_length() - value.denominator.bit_length()  # this or one too many
    return estimate - (value < Fraction(2) ** estimate)


def _instead_of_nan(format: ElementFormat, rules: Rules) -> float:
    match rules.nan:
        case NanInput.ERROR:
            raise FormatError(f"NaN, and {format.name} has none", next_step="give nan='zero' or nan='max'")
        case NanInput.ZERO:
            return 0.0
        case NanInput.MAX:
            return format.max


def _encode_float(value: float | Fraction, format: Format, rules: Rules, draw: Fraction) -> int:
    negative = _is_negative(value)
    if _is_nan(value):
        nan = format.nan_code
        assert nan is not None
        return nan | (format.sign_bit if negative else 0)
    if not format.signed and (value < 0 or (not value and not format.has_zero)):
        match rules.below:
            case Below.NAN:
                assert format.nan_code is not None
                return format.nan_code
            case Below.CLAMP:
                return 0
            case Below.MAGNITUDE:
                negative = False
    code = _encode_magnitude(abs(value), negative, format, rules, draw)
    if format.nan is Nan.NEGATIVE_ZERO and code in (0, format.nan_code):
        return code  # one zero, one NaN
    return code | (format.sign_bit if negative else 0)


def _encode_magnitude(value: float | Fraction, negative: bool, format: Format, rules: Rules, draw: Fraction) -> int:
    if _is_infinite(value):
        return _overflowed(format, rules, negative, infinite=True)
    magnitude = Fraction(value)
    exponent = max(_exponent(magnitude) if magnitude else format.minimum_exponent, format.minimum_exponent)
    step = Fraction(2) ** (exponent - format.mantissa_bits)
    steps = rounded(magnitude / step, negative, rules.rounding, draw)
    # Codes count up evenly with the numbers they stand for, across exponents too: a carry needs no care.
    code = steps + ((exponent - format.minimum_exponent) << format.mantissa_bits)
    if not format.has_zero:
        code = max(code - (1 << format.mantissa_bits), 0)
    return _overflowed(format, rules, negative, infinite=False) if code > format.max_code else code


def rounded(steps: Fraction, negative: bool, rounding: Rounding, draw: Fraction) -> int:
    """Round a magnitude, counted in steps of the format, to a whole number of them."""
    whole = math.floor(steps)
    rest = steps - whole
    half = Fraction(1, 2)
    away = {
        Rounding.NEAREST_EVEN: rest > half or (rest == half and whole % 2 == 1),
        Rounding.NEAREST_AWAY: rest >= half,
        Rounding.TOWARD_ZERO: False,
        Rounding.UP: rest > 0 and not negative,
        Rounding.DOWN: rest > 0 and negative,
        Rounding.TO_ODD: rest > 0 and whole % 2 == 0,
        Rounding.STOCHASTIC: rest > draw,
    }[rounding]
    return whole + away


def _overflowed(format: Format, rules: Rules, negative: bool, *, infinite: bool) -> int:
    nan, infinity = format.nan_code, (format.infinity_code if format.has_inf else None)
    toward_zero = {
        Rounding.TOWARD_ZERO: True,
        Rounding.TO_ODD: True,
        Rounding.UP: negative,
        Rounding.DOWN: not negative,
    }
    match rules.overflow:
        case Overflow.NAN if nan is not None:
            return nan
        case Overflow.IEEE if infinite or not toward_zero.get(rules.rounding, False):
            return next(code for code in (infinity, nan, format.max_code) if code is not None)
        case Overflow.SATURATE if infinite:
            return next(code for code in (infinity, nan, format.max_code) if code is not None)
        case _:
            return format.max_code


def _encode_integer(value: float | Fraction, format: Integer, rules: Rules, draw: Fraction) -> int:
    lowest, highest = round(format.min / format.step), round(format.max / format.step)
    mask = (1 << format.bits) - 1
    if _is_infinite(value):
        return 0 if rules.overflow is Overflow.WRAP else (highest if value > 0 else lowest) & mask
    steps = rounded(abs(Fraction(value)) / Fraction(format.step), value < 0, rules.rounding, draw)
    steps = -steps if value < 0 else steps
    return (steps if rules.overflow is Overflow.WRAP else min(max(steps, lowest), highest)) & mask


def _encode_codebook(value: float | Fraction, format: Codebook, rules: Rules, draw: Fraction) -> int:
    values = format.values
    if value <= values[0]:
        return 0
    if value >= values[-1]:
        return len(values) - 1
    lower = max(code for code, entry in enumerate(values) if entry <= value)
    rest = (Fraction(value) - Fraction(values[lower])) / (Fraction(values[lower + 1]) - Fraction(values[lower]))
    half = Fraction(1, 2)
    up = {
        Rounding.NEAREST_EVEN: rest > half,  # codes of a table have no parity that means anything: a tie goes down
        Rounding.NEAREST_AWAY: rest > half or (rest == half and value > 0),
        Rounding.TOWARD_ZERO: rest > 0 and abs(values[lower + 1]) < abs(values[lower]),
        Rounding.UP: rest > 0,
        Rounding.DOWN: False,
        Rounding.TO_ODD: rest > 0 and lower % 2 == 0,
        Rounding.STOCHASTIC: rest > draw,
    }[rules.rounding]
    return lower + up
