"""Pictures of a run's numbers as SVG: loss, gradient norm and loss scale over the steps, and exponents by layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from narrowcast.formats.kinds import Format
from narrowcast.report import text
from narrowcast.report.picture import Axis, svg
from narrowcast.training.doctor.buckets import COLUMNS, INFINITE_COLUMN
from narrowcast.training.doctor.values import EventKind, Reading
from narrowcast.training.doctor.whatif import element, overflow_limit, underflow_limit

__all__ = ["LEVELS", "HeatRow", "Mark", "heat_map", "timeline"]

_LETTER = 7.4  # pixels of a label's letter
_ROW = 18  # pixels of a layer
_STRIP = 20  # pixels of a format's strip
_BANDS = 130  # pixels of a curve
#: Shares from which on a cell has the next shade; the last is the darkest.
LEVELS = (0.0, 1e-4, 1e-3, 1e-2, 5e-2, 0.2)
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
#: How far exponents without counts may lie from those with, to be drawn for a format's limits.
_MARGIN = 3


# Over the steps -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step: what kind, in words, and whether it needs nobody's attention."""

    step: int
    kind: EventKind
    words: str
    normal: bool


@dataclass(frozen=True)
class _Curve:
    """One curve: its title, its points, and how its values are placed and written."""

    title: str
    points: list[tuple[int, float]]
    log: bool
    form: Callable[[float], str]
    steps: bool = False  # it stays at a value until the next


def timeline(
    readings: Sequence[Reading], skipped: Sequence[int], marks: Sequence[Mark], *, name: str, width: int = 860
) -> str:
    """Return loss, gradient norm and loss scale over the steps as SVG, one under the other; empty without readings.

    Steps that were left out are ticks under the curves, what needs attention is a line through all of them, and numbers that
    are not finite stand at the upper edge.

    Args:
        readings: In the order of their steps.
        skipped: Step of each update that was left out.
        marks: What happened.
        name: Unique in the page.
        width: Of the picture, in pixels.
    """
    curves = [curve for curve in _curves(readings) if curve.points]
    if not curves:
        return ""
    first, last = readings[0].step, max(readings[-1].step, readings[0].step + 1)
    across = Axis(first, last, 78.0, width - 16.0)
    bottom = 14.0 + _BANDS * len(curves) + (26.0 if skipped else 0.0)
    parts: list[str] = []
    for value in across.marks(9 if width > 600 else 4):
        if value == round(value):
            x = across.place(value)
            parts.append(f'<path class="g" d="M{x:.1f} 30V{bottom:.1f}"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 18:.1f}" class="m">{text.integer(value)}</text>')
    for place, curve in enumerate(curves):
        parts += _curve(curve, across, 14.0 + _BANDS * place)
    if skipped:
        y = bottom - 14
        ticks = "".join(f"M{across.place(step):.1f} {y:.1f}v12" for step in dict.fromkeys(skipped))
        parts.append(f'<text x="{across.start - 8:.1f}" y="{y + 10:.1f}" class="e">left out</text>')
        parts.append(f'<path class="tick-out" d="{ticks}"/>')
    parts += _marks(marks, across, bottom)
    parts.append(f'<text x="{(across.start + across.stop) / 2:.0f}" y="{bottom + 38:.1f}" class="m">step</text>')
    words = ", ".join(f"{curve.title} {_ends(curve)}" for curve in curves)
    spoken = f"{words}; steps {first} to {last}, {len(skipped)} updates left out"
    return svg(width, round(bottom + 48), parts, spoken, name)


def _curves(readings: Sequence[Reading]) -> Iterator[_Curve]:
    def points(of: Callable[[Reading], float | None]) -> list[tuple[int, float]]:
        return [(one.step, value) for one in readings if (value := of(one)) is not None]

    yield _Curve("Loss", points(lambda one: one.loss), False, text.number)
    yield _Curve("Gradient norm (log scale)", points(lambda one: one.grad_norm), True, text.number)
    scales = points(lambda one: one.scale)
    if any(value != 1 for _, value in scales):
        yield _Curve("Loss scale (log scale)", scales, True, _power, steps=True)


def _power(value: float) -> str:
    """Return a power of two as one, any other number as it is."""
    power = math.log2(value) if value > 0 else 0.5
    return f"2{str(round(power)).translate(_RAISED)}" if power == round(power) else text.number(value)


def _ends(curve: _Curve) -> str:
    return f"{curve.form(curve.points[0][1])} to {curve.form(curve.points[-1][1])}"


def _curve(curve: _Curve, across: Axis, top: float) -> Iterator[str]:
    known = [value for _, value in curve.points if math.isfinite(value) and (value > 0 or not curve.log)]
    upper, lower = top + 28.0, top + _BANDS - 14.0
    yield f'<text x="{across.start:.0f}" y="{top + 14:.1f}" class="b">{escape(curve.title)}</text>'
    if known:
        up = _up(curve, min(known), max(known), lower, upper)
        for value in _ticks(curve, up):
            y = up.place(value)
            yield f'<path class="g" d="M{across.start:.1f} {y:.1f}H{across.stop:.1f}"/>'
            yield f'<text x="{across.start - 8:.1f}" y="{y + 4:.1f}" class="e">{curve.form(value)}</text>'
        yield f'<path class="curve" d="{_path(curve, across, up)}"/>'
    broken = [step for step, value in curve.points if not math.isfinite(value)]
    for step in itertools.islice(dict.fromkeys(round(across.place(step)) for step in broken), 200):
        yield f'<path class="broken" d="M{step - 4} {upper - 4:.1f}l8 8m0 -8l-8 8"/>'
    if broken:
        words = f"not finite at step {broken[0]}" + (f" and {len(broken) - 1} more" if broken[1:] else "")
        yield f'<text x="{across.stop:.1f}" y="{top + 14:.1f}" class="e warm">{words}</text>'


def _up(curve: _Curve, low: float, high: float, lower: float, upper: float) -> Axis:
    if curve.log:
        span = max(high / low, 4.0) ** 0.06
        return Axis(
            low / span / (1 if high > low else 2), high * span * (1 if high > low else 2), lower, upper, log=True
        )
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return Axis(low - margin, high + margin, lower, upper)


def _ticks(curve: _Curve, up: Axis) -> list[float]:
    """Return the values that are marked: powers of two for a scale, round numbers for the rest."""
    if not curve.steps:
        marks = up.marks(4)
        return marks or [math.sqrt(up.low * up.high)]
    low, high = math.ceil(math.log2(up.low)), math.floor(math.log2(up.high))
    step = max(1, math.ceil((high - low) / 4))
    return [2.0**power for power in range(low, high + 1, step)]


def _path(curve: _Curve, across: Axis, up: Axis) -> str:
    """Return a curve; of the values that share a pixel the least and the greatest are drawn, so that no peak is lost."""
    path, pen = "", "M"
    before = 0.0
    for x, group in itertools.groupby(curve.points, lambda point: round(across.place(point[0]))):
        values = [value for _, value in group]
        if not all(math.isfinite(value) and (value > 0 or not curve.log) for value in values):
            pen = "M"  # a gap: what is not finite has no place
            continue
        drawn = values if len(values) <= 2 else [values[0], min(values), max(values), values[-1]]
        for value in drawn:
            y = up.place(value)
            path += f"{pen}{x} {before:.1f}L{x} {y:.1f}" if curve.steps and pen == "L" else f"{pen}{x} {y:.1f}"
            pen, before = "L", y
    return path


def _marks(marks: Sequence[Mark], across: Axis, bottom: float) -> Iterator[str]:
    """Yield a line for what needs attention, labelled on the side where there is room."""
    taken: list[tuple[float, float]] = []
    for mark in sorted((mark for mark in marks if not mark.normal), key=lambda mark: mark.step):
        x = across.place(mark.step)
        yield f'<path class="o" d="M{x:.1f} 4V{bottom:.1f}"><title>{escape(f"step {mark.step}: {mark.words}")}</title></path>'
        label = f"{mark.kind} at {mark.step}"
        size = _LETTER * len(label)
        for left, at, align in ((x + 6, x + 6, "s"), (x - 6 - size, x - 6, "e")):
            free = all(left + size < other[0] or left > other[1] for other in taken)
            if free and left > 0 and left + size < across.stop + 10:
                taken.append((left - 6, left + size + 6))
                yield f'<text x="{at:.1f}" y="12" class="{align} warm">{label}</text>'
                break


# Exponents by layer ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeatRow:
    """A row of a heat map: the layer's name, its counts by octave, shape [COLUMNS], and what is said of it."""

    name: str
    columns: np.ndarray
    words: str


def heat_map(
    rows: Sequence[HeatRow], formats: Sequence[str], *, name: str, scale: float = 1.0, width: int = 860
) -> str:
    """Return the share of numbers by exponent, a row for each layer, under the ranges of formats, as SVG.

    Args:
        rows: At least one, in the model's order.
        formats: Element formats whose ranges are drawn, the main one first: its limits go through all rows.
        name: Unique in the page.
        scale: What the numbers are multiplied by before they are cast: the ranges move by it.
        width: Of the picture, in pixels.
    """
    limits = {format: _limits(format, scale) for format in formats}
    low, high = _span(rows, list(limits.values()))
    labels = min(max(len(row.name) for row in rows) * _LETTER, width * 0.3) + 14
    left, right = max(labels, 74.0), width - 44.0
    zeros = left + 26  # the column of zeros stands apart, as do infinities and NaN
    across = Axis(low, high, zeros + 10, right - 8)
    top = 28.0 + _STRIP * len(formats) + 8
    bottom = top + _ROW * len(rows)
    parts = [f'<text x="{left:.0f}" y="14" class="s">{escape("Range of each format; pale: subnormal numbers")}</text>']
    parts += _strips(limits, across, left)
    parts += _grid(across, top, bottom, wide=width > 600)
    parts += _cells(rows, across, (left, zeros), (right, right + 26), top)
    parts += _main(limits[formats[0]], formats[0], across, top, bottom)
    letters = int((left - 14) / _LETTER)
    for place, row in enumerate(rows):
        y = top + _ROW * place
        label = escape(text.tail(row.name, letters))
        parts.append(f'<text x="{left - 8:.1f}" y="{y + 13:.1f}" class="e row">{label}</text>')
        parts.append(f'<path class="over" d="M0 {y:.1f}H{width}v{_ROW}H0z"><title>{escape(row.words)}</title></path>')
    parts.append(f'<text x="{(left + zeros) / 2:.1f}" y="{bottom + 18:.1f}" class="m">0</text>')
    parts.append(f'<text x="{right + 13:.1f}" y="{bottom + 18:.1f}" class="m">∞</text>')
    axis = "magnitude, one column an octave" if width > 600 else "magnitude (octaves)"
    parts.append(f'<text x="{(across.start + across.stop) / 2:.0f}" y="{bottom + 38:.1f}" class="m">{axis}</text>')
    spoken = f"Exponents of {len(rows)} layers: {'; '.join(row.words for row in rows[:8])}"
    return svg(width, round(bottom + 48), parts, spoken, name)


@dataclass(frozen=True)
class _Limits:
    """The ends of a format's range, as binary logarithms: underflow, the smallest normal number, overflow."""

    zero: float
    normal: float
    overflow: float


def _limits(format: str, scale: float) -> _Limits:
    found = element(format)
    shift = math.log2(scale)
    zero = underflow_limit(found)
    normal = found.smallest_normal if isinstance(found, Format) else 2 * zero
    smallest = math.log2(zero) if zero > 0 else -149.0
    return _Limits(smallest - shift, math.log2(normal) - shift, math.log2(overflow_limit(found)) - shift)


def _span(rows: Sequence[HeatRow], limits: Sequence[_Limits]) -> tuple[int, int]:
    """Return the exponents that are drawn: all that were seen, and the limits near them."""
    used = np.flatnonzero(np.sum([row.columns for row in rows], axis=0)[1:INFINITE_COLUMN])
    low, high = (int(used[0]) - 127, int(used[-1]) - 126) if used.size else (-8, 8)
    ends = sorted(end for one in limits for end in (one.zero, one.normal, one.overflow))
    lower, upper = low - _MARGIN, high + _MARGIN
    near = [end for end in ends if low - 14 <= end <= high + 14]
    if near:
        lower, upper = min(lower, math.floor(near[0]) - 1), max(upper, math.ceil(near[-1]) + 1)
    return max(lower, -127), min(upper, 128)


def _strips(limits: dict[str, _Limits], across: Axis, left: float) -> Iterator[str]:
    for place, (format, one) in enumerate(limits.items()):
        y = 28.0 + _STRIP * place
        zero, normal, over = (across.place(end) for end in (one.zero, one.normal, one.overflow))
        yield f'<text x="{left - 8:.1f}" y="{y + 12:.1f}" class="b e">{escape(format)}</text>'
        if over > normal:
            yield f'<path class="range" d="M{normal:.1f} {y + 3:.1f}H{over:.1f}v10H{normal:.1f}z"/>'
        if normal > zero:
            yield f'<path class="range pale" d="M{zero:.1f} {y + 3:.1f}H{normal:.1f}v10H{zero:.1f}z"/>'
        if over <= across.start or zero >= across.stop:
            where = "below" if over <= across.start else "above"
            yield f'<text x="{across.start:.1f}" y="{y + 12:.1f}" class="s">all of it {where}</text>'


def _grid(across: Axis, top: float, bottom: float, *, wide: bool) -> Iterator[str]:
    step = next(step for step in (2, 4, 8, 16, 32, 64) if (across.high - across.low) / step <= (12 if wide else 6))
    for exponent in range(math.ceil(across.low / step) * step, math.floor(across.high) + 1, step):
        x = across.place(exponent)
        yield f'<path class="g" d="M{x:.1f} {top:.1f}V{bottom + 4:.1f}"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 18:.1f}" class="m">{_power(2.0**exponent)}</text>'


def _main(limits: _Limits, format: str, across: Axis, top: float, bottom: float) -> Iterator[str]:
    """Yield the limits of the main format through all rows."""
    for end, words in ((limits.zero, "becomes zero below"), (limits.overflow, "overflows beyond")):
        if across.low < end < across.high:
            x = across.place(end)
            title = escape(f"{format}: {words}")
            yield f'<path class="o" d="M{x:.1f} {top - 6:.1f}V{bottom:.1f}"><title>{title}</title></path>'


def _cells(
    rows: Sequence[HeatRow], across: Axis, zeros: tuple[float, float], broken: tuple[float, float], top: float
) -> Iterator[str]:
    """Yield a path for each shade; neighbours of one shade are one piece."""
    paths: dict[str, str] = {}
    for place, row in enumerate(rows):
        total = float(row.columns.sum())
        if not total:
            continue
        y = top + _ROW * place
        shades: list[int] = np.searchsorted(LEVELS, row.columns / total, side="left").tolist()  # 0: nothing there
        for shade, run in itertools.groupby(
            zip(shades[1:INFINITE_COLUMN], itertools.count(-127)), lambda item: item[0]
        ):
            exponents = [exponent for _, exponent in run]
            if shade:
                ends = across.place(exponents[0]), across.place(exponents[-1] + 1)
                paths[f"h{shade}"] = paths.get(f"h{shade}", "") + _piece(ends, y)
        if shades[0]:
            paths[f"h{shades[0]}"] = paths.get(f"h{shades[0]}", "") + _piece(zeros, y)
        if row.columns[INFINITE_COLUMN:COLUMNS].sum():
            paths["hot"] = paths.get("hot", "") + _piece(broken, y)
    for shade, path in sorted(paths.items()):
        yield f'<path class="cell {shade}" d="{path}"/>'


def _piece(ends: tuple[float, float], y: float) -> str:
    return f"M{ends[0]:.1f} {y + 1:g}H{ends[1]:.1f}v{_ROW - 2}H{ends[0]:.1f}z"
