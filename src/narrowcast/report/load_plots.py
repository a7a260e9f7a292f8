"""The plots of a load: its course, its percentiles, and the search for the largest rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape

from narrowcast.measure.load.values import Bin, LoadResult, Percentile, Probe, Run, Slo
from narrowcast.report import text
from narrowcast.report.load_words import batching_words
from narrowcast.report.picture import Axis, svg

__all__ = ["course", "percentiles", "search"]

#: Height of each of the pictures of a course, and of the space between them.
_BAND, _GAP = 190.0, 34.0
_WIDE = 600
_LEFT, _RIGHT = 78.0, 18.0
#: Classes of the lines of several runs, in their order.
_LINES = ("first", "second", "third")
#: Shares of requests that are slower, whose percentiles are marked on the axis.
_MARKED = (0.9, 0.5, 0.1, 0.05, 0.01, 1e-3, 1e-4, 1e-5)


def course(run: Run, slo: Slo | None, *, name: str, marks: Sequence[tuple[float, str]] = (), width: int = 860) -> str:
    """Return the course of a run as SVG: latency over rates, warm-up shaded.

    Args:
        run: The run; it has at least one good answer.
        slo: The bound, drawn as a dashed line.
        name: Unique in the page.
        marks: Seconds after the start, and what happens then.
        width: Of the picture, in pixels.
    """
    end = run.warmup + run.seconds
    across = Axis(0.0, end, _LEFT, width - _RIGHT)
    top, middle = 30.0, 30.0 + _BAND
    below = middle + _GAP
    bottom = below + _BAND * 0.8
    parts = list(_shade(run, across, top, bottom))
    parts += _seconds(across, bottom, width)
    parts += _latency_band(run, slo, across, (top, middle))
    parts += _rate_band(run.bins, across, (below, bottom))
    for place, (second, words) in enumerate(marks):
        x = across.place(second)
        parts.append(f'<path class="o" d="M{x:.1f} {top:.1f}V{bottom:.1f}"/>')
        parts.append(f'<text x="{x + 6:.1f}" y="{top + 12 + 15 * place:.1f}" class="s warm">{escape(words)}</text>')
    spoken = f"Latency and rates over {text.quantity(end, 's')}, {text.integer(run.counts.ok)} good answers"
    return svg(width, round(bottom + 44), parts, spoken, name)


def _shade(run: Run, across: Axis, top: float, bottom: float) -> Iterator[str]:
    if run.warmup:
        x = across.place(run.warmup)
        yield f'<path class="warming" d="M{across.start:.1f} {top:.1f}H{x:.1f}V{bottom:.1f}H{across.start:.1f}z"/>'


def _seconds(across: Axis, bottom: float, width: int) -> Iterator[str]:
    for value in across.marks(9 if width > _WIDE else 5):
        x = across.place(value)
        yield f'<path class="g" d="M{x:.1f} {bottom:.1f}v5"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 20:.1f}" class="m">{value:g}</text>'
    yield f'<text x="{(across.start + across.stop) / 2:.0f}" y="{bottom + 38:.1f}" class="m">seconds after the start</text>'


def _latency_band(run: Run, slo: Slo | None, across: Axis, ends: tuple[float, float]) -> Iterator[str]:
    known = [value for one in run.bins for value in (one.median, one.slow) if value]
    low, high = min(known), max(known)
    bound = slo.seconds if slo is not None and low / 30 < slo.seconds < high * 30 else None
    if bound is not None:
        low, high = min(low, bound), max(high, bound)
    up = Axis(low / 1.5, high * 1.5, ends[1], ends[0], log=True)
    yield f'<text x="{across.start:.0f}" y="{ends[0] - 14:.1f}" class="b">Latency (log scale)</text>'
    yield from _levels(up, across, lambda value: text.quantity(value, "s"))
    yield f'<path class="line second" d="{_line(run.bins, across, up, lambda one: one.slow)}"/>'
    yield f'<path class="line first" d="{_line(run.bins, across, up, lambda one: one.median)}"/>'
    if bound is not None and slo is not None:
        y = up.place(bound)
        yield f'<path class="o" d="M{across.start:.1f} {y:.1f}H{across.stop:.1f}"/>'
        yield f'<text x="{across.stop:.1f}" y="{y - 6:.1f}" class="e warm">bound of p{slo.percentile:g}</text>'


def _rate_band(bins: Sequence[Bin], across: Axis, ends: tuple[float, float]) -> Iterator[str]:
    most = max(max(one.offered, one.ok, one.failed) for one in bins)
    up = Axis(0.0, most * 1.1, ends[1], ends[0])
    yield f'<text x="{across.start:.0f}" y="{ends[0] - 14:.1f}" class="b">Requests per second</text>'
    yield from _levels(up, across, lambda value: text.integer(value) if most > 10 else f"{value:g}")
    yield f'<path class="line offered" d="{_steps(bins, across, up, lambda one: one.offered)}"/>'
    yield f'<path class="line first" d="{_steps(bins, across, up, lambda one: one.ok)}"/>'
    if any(one.failed for one in bins):
        yield f'<path class="line failed" d="{_steps(bins, across, up, lambda one: one.failed)}"/>'


def _levels(up: Axis, across: Axis, form: Callable[[float], str], most: int = 6) -> Iterator[str]:
    for value in up.marks(most):
        y = up.place(value)
        yield f'<path class="g" d="M{across.start:.1f} {y:.1f}H{across.stop:.1f}"/>'
        yield f'<text x="{across.start - 8:.1f}" y="{y + 4:.1f}" class="e">{form(value)}</text>'


def _width(bins: Sequence[Bin]) -> float:
    return bins[1].start - bins[0].start


def _line(bins: Sequence[Bin], across: Axis, up: Axis, of: Callable[[Bin], float | None]) -> str:
    """Return a line through the middles of stretches; those without a value are a gap."""
    path, pen, half = "", "M", _width(bins) / 2
    for one in bins:
        value = of(one)
        if not value:
            pen = "M"
            continue
        path += f"{pen}{across.place(one.start + half):.1f} {up.place(value):.1f}"
        pen = "L"
    return path


def _steps(bins: Sequence[Bin], across: Axis, up: Axis, of: Callable[[Bin], float]) -> str:
    path = f"M{across.place(bins[0].start):.1f} {up.place(of(bins[0])):.1f}"
    for one in bins:
        path += f"V{up.place(of(one)):.1f}H{across.place(one.start + _width(bins)):.1f}"
    return path


# Percentiles ----------------------------------------------------------------------------------------------------------


def percentiles(runs: dict[str, Run], slo: Slo | None, *, name: str, width: int = 860, height: int = 360) -> str:
    """Return latency by percentile as SVG: the share that is slower on a log axis, with 95 % bands; empty without any.

    Args:
        runs: By what they are called; at most three.
        slo: The bound, drawn as a cross of dashed lines.
        name: Unique in the page.
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.
    """
    curves = {called: run.curve for called, run in runs.items() if len(run.curve) > 1}
    if not curves:
        return ""
    points = [point for curve in curves.values() for point in curve]
    slowest = max(point.q for point in points)
    fastest = min(point.q for point in points)
    rarest = max(slowest, slo.percentile if slo is not None else 0.0)
    across = Axis(100 / (100 - fastest) / 1.1, 1.25 * 100 / (100 - rarest), _LEFT, width - _RIGHT, log=True)
    low = min(point.estimate.low for point in points if point.estimate)
    high = max(point.estimate.high for point in points if point.estimate)
    bound = slo is not None and low / 30 < slo.seconds < high * 30
    if slo is not None and bound:
        low, high = min(low, slo.seconds), max(high, slo.seconds)
    up = Axis(low / 1.3, high * 1.3, height - 54.0, 34.0, log=True)
    parts = ['<text x="8" y="16" class="b">Latency (log scale)</text>']
    parts += _levels(up, across, lambda value: text.quantity(value, "s"), most=8)
    for share in _MARKED:
        if across.low < 1 / share < across.high:
            x = across.place(1 / share)
            parts.append(f'<path class="g" d="M{x:.1f} {up.stop:.1f}V{up.start:.1f}"/>')
            parts.append(f'<text x="{x:.1f}" y="{up.start + 18:.1f}" class="m">p{100 * (1 - share):g}</text>')
    for line, curve in zip(_LINES, curves.values(), strict=False):
        parts += _curve(curve, line, across, up)
    if slo is not None and bound:
        y = up.place(slo.seconds)
        parts.append(f'<path class="o" d="M{across.start:.1f} {y:.1f}H{across.stop:.1f}"/>')
        x = across.place(100 / (100 - slo.percentile))
        parts.append(f'<path class="o" d="M{x:.1f} {up.stop:.1f}V{up.start:.1f}"/>')
        words = f"p{slo.percentile:g} ≤ {text.quantity(slo.seconds, 's')}"
        parts.append(f'<text x="{across.start + 8:.1f}" y="{y - 6:.1f}" class="s warm">{words}</text>')
    axis = "percentile; each decade is ten times rarer"
    parts.append(f'<text x="{(across.start + across.stop) / 2:.0f}" y="{height - 10}" class="m">{axis}</text>')
    return svg(width, height, parts, f"Latency by percentile up to p{slowest:.5g}", name)


def _curve(curve: Sequence[Percentile], line: str, across: Axis, up: Axis) -> Iterator[str]:
    found = [(across.place(100 / (100 - one.q)), one.estimate) for one in curve if one.estimate is not None]
    upper = "L".join(f"{x:.1f} {up.place(one.high):.1f}" for x, one in found)
    lower = "L".join(f"{x:.1f} {up.place(one.low):.1f}" for x, one in reversed(found))
    yield f'<path class="band {line}" d="M{upper}L{lower}z"/>'
    middle = "L".join(f"{x:.1f} {up.place(one.value):.1f}" for x, one in found)
    yield f'<path class="line {line}" d="M{middle}"/>'


# The search -----------------------------------------------------------------------------------------------------------


def search(result: LoadResult, *, name: str, width: int = 860, height: int = 330) -> str:
    """Return the tries of a search as SVG: the share that missed the bound against the rate; empty without a search.

    Args:
        result: What was found.
        name: Unique in the page.
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.
    """
    if not result.probes or result.slo is None:
        return ""
    rates = [probe.rate for probe in result.probes]
    across = Axis(min(rates) / 1.3, max(rates) * 1.3, _LEFT, width - _RIGHT, log=True)
    allowed = 1 - result.slo.percentile / 100
    least = allowed / 30
    up = Axis(least, 1.3, height - 54.0, 34.0, log=True)
    parts = ['<text x="8" y="16" class="b">Share of requests that missed the bound (log scale)</text>']
    parts += _levels(up, across, lambda value: text.part(value))
    for value in across.marks(8 if width > _WIDE else 4):
        x = across.place(value)
        parts.append(f'<path class="g" d="M{x:.1f} {up.stop:.1f}V{up.start:.1f}"/>')
        parts.append(f'<text x="{x:.1f}" y="{up.start + 18:.1f}" class="m">{text.count(value)}</text>')
    if result.largest is not None:
        left = across.place(result.largest.low)
        right = max(across.place(result.largest.high), left + 1)
        parts.append(f'<path class="found" d="M{left:.1f} {up.stop:.1f}H{right:.1f}V{up.start:.1f}H{left:.1f}z"/>')
    y = up.place(allowed)
    parts.append(f'<path class="o" d="M{across.start:.1f} {y:.1f}H{across.stop:.1f}"/>')
    parts.append(
        f'<text x="{across.start + 8:.1f}" y="{y - 6:.1f}" class="s warm">{text.part(allowed)} may miss it</text>'
    )
    for probe in result.probes:
        parts += _probe(probe, across, up)
    axis = "requests per second (log scale)"
    parts.append(f'<text x="{(across.start + across.stop) / 2:.0f}" y="{height - 10}" class="m">{axis}</text>')
    spoken = (
        f"{len(result.probes)} tries from {text.number(min(rates))} to {text.number(max(rates))} requests per second"
    )
    return svg(width, height, parts, spoken, name)


def _probe(probe: Probe, across: Axis, up: Axis) -> Iterator[str]:
    x, y = across.place(probe.rate), up.place(max(probe.missed.value, up.low))
    low, high = up.place(max(probe.missed.low, up.low)), up.place(max(probe.missed.high, up.low))
    whose = f"{batching_words(probe.kind)}, " if probe.kind else ""
    words = (
        f"{whose}{text.number(probe.rate)} requests/s: {text.part(probe.missed.value)} of "
        f"{text.integer(probe.requests)} missed it, {probe.verdict}"
    )
    yield f'<path class="whisker {probe.verdict}" d="M{x:.1f} {low:.1f}V{high:.1f}"/>'
    yield f'<circle class="try {probe.verdict}" cx="{x:.1f}" cy="{y:.1f}" r="5.5"><title>{escape(words)}</title></circle>'
