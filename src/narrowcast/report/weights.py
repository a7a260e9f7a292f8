"""What number formats cost a model's weights, as one HTML page that needs nothing else: no network, no script, no font."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup, escape

from narrowcast._version import __version__
from narrowcast.measure.comparison import Comparison, FormatTotals, InFormat, LeftOut, TensorErrors
from narrowcast.report import text
from narrowcast.report.page import template
from narrowcast.report.weight_plots import colour_of, histogram, scatter, spark

__all__ = ["render_weights"]

#: Tensors that get a histogram with the formats' levels.
MOST_PANELS = 12

_MOST_LISTED = 400  # names of tensors that stay as they are
_FULL_BAR = 80.0  # decibels of a bar's full length: FP16's error is about there


@dataclass(frozen=True)
class _FormatRow:
    name: str
    colour: str
    words: str
    bits: str
    size: str
    ratio: str
    ratio_fp32: str
    sqnr: str
    overflowed: str
    underflowed: str
    worst: str
    failed: int


@dataclass(frozen=True)
class _Bar:
    name: str
    sqnr: str
    width: float
    colour: str
    title: str


@dataclass(frozen=True)
class _TensorRow:
    name: str
    shape: str
    dtype: str
    spark: Markup
    bars: list[_Bar]
    not_finite: int


@dataclass(frozen=True)
class _Detail:
    name: str
    cells: list[str]
    failure: str


@dataclass(frozen=True)
class _Panel:
    name: str
    shape: str
    dtype: str
    count: str
    size: str
    range: str
    not_finite: int
    svg: Markup
    details: list[_Detail]


@dataclass(frozen=True)
class _Group:
    reason: str
    count: int
    size: str
    tensors: Sequence[LeftOut]
    more: int


def render_weights(found: Comparison) -> str:
    """Return the comparison as a self-contained HTML page.

    Args:
        found: Everything that the page shows.
    """
    return template("weights.html.j2", text.label, text.tail, text.integer, breakable).render(_context(found))


def breakable(name: str) -> Markup:
    """Return a name that may go on in the next line after a dot, a slash or an underscore."""
    clean = str(escape(name))
    for mark in "./_":
        clean = clean.replace(mark, f"{mark}<wbr>")
    return Markup(clean)


def _context(found: Comparison) -> dict[str, Any]:
    names = [item.name for item in found.formats]
    return {
        "found": found,
        "version": __version__,
        "created": text.when(datetime.now(UTC).isoformat()),
        "headline": _headline(found),
        "size": text.quantity(found.nbytes, "bytes"),
        "elements": _millions(found.elements),
        "scatter_wide": Markup(scatter(found.formats, found.nbytes)),
        "scatter_narrow": Markup(scatter(found.formats, found.nbytes, width=400, height=380)),
        "formats": [_format_row(item) for item in found.formats],
        "same": all(item.ratio == item.ratio_fp32 for item in found.formats),
        "names": names,
        "rows": [_tensor_row(tensor, names) for tensor in found.tensors],
        "panels": [_panel(tensor, found, number) for number, tensor in enumerate(found.tensors[:MOST_PANELS])],
        "groups": _groups(found.left_out),
        "kept": text.quantity(sum(item.nbytes for item in found.left_out), "bytes"),
        "failed": any(item.failed for item in found.formats),
        "dash": text.MISSING,
    }


def _headline(found: Comparison) -> str:
    """Return what the reader came for: the smallest format, and the one that a fair reader would look at next."""
    smallest = min(found.formats, key=lambda item: item.nbytes)
    nearest = max(found.formats, key=lambda item: item.sqnr_db)
    words = f"{smallest.name} makes the model {text.ratio(smallest.ratio)} smaller at {_with_unit(smallest.sqnr_db)}"
    if nearest.name == smallest.name:
        return words
    return f"{words}; {nearest.name} stays nearest, at {_with_unit(nearest.sqnr_db)}"


def _with_unit(decibels: float) -> str:
    return f"{text.decibels(decibels)} dB" if math.isfinite(decibels) else text.decibels(decibels)


def _millions(count: int) -> str:
    for factor, word in ((1e9, "billion"), (1e6, "million")):
        if count >= factor:
            return f"{count / factor:.3g} {word}"
    return text.integer(count)


def _format_row(item: FormatTotals) -> _FormatRow:
    return _FormatRow(
        item.name,
        colour_of(item.name),
        item.words,
        f"{item.bits_per_element:.3g}",
        text.quantity(item.nbytes, "bytes"),
        text.ratio(item.ratio),
        text.ratio(item.ratio_fp32),
        text.decibels(item.sqnr_db),
        text.part(item.overflowed),
        text.part(item.underflowed),
        item.worst,
        item.failed,
    )


def _shape(tensor: TensorErrors | LeftOut) -> str:
    return " × ".join(map(str, tensor.shape)) or "1"


def _tensor_row(tensor: TensorErrors, names: Sequence[str]) -> _TensorRow:
    bars = [_bar(name, tensor.formats[name]) for name in names]
    picture = Markup(spark(tensor.counts))
    return _TensorRow(tensor.name, _shape(tensor), tensor.dtype, picture, bars, tensor.not_finite)


def _bar(name: str, result: InFormat) -> _Bar:
    if result.error is None:
        return _Bar(name, "failed", 0.0, colour_of(name), result.failure)
    sqnr = result.error.sqnr_db
    width = 100 * min(max(sqnr, 0.0), _FULL_BAR) / _FULL_BAR
    title = f"{name}: {_with_unit(sqnr)}, largest error {text.number(result.error.max_abs)}"
    return _Bar(name, text.decibels(sqnr), width, colour_of(name), title)


def _panel(tensor: TensorErrors, found: Comparison, number: int) -> _Panel:
    names = [item.name for item in found.formats]
    return _Panel(
        tensor.name,
        _shape(tensor),
        tensor.dtype,
        text.integer(tensor.count),
        text.quantity(tensor.nbytes, "bytes"),
        f"{text.number(tensor.low)} to {text.number(tensor.high)}",
        tensor.not_finite,
        Markup(histogram(tensor, names, name=f"tensor-{number}")),
        [_detail(name, tensor.formats[name]) for name in names],
    )


def _detail(name: str, result: InFormat) -> _Detail:
    error = result.error
    if error is None:
        return _Detail(name, [], result.failure)
    entropy = text.MISSING if error.code_entropy is None else f"{error.code_entropy:.2f} of {error.bits}"
    cells = [
        text.decibels(error.sqnr_db),
        text.number(error.relative) if math.isfinite(error.relative) else text.MISSING,
        text.number(error.max_abs),
        text.part(error.overflowed),
        text.part(error.underflowed),
        text.part(error.subnormal),
        entropy,
        text.quantity(result.nbytes, "bytes"),
        f"{result.bits_per_element:.3g}",
    ]
    return _Detail(name, cells, "")


def _groups(left_out: Sequence[LeftOut]) -> list[_Group]:
    """Return the tensors that stay as they are by the reason, those that take the most bytes first."""
    found: dict[str, list[LeftOut]] = {}
    for item in left_out:
        found.setdefault(item.reason, []).append(item)
    groups = [
        _Group(reason, len(items), text.quantity(sum(i.nbytes for i in items), "bytes"), items[:_MOST_LISTED],
               max(len(items) - _MOST_LISTED, 0))
        for reason, items in found.items()
    ]  # fmt: skip
    return sorted(groups, key=lambda group: -sum(item.nbytes for item in found[group.reason]))
