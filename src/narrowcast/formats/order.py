"""The finite numbers of a format in increasing order: each has a place, and the next place is the neighbour.

Places are whole numbers, one apart. Where there is a zero it has place 0, whatever its sign bit.
"""

from __future__ import annotations

from fractions import Fraction

from narrowcast.formats import reference
from narrowcast.formats.kinds import Codebook, ElementFormat, Format, Integer, Nan
from narrowcast.formats.rules import Below, Overflow, Rounding, Rules

__all__ = ["code_at", "floor_place", "place_of", "places", "value_at"]

_FLOOR = Rules(Rounding.DOWN, Overflow.CLAMP, below=Below.CLAMP)


def places(format: ElementFormat) -> range:
    """Return the places of all finite numbers, the smallest (most negative) number's first."""
    match format:
        case Codebook():
            return range(len(format.values))
        case Integer():
            return range(round(format.min / format.step), round(format.max / format.step) + 1)
        case Format():
            negative = format.max_code + (not format.has_zero) if format.signed else 0
            return range(-negative, format.max_code + 1)


def code_at(place: int, format: ElementFormat) -> int:
    """Return the code of the number at a place; zero's is the positive one."""
    match format:
        case Codebook():
            return place
        case Integer():
            return place & ((1 << format.bits) - 1)
        case Format():
            return place if place >= 0 else format.sign_bit | (-place - (not format.has_zero))


def place_of(code: int, format: ElementFormat) -> int | None:
    """Return the place of a code's number; None for an infinity or NaN."""
    match format:
        case Codebook():
            return code
        case Integer():
            return code - (1 << format.bits if format.signed and code >> (format.bits - 1) else 0)
        case Format():
            negative, magnitude = bool(code & format.sign_bit), code & format.magnitude_mask
            if magnitude > format.max_code or (format.nan is Nan.NEGATIVE_ZERO and code == format.nan_code):
                return None
            return -(magnitude + (not format.has_zero)) if negative else magnitude


def value_at(place: int, format: ElementFormat) -> float:
    """Return the number at a place."""
    return reference.decode(code_at(place, format), format)


def floor_place(value: float | Fraction, format: ElementFormat) -> int:
    """Return the place of the largest number that is not above ``value``; the first place where all are."""
    place = place_of(reference.encode(value, format, _FLOOR), format)
    assert place is not None
    return place
