"""What happened to a value on its way into a format, as a word for programs and words for people."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

from narrowcast.formats import reference
from narrowcast.formats.kinds import Codebook, ElementFormat, Format, Integer
from narrowcast.formats.literals import Value
from narrowcast.formats.rules import Overflow, Rounding, Rules

__all__ = ["Case", "Event", "judge", "subnormal"]

_HALF = Fraction(1, 2)
_NEAREST = " to the nearest"


class Event(StrEnum):
    """What happened to a value."""

    EXACT = "exact"
    ROUNDED_UP = "rounded_up"  # toward +infinity
    ROUNDED_DOWN = "rounded_down"  # toward -infinity
    FLUSHED = "flushed_to_zero"
    OVERFLOWED = "overflowed"  # a finite number became infinity
    SATURATED = "saturated"  # at the largest or smallest number
    WRAPPED = "wrapped"
    BECAME_NAN = "became_nan"
    SIGN_DROPPED = "sign_dropped"
    NAN_REPLACED = "nan_replaced"


@dataclass(frozen=True)
class Case:
    """What there is to judge: the value given, what was stored, under which rules, and the finite numbers around it."""

    value: Value
    stored: float
    code: int
    format: ElementFormat
    rules: Rules
    around: tuple[float | None, float | None]


def judge(case: Case) -> tuple[Event, str]:
    """Return what happened."""
    value, stored, format = case.value, case.stored, case.format
    if isinstance(value, float) and math.isnan(value):
        return _of_nan(stored, format)
    if isinstance(value, float) and math.isinf(value):
        return _of_infinity(value, case)
    if isinstance(format, Format) and not format.signed and (value < 0 or (value == 0 and not format.has_zero)):
        return _below(case)
    if stored == value:
        return _exactly(case)
    lower, upper = case.around
    if lower is None or upper is None:
        return _beyond(case)
    return _between(case, Fraction(lower), Fraction(upper))


def subnormal(code: int, format: ElementFormat) -> str:
    """Return how many digits a subnormal code has left."""
    if not isinstance(format, Format):
        return ""
    left = (code & ((1 << format.mantissa_bits) - 1)).bit_length()
    return f"subnormal: {left} of {format.mantissa_bits + 1} significant bits left"


def _of_nan(stored: float, format: ElementFormat) -> tuple[Event, str]:
    if math.isnan(stored):
        return Event.EXACT, "NaN stays NaN"
    return Event.NAN_REPLACED, f"{format.name} has no NaN: stored as {_short(stored)}"


def _of_infinity(value: float, case: Case) -> tuple[Event, str]:
    stored, format = case.stored, case.format
    if stored == value:
        return Event.EXACT, "infinity stays infinity"
    if math.isnan(stored):
        return Event.BECAME_NAN, "infinity became NaN" + (
            "" if _has_inf(format) else f": {format.name} has no infinity"
        )
    if isinstance(format, Format) and not format.signed and value < 0:
        return Event.SIGN_DROPPED, f"{format.name} has no sign: stored as {_short(stored)}"
    if case.rules.overflow is Overflow.WRAP:
        return Event.WRAPPED, "infinity wrapped around to 0"
    return Event.SATURATED, f"saturated at the {_end(stored, format)}, {_short(stored)}"


def _below(case: Case) -> tuple[Event, str]:
    """Judge zero and negative numbers in a format that has none of them."""
    what = "zero" if case.value == 0 else "negative numbers"
    why = f"{case.format.name} has no {what}"
    if math.isnan(case.stored):
        return Event.BECAME_NAN, f"{why}: became NaN"
    if case.stored == case.format.min:
        return Event.SATURATED, f"{why}: saturated at the smallest number, {_short(case.stored)}"
    return Event.SIGN_DROPPED, f"{why}: the sign was dropped"


def _exactly(case: Case) -> tuple[Event, str]:
    if case.value == 0 and isinstance(case.value, float) and math.copysign(1.0, case.stored) > 0:
        return Event.EXACT, f"{case.format.name} has one zero: the sign is gone"
    return Event.EXACT, "exact" + _digits(case)


def _beyond(case: Case) -> tuple[Event, str]:
    """Judge a number outside the range."""
    stored, format, value = case.stored, case.format, case.value
    end = format.max if value > 0 and value > Fraction(format.max) else format.min
    if math.isinf(stored):
        return Event.OVERFLOWED, f"overflowed to infinity: beyond the {_end(end, format)}, {_short(end)}"
    if math.isnan(stored):
        return Event.BECAME_NAN, f"overflowed to NaN: beyond the {_end(end, format)}, {_short(end)}"
    if _rounds_to_end(case, Fraction(end)):
        up = stored > value
        how = f"{'up' if up else 'down'} to the {_end(end, format)}"
        return (Event.ROUNDED_UP if up else Event.ROUNDED_DOWN), f"rounded {how}"
    if case.rules.overflow is Overflow.WRAP:
        return Event.WRAPPED, f"wrapped around: beyond the {_end(end, format)}, {_short(end)}"
    return Event.SATURATED, f"saturated at the {_end(end, format)}, {_short(end)}"


def _rounds_to_end(case: Case, end: Fraction) -> bool:
    """Return whether a number beyond the range is so near to its end that with more range it would be rounded there."""
    format, magnitude, limit = case.format, abs(Fraction(case.value)), abs(end)
    if isinstance(format, Codebook) or (isinstance(format, Format) and magnitude < limit):
        return False
    if isinstance(format, Integer):
        step = Fraction(format.step)
    else:
        step = Fraction(2) ** (format.maximum_exponent - format.mantissa_bits)
    return reference.rounded(magnitude / step, case.value < 0, case.rules.rounding, _HALF) * step == limit


def _between(case: Case, lower: Fraction, upper: Fraction) -> tuple[Event, str]:
    up = case.stored == upper
    share = (Fraction(case.value) - lower) / (upper - lower)
    reason = _reason(case, up, share)
    if case.stored == 0 and isinstance(case.format, Format):
        share = share if lower == 0 else 1 - share
        size = "half" if share == _HALF else "less than half" if share < _HALF else "more than half"
        reason = (
            ""
            if share < _HALF and reason == _NEAREST
            else f",{reason.removeprefix(',').replace('from a tie', 'a tie')}"
        )
        smallest = _short(case.format.smallest_subnormal)
        return Event.FLUSHED, f"flushed to zero: {size} of the smallest number, {smallest}{reason}"
    event = Event.ROUNDED_UP if up else Event.ROUNDED_DOWN
    return event, f"rounded {'up' if up else 'down'}{reason}{_digits(case)}"


def _reason(case: Case, up: bool, share: Fraction) -> str:
    """Return why rounding went where it went, with the punctuation before it."""
    tie = share == _HALF
    hidden_only = isinstance(case.format, Format) and not case.format.mantissa_bits  # every significand is 1, odd
    match case.rules.rounding:
        case Rounding.NEAREST_EVEN if tie and isinstance(case.format, Codebook):
            return " from a tie, as in every table"
        case Rounding.NEAREST_EVEN if tie and not hidden_only:
            return " from a tie, to the even code"
        case Rounding.NEAREST_EVEN | Rounding.NEAREST_AWAY if tie:
            return " from a tie, away from zero"
        case Rounding.NEAREST_EVEN | Rounding.NEAREST_AWAY:
            return _NEAREST
        case Rounding.TOWARD_ZERO:
            return ", toward zero"
        case Rounding.UP:
            return ", toward plus infinity"
        case Rounding.DOWN:
            return ", toward minus infinity"
        case Rounding.TO_ODD:
            return ", toward zero: every significand is odd" if hidden_only else " to the odd code"
        case Rounding.STOCHASTIC:
            chance = float(share if up else 1 - share)
            return f", as {100 * chance:.3g} % of draws do"


def _digits(case: Case) -> str:
    format = case.format
    if not isinstance(format, Format) or not case.stored or abs(case.stored) >= format.smallest_normal:
        return ""
    return f", {subnormal(case.code, format)}"


def _end(end: float, format: ElementFormat) -> str:
    if end == format.max:
        return "largest number"
    return "most negative number" if end < 0 else "smallest number"


def _has_inf(format: ElementFormat) -> bool:
    return isinstance(format, Format) and format.has_inf


def _short(value: float) -> str:
    return f"{value:.6g}"
