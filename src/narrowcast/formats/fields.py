"""A code cut into the fields that its format gives meaning to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from narrowcast.formats import reference
from narrowcast.formats.kinds import Codebook, ElementFormat, Format, Integer

__all__ = ["Field", "fields_of"]


@dataclass(frozen=True)
class Field:
    """Some neighbouring bits of a code.

    Args:
        name: ``sign``, ``exponent``, ``significand``, ``integer``, ``fraction`` or ``index``.
        bits: The bits, the most significant first.
        meaning: What they contribute.
    """

    name: str
    bits: str
    meaning: str


def fields_of(code: int, format: ElementFormat) -> tuple[Field, ...]:
    """Return the fields of a code, the most significant first; those without bits are left out."""
    match format:
        case Codebook():
            return (Field("index", _binary(code, format.bits), f"position {code} of 0 to {len(format.values) - 1}"),)
        case Integer():
            fields = _of_integer(code, format)
        case Format():
            fields = _of_float(code, format)
    return tuple(field for field in fields if field.bits)


def _of_float(code: int, format: Format) -> list[Field]:
    fraction_bits = format.mantissa_bits
    sign = _binary(code >> (format.bits - 1), 1) if format.signed else ""
    exponent = (code & format.magnitude_mask) >> fraction_bits
    significand = code & ((1 << fraction_bits) - 1)
    value = reference.decode(code, format)
    if math.isfinite(value):
        subnormal = format.has_zero and not exponent
        power = f"2^{format.minimum_exponent}, subnormal" if subnormal else f"2^({exponent} - {format.bias})"
        power += "" if subnormal else f" = 2^{exponent - format.bias}"
        digits = _decimal((0 if subnormal else 1) + Fraction(significand, 1 << fraction_bits))
        part = f" + {significand}/{1 << fraction_bits}" if significand else ""
        meaning = f"{0 if subnormal else 1}{part}" + (f" = {digits}" if significand and fraction_bits <= 10 else "")
        power, meaning = ("zero", "0") if value == 0 else (power, meaning)
    else:
        power, meaning = ("special", "NaN" if math.isnan(value) else "infinity")
    return [
        Field("sign", sign, "minus" if sign == "1" else "plus"),
        Field("exponent", _binary(exponent, format.exponent_bits), power),
        Field("significand", _binary(significand, fraction_bits), meaning),
    ]


def _of_integer(code: int, format: Integer) -> list[Field]:
    bits, point = _binary(code, format.bits), format.fraction_bits
    top, whole = int(format.signed), max(format.bits - point, int(format.signed))
    weight = f"-{_decimal(Fraction(2) ** (format.bits - 1 - point))}" if bits[0] == "1" else "0"
    integer, fraction = bits[top:whole], bits[whole:]
    return [
        Field("sign", bits[:top], weight),
        Field("integer", integer, str(int(integer, 2)) if integer else ""),
        Field("fraction", fraction, f"{int(fraction, 2)}/{1 << point}" if fraction else ""),
    ]


def _binary(number: int, width: int) -> str:
    return f"{number:0{width}b}" if width else ""


def _decimal(number: Fraction) -> str:
    return f"{float(number):.15g}"
