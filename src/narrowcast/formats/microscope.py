"""One value under the microscope: its bits in a format, what is stored, and what happened to it on the way.

Everything is computed with the scalar reference codec on exact fractions: a decimal such as 0.1 is rounded once. Only a draw
of stochastic rounding is the array codec's, so that the same seed shows what it does.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from fractions import Fraction

import numpy as np

from narrowcast.formats import fast, reference, verdicts
from narrowcast.formats.arrays import opened
from narrowcast.formats.fields import Field, fields_of
from narrowcast.formats.kinds import ElementFormat, Format
from narrowcast.formats.literals import Value, exact_value, is_finite, parse_code, parse_value
from narrowcast.formats.order import code_at, floor_place, place_of, places, value_at
from narrowcast.formats.rules import Rules
from narrowcast.formats.verdicts import Event

__all__ = ["Event", "Point", "Specimen", "Standing", "drawn", "look", "look_at_code"]


class Standing(StrEnum):
    """What kind of number a code is."""

    NORMAL = "normal"
    SUBNORMAL = "subnormal"
    ZERO = "zero"
    INFINITY = "infinity"
    NAN = "nan"


@dataclass(frozen=True)
class Point:
    """A number of a format: its code and its value."""

    code: int
    value: float


@dataclass(frozen=True)
class Specimen:
    """A value, or a code, and everything that can be seen of it in a format.

    Args:
        format: The format.
        given: What was asked about, as it was typed.
        value: The exact number that was given; the stored one where a code was given.
        code: The code.
        fields: The code's bits, cut into fields, the most significant first.
        stored: The code's value.
        standing: Whether the stored number is normal, subnormal, zero, infinity or NaN.
        event: What happened, as a word to test for; None where a code was given.
        words: What happened, as a sentence part.
        error: Stored minus given; None where either is not finite, or a code was given.
        ulps: The error in steps: distances between the numbers on both sides of the value (at the ends of the range, of
            the last two).
        around: The numbers on both sides of the given value, which rounding chooses from; the same point twice where the
            value is a number of the format, None where there is none on that side.
        neighbours: The next smaller and next larger number of the stored one.
    """

    format: ElementFormat
    given: str
    value: Value
    code: int
    fields: tuple[Field, ...]
    stored: float
    standing: Standing
    event: Event | None
    words: str
    error: Fraction | None
    ulps: Fraction | None
    around: tuple[Point | None, Point | None]
    neighbours: tuple[Point | None, Point | None]

    @property
    def bits(self) -> str:
        """The code in binary, its fields apart."""
        return " ".join(field.bits for field in self.fields)

    @property
    def hexadecimal(self) -> str:
        """The code in hexadecimal, with as many digits as the format's bits fill."""
        return f"0x{self.code:0{-(-self.format.bits // 4)}x}"

    @property
    def relative(self) -> Fraction | None:
        """The error as a share of the given value; None for zero and where there is no error to speak of."""
        return None if self.error is None or not self.value else self.error / abs(Fraction(self.value))

    @property
    def exact(self) -> str:
        """The stored value in full: every digit of a finite number's decimal expansion."""
        return f"{Decimal(self.stored)}".lower().replace("infinity", "inf") if self.stored == self.stored else "nan"

    @property
    def fraction(self) -> Fraction | None:
        """The stored value as a fraction whose denominator is a power of two; None where it is not finite."""
        return Fraction(self.stored) if math.isfinite(self.stored) else None


def look(
    value: str | float | Fraction, format: ElementFormat, rules: Rules | None = None, code: int | None = None
) -> Specimen:
    """Return what becomes of a value.

    Args:
        value: A number, or text that writes one: decimal, fraction, hexadecimal float, ``inf``, ``nan``, ``-0``.
        format: What it is stored in.
        rules: Rounding, overflow and the rest; the format's own defaults unless given. Stochastic rounding goes the likelier
            way.
        code: What the value became, where that is known: one of what :func:`drawn` gives.

    Raises:
        FormatError: Text that is no number; NaN, and the format has none.
    """
    rules = rules or Rules.of(format)
    exact = parse_value(value) if isinstance(value, str) else exact_value(value)
    code = reference.encode(exact, format, rules) if code is None else code
    stored = reference.decode(code, format)
    around = _around(exact, format)
    event, words = verdicts.judge(verdicts.Case(exact, stored, code, format, rules, _values(around)))
    error = Fraction(stored) - Fraction(exact) if is_finite(exact) and math.isfinite(stored) else None
    return Specimen(
        format=format,
        given=str(value),
        value=exact,
        code=code,
        fields=fields_of(code, format),
        stored=stored,
        standing=standing_of(code, format),
        event=event,
        words=words,
        error=error,
        ulps=None if error is None else error / _step(Fraction(exact), format),
        around=around,
        neighbours=_neighbours(code, format),
    )


def drawn(values: Sequence[str], format: ElementFormat, rules: Rules, seed: int) -> list[int]:
    """Return the codes that :func:`narrowcast.formats.encode` gives a float64 array of these values under that seed.

    Beyond float64, where nothing is left to draw, the reference decides.

    Raises:
        FormatError: Text that is no number; NaN, and the format has none.
    """
    exact = [parse_value(value) for value in values]
    beyond = [is_finite(value) and abs(value) > sys.float_info.max for value in exact]
    numbers = np.array([0.0 if far else float(value) for value, far in zip(exact, beyond, strict=True)])
    codes = fast.encode(opened(numbers), fast.Encoding.of(format, rules), seed).tolist()
    return [
        reference.encode(value, format, rules) if far else int(code)
        for value, far, code in zip(exact, beyond, codes, strict=True)
    ]


def look_at_code(code: str | int, format: ElementFormat) -> Specimen:
    """Return what a code stands for.

    Args:
        code: A whole number, or text that writes one in hexadecimal, binary or decimal.
        format: The format that it is a code of.

    Raises:
        FormatError: No such code.
    """
    number = parse_code(str(code), format)
    stored = reference.decode(number, format)
    value = exact_value(stored)
    return Specimen(
        format=format,
        given=str(code),
        value=value,
        code=number,
        fields=fields_of(number, format),
        stored=stored,
        standing=standing_of(number, format),
        event=None,
        words=_described(number, format),
        error=None,
        ulps=None,
        around=_around(value, format),
        neighbours=_neighbours(number, format),
    )


def standing_of(code: int, format: ElementFormat) -> Standing:
    """Return what kind of number a code is."""
    value = reference.decode(code, format)
    if math.isnan(value):
        return Standing.NAN
    if math.isinf(value):
        return Standing.INFINITY
    if value == 0:
        return Standing.ZERO
    if isinstance(format, Format) and abs(value) < format.smallest_normal:
        return Standing.SUBNORMAL
    return Standing.NORMAL


def _described(code: int, format: ElementFormat) -> str:
    match standing_of(code, format):
        case Standing.SUBNORMAL:
            return verdicts.subnormal(code, format)
        case Standing.NAN if isinstance(format, Format) and format.has_inf:
            quiet = code & (1 << (format.mantissa_bits - 1))
            return "a quiet NaN" if quiet else "a signalling NaN"
        case Standing.NAN:
            return "NaN"
        case Standing.INFINITY:
            return "infinity"
        case Standing.ZERO:
            return "minus zero" if math.copysign(1.0, reference.decode(code, format)) < 0 else "zero"
        case Standing.NORMAL:
            return "a normal number" if isinstance(format, Format) else "a number"


def _around(value: Value, format: ElementFormat) -> tuple[Point | None, Point | None]:
    """Return the finite numbers next to a value, below and above."""
    if not is_finite(value):
        return None, None
    here, known = floor_place(value, format), places(format)
    floor = value_at(here, format)
    if floor > value:  # below the smallest number
        return None, Point(code_at(here, format), floor)
    upper = here if floor == value else here + 1
    return _point(here, format), _point(upper, format) if upper in known else None


def _point(place: int, format: ElementFormat) -> Point:
    return Point(code_at(place, format), value_at(place, format))


def _values(points: tuple[Point | None, Point | None]) -> tuple[float | None, float | None]:
    lower, upper = points
    return None if lower is None else lower.value, None if upper is None else upper.value


def _step(value: Fraction, format: ElementFormat) -> Fraction:
    """Return the distance between the numbers around a value; beyond the range, of its last two."""
    known = places(format)
    lower = min(max(floor_place(value, format), known[0]), known[-2])
    if value < 0 and value_at(lower, format) == value and lower > known[0]:
        lower -= 1  # the step away from zero is the larger one
    return Fraction(value_at(lower + 1, format)) - Fraction(value_at(lower, format))


def _neighbours(code: int, format: ElementFormat) -> tuple[Point | None, Point | None]:
    known, here = places(format), place_of(code, format)
    if here is not None:
        return _beside(here - 1, format, known), _beside(here + 1, format, known)
    value = reference.decode(code, format)
    if math.isnan(value):
        return None, None
    last = _point(known[-1] if value > 0 else known[0], format)
    return (last, None) if value > 0 else (None, last)


def _beside(place: int, format: ElementFormat, known: range) -> Point | None:
    if place in known:
        return _point(place, format)
    if not (isinstance(format, Format) and format.has_inf):
        return None
    if place < 0:
        return Point(format.sign_bit | format.infinity_code, -math.inf) if format.signed else None
    return Point(format.infinity_code, math.inf)
