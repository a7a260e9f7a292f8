"""Bars that the page draws with CSS: shares of formats, blame on a log scale, time and bytes of the original."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from narrowcast.artifacts.manifest import Blame, OperatorShare
from narrowcast.report import text

__all__ = ["BlameBar", "ProfileBar", "Segment", "Tick", "blame_bars", "profile_bars", "segments"]

# Okabe and Ito's palette, as variables of the style sheet; other formats go through the rest in turn.
_FORMAT_COLOURS = {"fp32": "grey", "fp16": "sky", "bf16": "purple", "fp8": "orange", "int8": "blue", "int4": "green"}
_REST = ("orange", "green", "purple", "vermillion", "yellow")


@dataclass(frozen=True)
class Segment:
    """A format's part of the stacked bar: width in percent, and its name and share as text."""

    name: str
    share: str
    width: float
    colour: str


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: place in percent and text."""

    place: float
    text: str


@dataclass(frozen=True)
class BlameBar:
    """One operator group's bar: width in percent on the log scale, and what is written beside it."""

    group: str
    op_type: str
    width: float
    noise: str
    seconds: str
    kept_float: bool


@dataclass(frozen=True)
class ProfileBar:
    """One operator type's share of the original's time and bytes, widths in percent."""

    op_type: str
    count: int
    time_width: float
    time_share: str
    seconds: str
    bytes_width: float
    bytes: str


def segments(shares: dict[str, float]) -> list[Segment]:
    """Return the parts of the stacked bar in the order given."""
    rest = iter(_REST * len(shares))
    return [
        Segment(text.format_name(name), text.share(value), 100 * value, _FORMAT_COLOURS.get(name) or next(rest))
        for name, value in shares.items()
        if text.finite(value) and value > 0
    ]


def blame_bars(blame: Sequence[Blame], limit: int = 20) -> tuple[list[BlameBar], list[Tick]]:
    """Return the bars of the worst groups, the worst first, and the ticks of their log scale."""
    worst = sorted(blame, key=lambda item: -item.noise if text.finite(item.noise) else math.inf)[:limit]
    positive = [item.noise for item in worst if text.finite(item.noise) and item.noise > 0]
    low = math.floor(math.log10(min(positive))) if positive else 0
    high = max(math.ceil(math.log10(max(positive))) if positive else 1, low + 1)

    def width(value: float) -> float:
        if not text.finite(value) or value <= 0:
            return 0.0
        return max(0.8, 100 * (math.log10(value) - low) / (high - low))

    bars = [
        BlameBar(
            item.group,
            item.op_type,
            width(item.noise),
            text.noise(item.noise),
            text.quantity(item.seconds, "s"),
            item.kept_float,
        )
        for item in worst
    ]
    step = max(1, math.ceil((high - low) / 5))
    ticks = [Tick(100 * (power - low) / (high - low), _power(power)) for power in range(low, high + 1, step)]
    return bars, ticks if positive else []


def _power(power: int) -> str:
    if -2 <= power <= 2:
        return f"{10.0**power:g}"
    return f"10{str(power).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def profile_bars(profile: Sequence[OperatorShare], limit: int = 10) -> list[ProfileBar]:
    """Return the operator types that take the most time; what is beyond the limit is added up as one bar."""
    ordered = sorted(profile, key=lambda item: (-_zero(item.time_share), -item.bytes))
    head, tail = ordered[:limit], ordered[limit:]
    if len(tail) == 1:
        head, tail = ordered, []
    if tail:
        rest = OperatorShare(
            op_type=f"{len(tail)} other types",
            count=sum(item.count for item in tail),
            seconds=sum(_zero(item.seconds) for item in tail),
            time_share=sum(_zero(item.time_share) for item in tail),
            bytes=sum(item.bytes for item in tail),
        )
        head = [*head, rest]
    total = sum(item.bytes for item in profile) or 1
    return [
        ProfileBar(
            item.op_type,
            item.count,
            100 * _zero(item.time_share),
            text.share(item.time_share),
            text.quantity(item.seconds, "s"),
            100 * item.bytes / total,
            text.quantity(item.bytes, "bytes"),
        )
        for item in head
    ]


def _zero(value: float) -> float:
    return value if text.finite(value) else 0.0
