"""Number formats on one number line, as an SVG file: a line for every value, so that range and density are seen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from html import escape

from narrowcast.errors import FormatError, choices
from narrowcast.formats.facts import Facts, facts
from narrowcast.formats.kinds import ElementFormat
from narrowcast.formats.order import floor_place, places, value_at

__all__ = ["Axis", "number_line"]

_WIDTH, _LEFT, _RIGHT = 1200, 272, 1152
_TOP, _ROW, _TICK, _FOOT = 104, 76, 30, 62
_MOST_LINES = 600  # a format with more values is drawn pixel by pixel
_APART = 46  # pixels, at least, between labels of the axis
_LETTER = 6.4  # pixels, of a label
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

# The report's palette, for light and dark surroundings.
_STYLE = """
svg { --surface: #fff; --ink: #15181c; --muted: #5b636d; --rule: #dfe0dc; --float: #0067a5; --integer: #00795a;
  --codebook: #b85c00; font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans",
  Arial, sans-serif; }
@media (prefers-color-scheme: dark) { svg { --surface: #1b1e23; --ink: #eceef0; --muted: #a2aab4; --rule: #33383f;
  --float: #62b8ee; --integer: #4fd1a5; --codebook: #f2b25c; } }
text { fill: var(--muted); font-size: 12px; }
.title { fill: var(--ink); font-size: 24px; font-weight: 680; letter-spacing: -.01em; }
.lead { font-size: 14px; }
.name { fill: var(--ink); font-size: 17px; font-weight: 650; }
.value { font-size: 11px; text-anchor: middle; font-variant-numeric: tabular-nums; }
.at { text-anchor: middle; }
.page { fill: var(--surface); }
path { fill: none; stroke-width: 1.3; }
.grid, .base { stroke: var(--rule); stroke-width: 1; }
.zero { stroke: var(--ink); stroke-width: 1.6; }
.float { stroke: var(--float); } .integer { stroke: var(--integer); } .codebook { stroke: var(--codebook); }
.subnormal { opacity: .45; }
.float.full { fill: var(--float); stroke: none; } .integer.full { fill: var(--integer); stroke: none; }
.codebook.full { fill: var(--codebook); stroke: none; }
"""


class Axis(StrEnum):
    """How values become positions."""

    LINEAR = "linear"
    LOG = "log"  # symmetric: log2(1 + |x| / smallest), with the sign of x
    SCALED = "scaled"  # every format divided by its largest magnitude, as a scale factor does


@dataclass(frozen=True)
class _Line:
    """The axis: which numbers it spans, and where they go."""

    axis: Axis
    low: float
    high: float
    unit: float  # smallest positive number of a logarithmic axis

    def at(self, value: float) -> float:
        """Return the horizontal position of a number, in pixels."""
        start, end = self._place(self.low), self._place(self.high)
        return _LEFT + (self._place(value) - start) / (end - start) * (_RIGHT - _LEFT)

    def value(self, pixel: float) -> float:
        """Return the number at a position."""
        start, end = self._place(self.low), self._place(self.high)
        place = start + (pixel - _LEFT) / (_RIGHT - _LEFT) * (end - start)
        if self.axis is not Axis.LOG:
            return place
        magnitude = abs(place)
        power = magnitude + math.log2(self.unit)
        inner = self.unit * (2.0**magnitude - 1) if magnitude < 60 else 2.0 ** min(power, 1023.9999)
        return math.copysign(inner, place)

    def _place(self, value: float) -> float:
        if self.axis is not Axis.LOG or not value:
            return value
        power = math.log2(abs(value)) - math.log2(self.unit)
        return math.copysign(math.log2(1 + 2.0**power) if power < 60 else power, value)


def number_line(formats: Sequence[ElementFormat], *, axis: str | None = None) -> str:
    """Return a picture of where the values of formats lie: an SVG document for light and dark surroundings.

    Args:
        formats: Element formats, drawn from top to bottom. Those with too many values for lines are drawn as the pixels that
            hold any value, so none is refused.
        axis: ``linear``, ``log`` or ``scaled``; by default linear where that shows the values apart, else log.

    Raises:
        FormatError: No format, or an unknown axis.
    """
    if not formats:
        raise FormatError("no format to draw", allowed="one or more")
    known = [facts(format) for format in formats]
    line = _line(known, _axis(known, axis))
    bottom = _TOP + _ROW * len(formats)
    parts = [
        f'<rect class="page" width="{_WIDTH}" height="{bottom + _FOOT}" rx="16"/>',
        f'<text class="title" x="32" y="46">{escape(_title(known))}</text>',
        f'<text class="lead" x="32" y="72">{escape(_lead(line.axis, known))}</text>',
        *_scale(line, bottom),
    ]
    for number, (format, fact) in enumerate(zip(formats, known, strict=True)):
        parts += _row(format, fact, line, _TOP + _ROW * number)
    words = escape(_title(known) + ": " + "; ".join(_described(fact) for fact in known))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom + _FOOT}" role="img" aria-label="{words}">'
    return "\n".join([head, f"<style>{_STYLE}</style>", *parts, "</svg>", ""])


# The axis -------------------------------------------------------------------------------------------------------------


def _axis(known: Sequence[Facts], name: str | None) -> Axis:
    if name is not None:
        try:
            return Axis(name)
        except ValueError:
            raise FormatError(f"unknown axis {name!r}", allowed=choices(name, list(Axis))) from None
    largest = [fact.largest for fact in known]
    apart = all(fact.largest <= 512 * fact.smallest_positive for fact in known)
    return Axis.LINEAR if apart and max(largest) <= 8 * min(largest) else Axis.LOG


def _line(known: Sequence[Facts], axis: Axis) -> _Line:
    low, high = min(fact.smallest for fact in known), max(fact.largest for fact in known)
    if axis is Axis.SCALED:
        low, high = (-1.0 if low < 0 else 0.0), 1.0
    if axis is Axis.LINEAR and (high > 1e300 or low < -1e300):
        raise FormatError("axis = 'linear' over the whole of float64", allowed="log, scaled")
    return _Line(axis, low, high, min(fact.smallest_positive for fact in known))


def _scale(line: _Line, bottom: int) -> Iterator[str]:
    """Yield the vertical lines behind the rows and what they stand for."""
    for value in _marks(line):
        x = line.at(value)
        yield f'<path class="grid" d="M{x:.1f} {_TOP - 8}V{bottom + 4}"/>'
        yield f'<text class="at" x="{x:.1f}" y="{bottom + 24}">{_mark(value)}</text>'


def _marks(line: _Line) -> list[float]:
    if line.axis is not Axis.LOG:
        step = _nice((line.high - line.low) / 10)
        return [step * k for k in range(math.ceil(line.low / step), math.floor(line.high / step) + 1)]
    powers = range(math.ceil(math.log10(line.unit)), math.floor(math.log10(max(line.high, -line.low))) + 1)
    for stride in (1, 2, 3, 6, 12, 24, 48, 96):
        sizes = [10.0**power for power in powers if power % stride == 0]
        values = [value for value in (*(-size for size in reversed(sizes)), *sizes) if line.low <= value <= line.high]
        if all(b * a < 0 or line.at(b) - line.at(a) >= _APART for a, b in itertools.pairwise(values)):
            break
    zero = [0.0] if line.low <= 0 <= line.high else []
    return zero + [value for value in values if not zero or abs(line.at(value) - line.at(0)) >= _APART]


def _nice(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * 0.999)


def _mark(value: float) -> str:
    if value and not 1e-4 < abs(value) < 1e6:
        power = f"10{str(round(math.log10(abs(value)))).translate(_RAISED)}"
        return f"−{power}" if value < 0 else power
    return _number(value)


# Rows -----------------------------------------------------------------------------------------------------------------


def _row(format: ElementFormat, fact: Facts, line: _Line, top: int) -> Iterator[str]:
    middle = top + _TICK / 2
    scale = max(abs(fact.smallest), fact.largest) if line.axis is Axis.SCALED else 1.0
    low, high = (line.at(end / scale) for end in (fact.smallest, fact.largest))
    yield f'<text class="name" x="32" y="{top + 14}">{escape(fact.name)}</text>'
    yield f'<text x="32" y="{top + 32}">{fact.bits:g} bits · {_count(fact.values or 0)} values</text>'
    yield f'<text x="32" y="{top + 48}">{_span(fact)}</text>'
    yield f'<path class="base" d="M{low:.1f} {middle}H{high:.1f}"/>'
    if fact.values is not None and fact.values <= _MOST_LINES:
        yield from _lines(format, fact, line, top, scale)
    else:
        yield from _runs(format, fact, line, top, scale)
    if fact.smallest <= 0 and value_at(floor_place(0.0, format), format) == 0:
        yield f'<path class="zero" d="M{line.at(0):.1f} {top - 4}v{_TICK + 8}"/>'


def _lines(format: ElementFormat, fact: Facts, line: _Line, top: int, scale: float) -> Iterator[str]:
    """Yield a vertical line for each value, and labels where there is room."""
    values = [value_at(place, format) for place in places(format)]
    normal = fact.smallest_normal or 0.0
    groups = {
        f"{fact.kind} subnormal": [value for value in values if 0 < abs(value) < normal],
        fact.kind: [value for value in values if value and abs(value) >= normal],
    }
    for style, group in groups.items():
        if group:
            path = "".join(f"M{line.at(value / scale):.1f} {top}v{_TICK}" for value in group)
            yield f'<path class="{style}" d="{path}"/>'
    few = [fact.largest, fact.smallest, 0.0, fact.smallest_positive, -fact.smallest_positive, 1.0, -1.0]
    placed = _placed(values, line, scale)
    if len(placed) < len(values):
        placed = _placed([value for value in dict.fromkeys(few) if value in values], line, scale)
    yield from _labels(placed, top)


def _placed(values: Sequence[float], line: _Line, scale: float) -> list[tuple[float, str]]:
    """Return the labels that fit, with their positions; the first values go first."""
    taken: list[tuple[float, str]] = []
    for value in values:
        words, x = _number(value), line.at(value / scale)
        if all(abs(x - other) >= _LETTER * (len(words) + len(name)) / 2 + 6 for other, name in taken):
            taken.append((x, words))
    return taken


def _labels(placed: Sequence[tuple[float, str]], top: int) -> Iterator[str]:
    for x, words in placed:
        yield f'<text class="value" x="{x:.1f}" y="{top + _TICK + 17}">{words}</text>'


def _runs(format: ElementFormat, fact: Facts, line: _Line, top: int, scale: float) -> Iterator[str]:
    """Yield filled pieces over the pixels that hold a value."""
    edges = [_LEFT + pixel for pixel in range(_RIGHT - _LEFT + 1)]
    below = [_below(line.value(edge) * scale, format, fact) for edge in edges]
    if line.at(fact.smallest / scale) < _LEFT + 0.5:
        below[0] = places(format)[0] - 1  # the first pixel holds its left end too
    held = [after > before for before, after in itertools.pairwise(below)]
    path = ""
    for full, run in itertools.groupby(enumerate(held), key=lambda item: item[1]):
        pixels = [pixel for pixel, _ in run]
        if full:
            path += f"M{_LEFT + pixels[0]} {top}h{len(pixels)}v{_TICK}h-{len(pixels)}z"
    yield f'<path class="{fact.kind} full" d="{path}"/>'
    yield from _labels(_placed([fact.smallest, fact.largest], line, scale), top)


def _below(value: float, format: ElementFormat, fact: Facts) -> int:
    """Return how many values are at or below a number, counted from any place."""
    if value < fact.smallest:
        return places(format)[0] - 1
    return floor_place(Fraction(value), format)


# Words ----------------------------------------------------------------------------------------------------------------


def _title(known: Sequence[Facts]) -> str:
    names = [fact.name for fact in known]
    if len(names) > 4:
        return f"Where the values of {len(names)} number formats lie"
    return f"Where the values of {', '.join(names[:-1])}{' and ' if names[1:] else ''}{names[-1]} lie"


def _lead(axis: Axis, known: Sequence[Facts]) -> str:
    how = {
        Axis.LINEAR: "Linear axis",
        Axis.LOG: "Logarithmic axis, mirrored at zero",
        Axis.SCALED: "Each format scaled to a largest magnitude of 1",
    }[axis]
    many = any((fact.values or 0) > _MOST_LINES for fact in known)
    pale = any(fact.smallest_normal and fact.smallest_normal > fact.smallest_positive for fact in known)
    lines = "Each line is a value" + (", a pale one subnormal" if pale else "")
    return f"{how}. {lines}." + (" Filled: values closer than a pixel." if many else "")


def _described(fact: Facts) -> str:
    return f"{fact.name}, {fact.bits:g} bits, {_count(fact.values or 0)} values, {_span(fact)}"


def _span(fact: Facts) -> str:
    ends = f"±{_number(fact.largest)}" if fact.smallest == -fact.largest else (
        f"{_number(fact.smallest)} to {_number(fact.largest)}"
    )  # fmt: skip
    return ends if fact.smallest > 0 else f"{ends}, smallest {_number(fact.smallest_positive)}"


def _count(number: int) -> str:
    return f"{number:,}" if number < 10**7 else f"{number:.2g}"


def _number(value: float) -> str:
    text = f"{value:.6g}" if value == round(value, 4) and abs(value) < 1e6 else f"{value:.3g}"
    return text.replace("-", "−")
