"""The report's plots: accuracy against latency, and what quantisation does to the worst tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from narrowcast.artifacts.manifest import Candidate, Evidence, Histogram
from narrowcast.recipes.budget import Limit
from narrowcast.report import text
from narrowcast.report.svg import COLOURS, canvas, inline_svg

__all__ = ["histogram", "pareto", "scatter"]

Point = tuple[int, Candidate]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class _Scale:
    """What seconds and the metric are multiplied by on the axes, and the unit of time."""

    time: float
    metric: float
    unit: str

    def place(self, item: Candidate) -> tuple[float, float]:
        return item.latency * self.time, item.accuracy * self.metric


# Where a label may stand beside its point: horizontal and vertical shift in text heights, horizontal alignment.
_PLACES = (
    *((0.8, 0.0, "left"), (-0.8, 0.0, "right"), (0.0, 1.2, "center"), (0.0, -1.2, "center")),
    *((0.7, 0.9, "left"), (0.7, -0.9, "left"), (-0.7, 0.9, "right"), (-0.7, -0.9, "right")),
)


def pareto(points: Sequence[Point], higher_is_better: bool) -> list[Point]:
    """Return the candidates that no other one beats in both latency and accuracy, the fastest first."""
    sign = 1.0 if higher_is_better else -1.0
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p[1].latency, -sign * p[1].accuracy)):
        if not front or sign * point[1].accuracy > sign * front[-1][1].accuracy:
            front.append(point)
    return front


def scatter(evidence: Evidence, *, width: int = 860, height: int = 430, name: str = "scatter") -> str:
    """Return accuracy against latency of all candidates as SVG; empty if none has both.

    Candidates carry the numbers that the table beneath gives them. Circles keep all limits, crosses miss one, a ring
    marks the chosen one, the line is the Pareto front, dashes are limits.
    """
    points = [
        (number, item)
        for number, item in enumerate(evidence.candidates, start=1)
        if text.finite(item.accuracy) and text.finite(item.latency) and not item.failure
    ]
    if not points:
        return ""
    percent = text.is_percent(evidence.metric)
    slowest = max(item.latency for _, item in points)
    time, unit_of_time = (1.0, "s") if slowest >= 1 else (1e3, "ms") if slowest >= 1e-3 else (1e6, "µs")
    scale = _Scale(time, 100.0 if percent else 1.0, unit_of_time)
    with canvas(width, height) as figure:
        axes = figure.add_axes((56 / width, 46 / height, 1 - 72 / width, 1 - 84 / height))
        axes.grid(True)
        axes.set_axisbelow(True)
        limits = _candidate_limits(evidence)
        _limits(axes, limits, scale)
        _frame(axes, points, limits, scale)
        front = pareto(points, evidence.metric.higher_is_better)
        _front(axes, front, scale)
        _points(axes, points, evidence.chosen, scale)
        numbered = {number for number, _ in front}
        _names(
            axes, points, numbered if width > 600 else set(), evidence.chosen, scale, _lines(axes, front, limits, scale)
        )
        unit = f" ({evidence.metric.unit})" if evidence.metric.unit else ""
        direction = "more" if evidence.metric.higher_is_better else "less"
        title = f"{text.label(evidence.metric.name, 24)}{unit} on the search part, {direction} is better"
        figure.text(8 / width, 1 - 10 / height, title, va="center", color=COLOURS["muted"])
        axes.set_xlabel(f"Median latency ({scale.unit}), less is better", labelpad=8)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_locator(MaxNLocator(8 if width > 600 else 4))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter())
        return inline_svg(figure, name, _describe(evidence, points, front))


def _candidate_limits(evidence: Evidence) -> list[Limit]:
    """Return limits on the search part (those that candidates were held to), else those of the verdict."""
    judged = [item for item in evidence.candidates if item.standings]
    chosen = [item for item in judged if item.name == evidence.chosen]
    standings = (chosen or judged)[0].standings if judged else evidence.verdict.standings
    return [s.limit for s in standings if s.limit.measure in ("accuracy", "latency") and text.finite(s.limit.bound)]


def _limits(axes: Axes, limits: list[Limit], scale: _Scale) -> None:
    for limit in limits:
        style: dict[str, Any] = {"color": COLOURS["warm"], "linewidth": 1.4, "linestyle": (0, (5, 3)), "zorder": 1.5}
        if limit.measure == "accuracy":
            axes.axhline(limit.bound * scale.metric, **style)
            words = "must be above" if limit.at_least else "must be below"
            axes.annotate(words, (1, limit.bound * scale.metric), xycoords=("axes fraction", "data"), xytext=(-4, 4),
                          textcoords="offset points", ha="right", color=COLOURS["warm"], fontsize=10)  # fmt: skip
        else:
            axes.axvline(limit.bound * scale.time, **style)
            axes.annotate("limit", (limit.bound * scale.time, 1), xycoords=("data", "axes fraction"), xytext=(-4, -10),
                          textcoords="offset points", ha="right", color=COLOURS["warm"], fontsize=10)  # fmt: skip


def _frame(axes: Axes, points: Sequence[Point], limits: list[Limit], scale: _Scale) -> None:
    xs = [item.latency * scale.time for _, item in points] + [
        li.bound * scale.time for li in limits if li.measure == "latency"
    ]
    ys = [item.accuracy * scale.metric for _, item in points] + [
        li.bound * scale.metric for li in limits if li.measure == "accuracy"
    ]
    for values, setter in ((xs, axes.set_xlim), (ys, axes.set_ylim)):
        spread = (max(values) - min(values)) or abs(values[0]) * 0.1 or 1.0
        setter(min(values) - 0.10 * spread, max(values) + 0.14 * spread)


def _front(axes: Axes, front: Sequence[Point], scale: _Scale) -> None:
    xs = [item.latency * scale.time for _, item in front]
    ys = [item.accuracy * scale.metric for _, item in front]
    axes.step(xs, ys, where="post", color=COLOURS["accent"], linewidth=1.6, alpha=0.55, zorder=2)


def _points(axes: Axes, points: Sequence[Point], chosen: str, scale: _Scale) -> None:
    for _, item in points:
        x, y = [item.latency * scale.time], [item.accuracy * scale.metric]
        if item.name == chosen:
            axes.plot(x, y, "o", markersize=22, color=COLOURS["good-soft"], markeredgecolor=COLOURS["good"],
                      markeredgewidth=2.0, zorder=2.5)  # fmt: skip
        if item.feasible:
            axes.plot(x, y, "o", markersize=9, color=COLOURS["accent"], markeredgecolor=COLOURS["surface"], zorder=3)
        else:
            axes.plot(x, y, "X", markersize=9, color=COLOURS["muted"], markeredgecolor=COLOURS["surface"], zorder=3)


def _names(
    axes: Axes, points: Sequence[Point], named: set[int], chosen: str, scale: _Scale, lines: Sequence[Box]
) -> None:
    """Write each point's number beside it, and the names of some, where they collide with least."""
    height = 11.0
    taken = [*lines, *(_box(*_pixel(axes, item, scale), 14, 14, "center") for _, item in points)]
    for number, item in sorted(points, key=lambda p: (p[1].name != chosen, p[0] not in named, p[0])):
        heavy = item.name == chosen
        words = f"{number}  {text.label(item.name, 26)}" if number in named else str(number)
        x, y = _pixel(axes, item, scale)
        gap = 1.7 if heavy else 1.0
        best: tuple[float, float, float, str] | None = None
        for dx, dy, align in _PLACES:
            box = _box(x + dx * height * gap, y + dy * height * gap, 6.4 * len(words), height, align)
            cost = sum(_overlap(box, other) for other in taken) + _outside(axes, box)
            if best is None or cost < best[0]:
                best = (cost, dx, dy, align)
        assert best is not None
        _, dx, dy, align = best
        taken.append(_box(x + dx * height * gap, y + dy * height * gap, 6.4 * len(words), height, align))
        axes.annotate(words, scale.place(item), xytext=(dx * height * gap, dy * height * gap),
                      textcoords="offset points", ha=align, va="center", fontsize=height, zorder=4,
                      fontweight="bold" if heavy else "normal")  # fmt: skip


def _lines(axes: Axes, front: Sequence[Point], limits: Sequence[Limit], scale: _Scale) -> list[Box]:
    """Return boxes around the lines of the plot, in pixels, that labels had better not cross."""
    half, frame = 2.0, axes.bbox
    boxes: list[Box] = []
    corners = [_pixel(axes, item, scale) for _, item in front]
    for (x, y), (next_x, next_y) in itertools.pairwise(corners):
        boxes.append((x, y - half, next_x, y + half))
        boxes.append((next_x - half, min(y, next_y), next_x + half, max(y, next_y)))
    for limit in limits:
        x, y = axes.transData.transform((limit.bound * scale.time, limit.bound * scale.metric))
        if limit.measure == "latency":
            boxes.append((float(x) - half, frame.y0, float(x) + half, frame.y1))
        else:
            boxes.append((frame.x0, float(y) - half, frame.x1, float(y) + half))
    return boxes


def _pixel(axes: Axes, item: Candidate, scale: _Scale) -> tuple[float, float]:
    x, y = axes.transData.transform(scale.place(item))
    return float(x), float(y)


def _box(x: float, y: float, width: float, height: float, align: str) -> Box:
    left = x if align == "left" else x - width if align == "right" else x - width / 2
    return left, y - height / 2, left + width, y + height / 2


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(axes: Axes, box: Box) -> float:
    frame = axes.bbox
    sides = (frame.x0 - box[0], frame.y0 - box[1], box[2] - frame.x1, box[3] - frame.y1)
    return 50.0 * sum(max(0.0, side) for side in sides)


def _describe(evidence: Evidence, points: Sequence[Point], front: Sequence[Point]) -> str:
    form = text.accuracy(evidence.metric)
    best = ", ".join(
        f"{text.label(item.name, 80)} ({text.quantity(item.latency, 's')}, {form(item.accuracy, 0)})"
        for _, item in front
    )
    return (
        f"Scatter plot of {evidence.metric.name} against median latency for {len(points)} candidates; "
        f"chosen: {evidence.chosen}. On the Pareto front: {best}."
    )


def histogram(shape: Histogram, *, name: str, width: int = 320, height: int = 170) -> str:
    """Return one tensor's distribution before (area) and after (line) as SVG; empty if its counts cannot be drawn."""
    edges = np.asarray(shape.edges, np.float64)
    before, after = (np.asarray(counts, np.float64) for counts in (shape.before, shape.after))
    if len(edges) < 2 or not np.isfinite(edges).all() or not len(before) == len(after) == len(edges) - 1:
        return ""
    with canvas(width, height) as figure:
        axes = figure.add_axes((36 / width, 24 / height, 1 - 48 / width, 1 - 34 / height))
        _stairs(axes, edges, before, after)
        return inline_svg(
            figure,
            name,
            f"Histogram of {text.label(shape.tensor, 200)} before and after quantisation, counts on a log scale, values from "
            f"{text.number(float(edges[0]))} to {text.number(float(edges[-1]))}",
        )


def _stairs(axes: Axes, edges: np.ndarray, before: np.ndarray, after: np.ndarray) -> None:
    floor = 0.6  # below a count of one, so that bins of one sample are seen on the log scale
    axes.set_yscale("log")
    axes.stairs(np.maximum(before, floor), edges, baseline=floor, fill=True, color=COLOURS["soft"], linewidth=0)
    axes.stairs(np.maximum(after, floor), edges, baseline=floor, color=COLOURS["accent"], linewidth=1.3)
    top = max(float(before.max(initial=1)), float(after.max(initial=1)), 1.0)
    axes.set_ylim(floor, top * 1.6)
    axes.set_xlim(float(edges[0]), float(edges[-1]))
    powers = range(0, math.floor(math.log10(top)) + 1, max(1, math.ceil(math.log10(top) / 3)))
    axes.set_yticks([10.0**power for power in powers])
    count: Callable[[float, int], str] = lambda value, _: f"{value:,.0f}" if value < 1e4 else f"{value / 1e3:,.0f}k"  # noqa: E731
    axes.yaxis.set_major_formatter(FuncFormatter(count))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(labelsize=11, length=3)
    axes.spines["left"].set_visible(False)
    axes.grid(True, axis="y")
    axes.set_axisbelow(True)
