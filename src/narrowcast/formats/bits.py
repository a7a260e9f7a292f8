"""The codecs on arrays of int64: exact for every format, rounding and array library, one operation at a time.

Only operators and ``where`` are used, which NumPy and torch spell alike, so one text serves both. It works on the bits of
float64, into which every input widens without loss; speed is the business of ``tables``, which builds on this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from narrowcast.formats.kinds import Format, Integer, Nan
from narrowcast.formats.rules import Below, NanInput, Overflow, Rounding, Rules

__all__ = ["decode_float", "decode_integer", "encode_float", "encode_integer", "random_words"]

Int64 = Any  # an int64 array of NumPy or torch
Where = Callable[[Any, Any, Any], Any]

_FRACTION = (1 << 52) - 1
_EXPONENT = 0x7FF
_MAGNITUDE = (1 << 63) - 1
_INFINITY = _EXPONENT << 52
_QUIET = 1 << 51
_MOST = 60  # a shift by more leaves nothing of 53 bits


def random_words(places: Int64, seed: int) -> tuple[Int64, Int64]:
    """Return two words of 62 random bits for each place: splitmix64 of the place and the seed.

    Counting places instead of drawing from a stream makes the result the same however an array is cut, on every device.
    """
    start = (seed * 0x9E3779B97F4A7C15 + (1 << 63)) % (1 << 64) - (1 << 63)
    return _mixed(places * 2 + start), _mixed(places * 2 + 1 + start)


def _mixed(z: Int64) -> Int64:
    z = (z + 1) * -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
    z = (z ^ _logical_shift(z, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ _logical_shift(z, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return (z ^ _logical_shift(z, 31)) & ((1 << 62) - 1)


def _logical_shift(z: Int64, by: int) -> Int64:
    return (z >> by) & ((1 << (64 - by)) - 1)


def encode_float(bits: Int64, format: Format, rules: Rules, where: Where, places: Int64, seed: int) -> Int64:
    """Return the codes of numbers given as the bits of float64.

    Args:
        bits: Bits of float64; no NaN if the format has none and the rules call that an error.
        format: What to encode to.
        rules: What the caller chose.
        where: The array library's ``where(condition, a, b)``.
        places: Position of each number in the whole array; read by stochastic rounding alone.
        seed: Seed of stochastic rounding.
    """
    if not format.signed and rules.below is Below.MAGNITUDE:
        bits = bits & _MAGNITUDE
    negative = bits < 0
    magnitude = bits & _MAGNITUDE
    is_nan = magnitude > _INFINITY
    is_infinite = magnitude == _INFINITY
    steps, lift = _steps(magnitude, negative, format, rules.rounding, where, places, seed)
    code = steps + (lift << format.mantissa_bits)
    if not format.has_zero:
        code = where(code > (1 << format.mantissa_bits), code - (1 << format.mantissa_bits), 0)
    finite_too_large, infinite = _overflow_codes(format, rules, negative, where)
    code = where(code > format.max_code, finite_too_large, code)
    code = where(is_infinite, infinite, code)
    nan = _nan_codes(bits, format, rules)
    code = where(is_nan, nan, code)
    return _signed(
        code, bits, magnitude, negative & ~is_nan if format.nan_code is None else negative, format, rules, where
    )


def _steps(
    magnitude: Int64, negative: Int64, format: Format, rounding: Rounding, where: Where, places: Int64, seed: int
) -> tuple[Int64, Int64]:
    """Return each magnitude in whole steps of its binade, and the binade's place above the lowest one."""
    field = magnitude >> 52
    normal = field > 0
    significand = (magnitude & _FRACTION) + where(normal, 1 << 52, 0)
    exponent = where(normal, field, 1) - 1023
    lift = where(exponent > format.minimum_exponent, exponent - format.minimum_exponent, 0)
    shift = 52 - format.mantissa_bits + (format.minimum_exponent + lift - exponent)
    return _rounded(significand, shift, negative, rounding, where, places, seed), lift


def _rounded(
    significand: Int64, shift: Int64, negative: Int64, rounding: Rounding, where: Where, places: Int64, seed: int
) -> Int64:
    """Shift right by ``shift`` (0 or more) and round what falls out."""
    short = where(shift < _MOST, shift, _MOST)
    unit = (short * 0 + 1) << short
    whole = significand >> short
    rest = significand & (unit - 1)
    match rounding:
        case Rounding.NEAREST_EVEN:
            away = (rest * 2 > unit) | ((rest * 2 == unit) & ((whole & 1) == 1))
        case Rounding.NEAREST_AWAY:
            away = (rest * 2 >= unit) & (rest > 0)
        case Rounding.TOWARD_ZERO:
            return whole
        case Rounding.UP:
            away = (rest > 0) & ~negative
        case Rounding.DOWN:
            away = (rest > 0) & negative
        case Rounding.TO_ODD:
            away = (rest > 0) & ((whole & 1) == 0)
        case Rounding.STOCHASTIC:
            first, second = random_words(places, seed)
            beyond = shift - short
            beyond = where(beyond < _MOST, beyond, _MOST)  # two to the minus 120 is never
            rare = second & (((short * 0 + 1) << beyond) - 1)
            away = (rest > (first & (unit - 1))) & (rare == 0)
    return whole + where(away, 1, 0)


def _overflow_codes(format: Format, rules: Rules, negative: Int64, where: Where) -> tuple[Int64 | int, Int64 | int]:
    """Return the codes of finite numbers that are too large, and of infinite ones."""
    largest, nan = format.max_code, format.nan_code
    infinity = format.infinity_code if format.has_inf else largest if nan is None else nan
    match rules.overflow:
        case Overflow.NAN if nan is not None:
            return nan, nan
        case Overflow.CLAMP:
            return largest, largest
        case Overflow.IEEE:
            match rules.rounding:
                case Rounding.TOWARD_ZERO | Rounding.TO_ODD:
                    return largest, infinity
                case Rounding.UP:
                    return where(negative, largest, infinity), infinity
                case Rounding.DOWN:
                    return where(negative, infinity, largest), infinity
                case _:
                    return infinity, infinity
        case _:
            return largest, infinity


def _nan_codes(bits: Int64, format: Format, rules: Rules) -> Int64 | int:
    if format.nan is Nan.IEEE:  # quiet, and as much of the payload as fits
        payload = (bits & _FRACTION) >> (52 - format.mantissa_bits)
        return payload | (format.infinity_code | (1 << (format.mantissa_bits - 1)))
    if format.nan_code is not None:
        return format.nan_code
    return format.max_code if rules.nan is NanInput.MAX else 0


def _signed(
    code: Int64, bits: Int64, magnitude: Int64, negative: Int64, format: Format, rules: Rules, where: Where
) -> Int64:
    if not format.signed:
        below = (negative & (magnitude > 0) & (magnitude <= _INFINITY)) | ((magnitude == 0) & (not format.has_zero))
        match rules.below:
            case Below.NAN:
                return where(below, format.nan_code, code)
            case Below.CLAMP:
                return where(below, 0, code)
            case Below.MAGNITUDE:
                return code
    if format.bits == 64:
        return where(negative, code | (-1 << 63), code)
    if format.nan is Nan.NEGATIVE_ZERO:
        return where(negative & (code != 0) & (code != format.sign_bit), code + format.sign_bit, code)
    return where(negative, code + format.sign_bit, code)


def encode_integer(bits: Int64, format: Integer, rules: Rules, where: Where, places: Int64, seed: int) -> Int64:
    """Return the codes of numbers given as the bits of float64, in two's complement or unsigned."""
    negative = bits < 0
    magnitude = bits & _MAGNITUDE
    field = magnitude >> 52
    significand = (magnitude & _FRACTION) + where(field > 0, 1 << 52, 0)
    shift = 1075 - format.fraction_bits - where(field > 0, field, 1)
    left = where(shift < 0, -shift, 0)
    steps = _rounded(significand, where(shift > 0, shift, 0), negative, rules.rounding, where, places, seed)
    mask = (1 << format.bits) - 1
    if rules.overflow is Overflow.WRAP:
        steps = where(left < 16, (steps & 0xFFFF) << where(left < 16, left, 16), 0)
    else:
        steps = where(left > 0, 1 << 32, steps)
    steps = where(magnitude > _INFINITY, round(format.max / format.step) if rules.nan is NanInput.MAX else 0, steps)
    steps = where(negative & (magnitude <= _INFINITY), -steps, steps)
    if rules.overflow is Overflow.WRAP:
        return where(magnitude == _INFINITY, 0, steps) & mask
    lowest, highest = round(format.min / format.step), round(format.max / format.step)
    steps = where(steps < lowest, lowest, steps)
    return where(steps > highest, highest, steps) & mask


def decode_float(codes: Int64, format: Format, where: Where) -> Int64:
    """Return the bits of float64 that the codes stand for; a NaN keeps its payload, and is quiet."""
    negative = (codes & format.sign_bit) != 0 if format.bits < 64 else codes < 0
    magnitude = codes & format.magnitude_mask
    mantissa = format.mantissa_bits
    field = magnitude >> mantissa
    fraction = magnitude & ((1 << mantissa) - 1)
    bits = ((field - format.bias + 1023) << 52) + (fraction << (52 - mantissa))
    if format.has_zero:
        bits = where(field == 0, _subnormal(fraction, format, where), bits)
    if format.has_inf:
        special = _INFINITY + (fraction << (52 - mantissa))
        quiet = where(fraction == 0, special, special | _QUIET)  # a signalling NaN does not survive being worked on
        bits = where(field == (1 << format.exponent_bits) - 1, quiet, bits)
    if format.nan is Nan.ALL_ONES:
        bits = where(magnitude > format.max_code, _INFINITY | _QUIET, bits)
    if format.nan is Nan.NEGATIVE_ZERO:
        bits = where(codes == format.sign_bit, _INFINITY | _QUIET, bits)
        negative = negative & (codes != format.sign_bit)
    return where(negative, bits | (-1 << 63), bits)


def _subnormal(fraction: Int64, format: Format, where: Where) -> Int64:
    """Return the bits of ``fraction * 2**(minimum_exponent - mantissa_bits)``."""
    lowest = format.minimum_exponent - format.mantissa_bits
    bits = fraction * 0
    for place in range(format.mantissa_bits):  # the leading one decides the exponent
        if lowest + place < -1022:
            value = fraction << (lowest + 1074)  # subnormal in float64 too
        else:
            value = ((lowest + place + 1023) << 52) + ((fraction & ((1 << place) - 1)) << (52 - place))
        bits = where((fraction >> place) == 1, value, bits)
    return bits


def decode_integer(codes: Int64, format: Integer, where: Where) -> Int64:
    """Return the integers (not yet divided by ``2**fraction_bits``) that the codes stand for."""
    if not format.signed:
        return codes
    return where(codes >= 1 << (format.bits - 1), codes - (1 << format.bits), codes)
