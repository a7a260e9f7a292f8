"""Pictures of weights in number formats, as SVG: size against SQNR, and histograms with the formats' levels under them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from html import escape

import numpy as np

from narrowcast.formats import BlockFormat, Codebook, Integer, decode, get
from narrowcast.measure.comparison import FormatTotals, InFormat, TensorErrors
from narrowcast.report import text
from narrowcast.report.picture import svg

__all__ = ["colour_of", "histogram", "scatter", "spark"]

Box = tuple[float, float, float, float]  # left, top, right, bottom

_LETTER = 7.4  # pixels of a label's letter
_STEP = 2  # pixels are cut into so many for the levels
_FURTHEST = 1e300  # of an axis
_DENSE = 8  # bits up to which levels are drawn one by one


def colour_of(name: str) -> str:
    """Return the style sheet's variable for a format, by its kind."""
    found = get(name)
    if isinstance(found, BlockFormat):
        return "purple"
    if isinstance(found, Integer):
        return "green"
    if isinstance(found, Codebook):
        return "orange"
    return "blue" if found.bits <= _DENSE else "grey"


# Size against SQNR ----------------------------------------------------------------------------------------------------


def scatter(formats: Sequence[FormatTotals], own: int, *, width: int = 860, height: int = 430) -> str:
    """Return the whole model's size against its SQNR as SVG: one point for each format.

    Args:
        formats: At least one; one without any noise stands at the upper edge, one that lost numbers at the lower.
        own: Bytes of the model as it is stored, marked on the axis.
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.
    """
    left, right, top, bottom = 62.0, width - 26.0, 40.0, height - 56.0
    sizes = [max(item.nbytes, 1) for item in formats]
    low, high = min(*sizes, own) * 0.9, max(*sizes, own) * 1.12
    known = [item.sqnr_db for item in formats if math.isfinite(item.sqnr_db)] or [0.0]
    step = 10 if max(known) - min(known) > 12 else 2
    floor, ceiling = step * math.floor(min(known) / step), step * math.ceil(max(known) / step + 0.2)

    def x_of(size: float) -> float:
        return left + math.log(max(size, 1) / low) / math.log(high / low) * (right - left)

    def y_of(decibels: float) -> float:
        share = (min(max(decibels, floor), ceiling) - floor) / (ceiling - floor)
        return bottom - share * (bottom - top)

    parts = [f'<text x="8" y="20" class="t">{escape("SQNR of all compared weights (dB), more is better")}</text>']
    for value in range(floor, ceiling + 1, step * max(1, (ceiling - floor) // step // 6)):
        parts.append(f'<path class="g" d="M{left:.1f} {y_of(value):.1f}H{right:.1f}"/>')
        parts.append(f'<text x="{left - 8:.1f}" y="{y_of(value) + 4:.1f}" class="t e">{text.integer(value)}</text>')
    for value in _sizes(low, high, 8 if width > 600 else 4):
        parts.append(f'<path class="g" d="M{x_of(value):.1f} {top:.1f}V{bottom:.1f}"/>')
        parts.append(f'<text x="{x_of(value):.1f}" y="{bottom + 20:.1f}" class="t m">{_bytes(value)}</text>')
    parts.append(f'<path class="o" d="M{x_of(own):.1f} {top:.1f}V{bottom:.1f}"/>')
    parts.append(f'<text x="{x_of(own) - 6:.1f}" y="{top + 14:.1f}" class="t e">as it is stored</text>')
    axis = "Size of the whole model, log scale, less is better"
    parts.append(f'<text x="{(left + right) / 2:.1f}" y="{height - 10}" class="t m">{axis}</text>')
    points = [(x_of(size), y_of(item.sqnr_db), item) for size, item in zip(sizes, formats, strict=True)]
    parts += _points(points, (left, top, right, bottom), (x_of(own) - 94, top, x_of(own) + 3, top + 20))
    words = "; ".join(f"{item.name} {_bytes(item.nbytes)}, {text.decibels(item.sqnr_db)} dB" for item in formats)
    return svg(width, height, parts, f"Size against SQNR of {len(formats)} formats: {words}")


def _sizes(low: float, high: float, most: int) -> list[float]:
    """Return round numbers of bytes for a log axis: the finest of several sets that is not too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for digits in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]
        if len(found) <= most:
            break
    return found


def _bytes(size: float) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")):
        if size >= factor or factor == 1:
            return f"{size / factor:.3g} {unit}"
    raise AssertionError("bytes take all sizes")


def _points(points: Sequence[tuple[float, float, FormatTotals]], frame: Box, note: Box) -> Iterator[str]:
    """Yield dots, and names where they hide nothing; a thin line leads from a name that had to go further away."""
    taken: list[Box] = [note, *((x - 8, y - 8, x + 8, y + 8) for x, y, _ in points)]
    ordered = sorted(points, key=lambda point: point[:2])
    for number, (x, y, item) in enumerate(ordered):
        hidden = sum(math.hypot(x - other[0], y - other[1]) < 6 for other in ordered[number + 1 :])
        size = _LETTER * len(item.name)
        best: tuple[float, Box, float] | None = None
        for reach, turn in itertools.product((14, 24, 38, 54, 72), range(16)):
            angle = math.tau * turn / 16
            cx, cy = x + (reach + size / 2 * abs(math.cos(angle))) * math.cos(angle), y - reach * math.sin(angle)
            box = (cx - size / 2, cy - 8, cx + size / 2, cy + 8)
            cost = 40 * sum(_overlap(box, other) for other in taken) + 400 * _beyond(box, frame) + reach + turn % 8 / 10
            if best is None or cost < best[0]:
                best = (cost, box, reach)
        assert best is not None
        _, box, reach = best
        taken.append(box)
        cx, cy = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        if reach > 24:
            yield f'<path class="l" d="M{x:.1f} {y:.1f}L{min(max(x, box[0]), box[2]):.1f} {min(max(y, box[1]), box[3]):.1f}"/>'
        spoken = f"{item.name}: {_bytes(item.nbytes)}, {text.decibels(item.sqnr_db)} dB"
        dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6.5 + 4 * hidden}" class="f-{colour_of(item.name)}">'
        yield f"{dot}<title>{escape(spoken)}</title></circle>"
        yield f'<text x="{cx:.1f}" y="{cy + 5:.1f}" class="b m">{escape(item.name)}</text>'


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _beyond(box: Box, frame: Box) -> float:
    return sum(
        max(0.0, amount) for amount in (frame[0] - box[0], frame[1] - box[1], box[2] - frame[2], box[3] - frame[3])
    )


# Histograms -----------------------------------------------------------------------------------------------------------


def spark(counts: Sequence[int], *, width: int = 88, height: int = 24) -> str:
    """Return a distribution small enough for a row of a table: counts on a log scale, as SVG."""
    pairs = [a + b for a, b in zip(counts[::2], counts[1::2], strict=True)]
    return svg(width, height, [f'<path class="area" d="{_area(pairs, 0, width, 1, height)}"/>'], "")


def _area(counts: Sequence[int], left: float, right: float, top: float, bottom: float) -> str:
    """Return the outline of bars as tall as the logarithm of their count; a count of one is seen."""
    tallest = math.log10(max(max(counts), 1)) + 0.3
    edges = np.linspace(left, right, len(counts) + 1)
    path = f"M{left:.1f} {bottom:.1f}"
    for count, edge in zip(counts, edges[1:], strict=True):
        share = (math.log10(count) + 0.3) / tallest if count else 0.0
        path += f"V{bottom - share * (bottom - top):.1f}H{edge:.1f}"
    return f"{path}V{bottom:.1f}z"


def histogram(tensor: TensorErrors, names: Sequence[str], *, name: str, width: int = 470) -> str:
    """Return a tensor's distribution with the levels of formats under it, as SVG.

    A format's strip has two halves: its levels under the tensor's largest scale, and pale under its typical one. A cast is
    drawn over the numbers that it reaches.

    Args:
        tensor: What was compared.
        names: The formats, from top to bottom.
        name: Unique in the page.
        width: Of the picture, in pixels.
    """
    left, right, top, bottom = max(48.0, 16 + _LETTER * max(map(len, names))), width - 8.0, 12.0, 140.0
    height = bottom + 44 + 26 * len(names)
    low, high = _span(tensor)

    def x_of(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    parts: list[str] = []
    tallest = max(*tensor.counts, 1)
    for power in range(0, math.floor(math.log10(tallest)) + 1, max(1, math.ceil(math.log10(tallest) / 4))):
        y = bottom - (power + 0.3) / (math.log10(tallest) + 0.3) * (bottom - top)
        parts.append(f'<path class="g" d="M{left} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" class="t e">{_count(10**power)}</text>')
    for value in _ticks(low, high):
        parts.append(f'<path class="g" d="M{x_of(value):.1f} {top}V{height - 4:.0f}"/>')
        parts.append(f'<text x="{x_of(value):.1f}" y="{bottom + 18}" class="t m">{text.number(value, 2)}</text>')
    first, last = (
        (left, right) if tensor.low == tensor.high else (x_of(max(tensor.low, low)), x_of(min(tensor.high, high)))
    )
    parts.append(f'<path class="area" d="{_area(tensor.counts, first, last, top, bottom)}"/>')
    for row, format in enumerate(names):
        y = bottom + 34 + 26 * row
        parts.append(f'<text x="{left - 8}" y="{y + 14:.0f}" class="b e">{escape(format)}</text>')
        parts.append(f'<path class="g" d="M{left} {y + 9:.0f}H{right}"/>')
        parts += _strip(format, tensor.formats[format], (low, high), (left, right), y)
    span = f"{text.number(tensor.low)} to {text.number(tensor.high)}"
    words = f"Histogram of {text.label(tensor.name, 200)}, counts on a log scale, values from {span}"
    return svg(width, round(height), parts, f"{words}, with the levels of {', '.join(names)}", name)


def _span(tensor: TensorErrors) -> tuple[float, float]:
    """Return the ends of the axis: the tensor's numbers, and zero where they are all alike, within float64's reach."""
    low, high = max(tensor.low, -_FURTHEST), min(tensor.high, _FURTHEST)
    if high - low > 1 / _FURTHEST:
        margin = 0.02 * (high - low)
        return low - margin, high + margin
    around = max(abs(low), 1 / _FURTHEST) if low else 1.0
    return low - around, high + around


def _ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _count(number: int) -> str:
    for factor, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= factor:
            return f"{number // factor}{unit}"
    return str(number)


def _strip(
    name: str, result: InFormat, span: tuple[float, float], ends: tuple[float, float], y: float
) -> Iterator[str]:
    colour = colour_of(name)
    if result.failure:
        yield f'<text x="{ends[0] + 6}" y="{y + 14:.0f}" class="t">could not hold it</text>'
        return
    if result.largest_scale is None:
        reach = float(get(name).max)  # type: ignore[union-attr] - a cast is to an element format
        left, right = (_place(end, span, ends) for end in (max(span[0], -reach), min(span[1], reach)))
        yield f'<path class="f-{colour} pale" d="M{left:.1f} {y}H{right:.1f}v18H{left:.1f}z"/>'
        return
    levels = _levels(name)
    path = _marks(levels * result.largest_scale, span, ends, y, 9)
    yield f'<path class="f-{colour}" d="{path}"/>'
    if result.typical_scale is not None:
        path = _marks(levels * result.typical_scale, span, ends, y + 10, 8)
        yield f'<path class="f-{colour} pale" d="{path}"/>'


def _levels(name: str) -> np.ndarray:
    """Return the finite values of a format's elements; those of an unsigned integer around its middle."""
    found = get(name)
    element = found.element if isinstance(found, BlockFormat) else found
    values = np.asarray(decode(np.arange(1 << element.bits), element))
    if isinstance(element, Integer) and not element.signed:
        values = values - (1 << (element.bits - 1))
    return np.unique(values[np.isfinite(values)])


def _place(value: float, span: tuple[float, float], ends: tuple[float, float]) -> float:
    return ends[0] + (value - span[0]) / (span[1] - span[0]) * (ends[1] - ends[0])


def _marks(values: np.ndarray, span: tuple[float, float], ends: tuple[float, float], y: float, height: int) -> str:
    """Return a path of lines at values; those that lie closer than two pixels become one filled piece."""
    inside = values[(values >= span[0]) & (values <= span[1])]
    places = np.unique(np.round(_STEP * (ends[0] + (inside - span[0]) / (span[1] - span[0]) * (ends[1] - ends[0]))))
    path = ""
    for run in np.split(places, np.flatnonzero(np.diff(places) > _STEP) + 1):
        if run.size:
            start, stop = run[0] / _STEP - 0.7, run[-1] / _STEP + 0.7
            path += f"M{start:.1f} {y:g}H{stop:.1f}v{height}H{start:.1f}z"
    return path
