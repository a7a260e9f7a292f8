"""Blocks in plain Python: how a scale follows from a block, and codes from both. Slow, and meant to be read.

Two roundings belong to the definition: a number divided by its scale is rounded to float32 before it is encoded, and a
value times its scale is rounded to float32 when it is decoded, as every implementation on hardware does it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from narrowcast.formats import reference
from narrowcast.formats.kinds import Codebook, Format, Integer
from narrowcast.formats.rules import NanInput, Overflow, Rounding, Rules
from narrowcast.formats.scheme import Scheme
from narrowcast.formats.table import ELEMENTS

__all__ = ["block_scale", "dequantize_block", "quantize_block", "shared_exponent"]

_FP32 = ELEMENTS["fp32"]


def shared_exponent(largest: Fraction, scheme: Scheme) -> int:
    """Return the exponent of a block's power-of-two scale, for the block's largest magnitude (not zero)."""
    element = scheme.element
    top = _largest_element(scheme)
    match scheme.scale_rule:
        case "floor":  # OCP MX 1.0, section 6.3
            exponent = _floor_log2(largest) - _floor_log2(top)
        case "ceil":
            exponent = _ceil_log2(largest) - _floor_log2(top)
        case "even":
            digits = element.mantissa_bits if isinstance(element, Format) else element.bits - 2
            step = Fraction(2) ** (_floor_log2(largest) - digits)
            exponent = _floor_log2(round(largest / step) * step) - _floor_log2(top)
        case _:  # the smallest with which nothing saturates
            exponent = _ceil_log2(largest / top)
    return min(max(exponent, -127), 127)


def block_scale(values: Sequence[float], scheme: Scheme, tensor_scale: float = 1.0) -> float:
    """Return the scale of a block as it is stored; the tensor's own is not part of it."""
    if not all(map(math.isfinite, values)):
        return math.nan
    largest = max((abs(Fraction(value)) for value in values), default=Fraction(0))
    if scheme.scale == ELEMENTS["e8m0"]:
        return 2.0 ** shared_exponent(largest, scheme) if largest else 2.0**-127
    wanted = _float32(largest / Fraction(_float32(_largest_element(scheme) * Fraction(tensor_scale))))
    if scheme.scale.bits == 32:
        return wanted
    code = reference.encode(wanted, scheme.scale, Rules(overflow=Overflow.SATURATE))
    return reference.decode(max(code, 1) if largest else 0, scheme.scale)


def quantize_block(values: Sequence[float], scale: float, scheme: Scheme) -> list[int]:
    """Return the codes of a block under its full scale (the tensor's own included)."""
    if math.isnan(scale):
        return [reference.encode(0.0, scheme.element)] * len(values)
    divisor = Fraction(scale) or Fraction(1)
    rules = Rules(Rounding.parse(scheme.rounding), Overflow.CLAMP, NanInput.ZERO)
    return [reference.encode(_signed_float32(value, divisor), scheme.element, rules) for value in values]


def dequantize_block(codes: Sequence[int], scale: float, scheme: Scheme) -> list[float]:
    """Return what the codes of a block stand for under its full scale."""
    if math.isnan(scale):
        return [math.nan] * len(codes)
    decoded = [reference.decode(code, scheme.element) for code in codes]
    return [math.copysign(_float32(Fraction(value) * Fraction(scale)), value) for value in decoded]


def _largest_element(scheme: Scheme) -> Fraction:
    match scheme.element:
        case Codebook(values=values):
            return Fraction(max(abs(values[0]), values[-1]))
        case Integer(bits=bits, step=step):
            return Fraction(2 ** (bits - 1) - 1) * Fraction(step)
        case Format():
            return Fraction(scheme.element.max)


def _signed_float32(value: float, divisor: Fraction) -> float:
    return math.copysign(_float32(Fraction(value) / divisor), value)


def _float32(value: Fraction) -> float:
    return reference.decode(reference.encode(value, _FP32), _FP32)


def _floor_log2(value: Fraction) -> int:
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= value else exponent - 1


def _ceil_log2(value: Fraction) -> int:
    floor = _floor_log2(value)
    return floor if Fraction(2) ** floor == value else floor + 1
