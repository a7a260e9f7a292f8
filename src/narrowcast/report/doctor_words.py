"""Numbers of a run's record as people read them."""

from __future__ import annotations

import math

from narrowcast.report import text
from narrowcast.training.doctor.values import Cause, Event, Part, Range
from narrowcast.training.doctor.whatif import Bounds, Shares, element, overflow_limit, underflow_limit

__all__ = [
    "bounds",
    "cause_title",
    "event_words",
    "format_title",
    "held_words",
    "magnitude",
    "part_words",
    "range_words",
    "sample_words",
    "scale_words",
    "scaled_words",
]

_PARTS = {
    Part.FORWARD: "forward",
    Part.BACKWARD: "backward",
    Part.GRADIENT: "gradient",
    Part.WEIGHT: "weights",
    Part.UPDATE: "update",
    Part.RATIO: "update",
}
_KINDS = {
    "inf": "overflow to infinity",
    "nan": "NaN",
    "zero": "all zero",
    "saturated": "saturated at the largest number",
    "stagnant": "updates too small to move the weights",
}
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def sample_words(count: int, numbers: int) -> str:
    """Return what shares are shares of: all numbers, or a sample of them.

    >>> sample_words(1200, 1200), sample_words(1200, 90000)
    ('1,200 numbers', 'a sample of 1,200 of 90,000 numbers')
    """
    every = f"{text.integer(numbers)} numbers"
    return every if count == numbers else f"a sample of {text.integer(count)} of {every}"


def part_words(part: Part) -> str:
    """Return a part as one word."""
    return _PARTS[part]


def magnitude(value: float) -> str:
    """Return a magnitude with three digits; 0 where nothing was seen."""
    return text.number(value)


def scale_words(scale: float) -> str:
    """Return a scale: a power of two as one.

    >>> scale_words(65536.0), scale_words(1.0), scale_words(1000.0)
    ('2¹⁶', '1', '1,000')
    """
    if scale == 1:
        return "1"
    power = math.log2(scale) if scale > 0 else 0.5
    return f"2{str(round(power)).translate(_RAISED)}" if power == round(power) else text.number(scale, 4)


def bounds(found: Bounds) -> str:
    """Return a share that is known up to bounds.

    >>> bounds(Bounds(0.0, 0.0)), bounds(Bounds(0.1, 0.1)), bounds(Bounds(0.0, 0.02))
    ('0', '10%', '≤2%')
    """
    low, high = text.part(found.low), text.part(found.high)
    return high if low == high else f"≤{high}"


def held_words(found: Shares) -> str:
    """Return what a format does to numbers, as part of a sentence."""
    said = [
        f"{bounds(share)} {words}"
        for share, words in (
            (found.overflow, "overflow"),
            (found.zero, "become zero"),
            (found.subnormal, "are subnormal"),
        )
        if share.high > 0
    ]
    broken = found.infinite + found.nan
    said += [f"{text.part(broken)} were not finite already"] if broken else []
    return ", ".join(said) or "all are held"


def scaled_words(found: Shares, plain: Shares) -> str:
    """Return what a format does to numbers under a scale of their own; none is needed where all are held anyway."""
    if not (plain.overflow.high or plain.zero.high or plain.subnormal.high):
        return "needs none"
    return f"{held_words(found)} (times {scale_words(found.scale)})"


def format_title(name: str) -> str:
    """Return the range of a format in words."""
    found = element(name)
    return f"{name}: from {magnitude(underflow_limit(found))} (half the smallest) to {magnitude(overflow_limit(found))}"


def range_words(one: Range) -> list[str]:
    """Return the least, the greatest and the smallest number of a tensor, and what is special in it."""
    special = [
        f"{text.integer(count)} {words}"
        for count, words in ((one.zeros, "zeros"), (one.infinite, "infinite"), (one.nan, "NaN"))
        if count
    ]
    return [text.number(one.low), text.number(one.high), text.number(one.smallest), ", ".join(special) or text.MISSING]


def event_words(event: Event) -> str:
    """Return an event in one sentence: its cause's title, if it has one, for the cause itself is told elsewhere."""
    return event.sentence if event.cause is None else f"{cause_title(event.cause)}: see above"


def cause_title(cause: Cause) -> str:
    """Return where a number broke first, in one line."""
    where = f"in {cause.layer}" if cause.layer else "in the model itself"
    kind = _KINDS.get(cause.kind, cause.kind)
    return f"{kind[0].upper()}{kind[1:]} {where}, {part_words(cause.part)}, {cause.operator}"
