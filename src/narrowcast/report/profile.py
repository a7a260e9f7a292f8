"""What a model costs, as one HTML page that needs nothing else: no network, no script, no font."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from narrowcast._version import __version__
from narrowcast.accounting.kinds import Kind
from narrowcast.accounting.policies import POLICIES
from narrowcast.report import text
from narrowcast.report.bars import Segment
from narrowcast.report.page import Key, template
from narrowcast.report.profile_costs import (
    BATCHES,
    CacheRow,
    Costs,
    Group,
    Row,
    cache_rows,
    compared,
    groups,
    part_name,
    rows,
    title,
)
from narrowcast.report.profile_plots import COLOURS, Dot, Roof, Roofs, phase_colours, roofline, timeline
from narrowcast.report.profile_rows import (
    MOST_OPERATORS,
    Bar,
    Branch,
    Operator,
    Share,
    bars,
    branch,
    by_weight,
    operators,
    seconds,
    shares,
)
from narrowcast.report.weights import breakable

__all__ = ["render_profile"]

#: Modules that get bars.
MOST_BARS = 30

_BOUND_COLOURS = {"compute": "blue", "memory": "orange", "overhead": "purple"}
_MOST_ROOFS = 4
_PART_COLOURS = {
    "data": "yellow",
    "weights": "blue",
    "master": "sky",
    "gradients": "orange",
    "optimizer_state": "purple",
    "activations": "green",
    "temporary": "vermillion",
    "kv_cache": "yellow",
    "communication": "soft",
    "workspace": "grey",
}


@dataclass(frozen=True)
class _Legend:
    name: str
    colour: str
    share: str


@dataclass(frozen=True)
class _Memory:
    """What memory holds at its peak, and how it comes and goes."""

    words: str
    segments: list[Segment]
    values: dict[str, str]
    wide: Markup
    narrow: Markup
    phases: dict[str, str]


@dataclass(frozen=True)
class _Model:
    """One model on the page; ``mark`` keeps its identifiers apart from another's."""

    mark: str
    title: str
    name: str
    keys: list[Key]
    rows: list[Row]
    roofline_wide: Markup
    roofline_narrow: Markup
    legend: list[_Legend]
    bounds: list[Segment]
    estimate: str
    memory: _Memory | None
    measures: list[str]
    bars: list[Bar]
    more_bars: int
    columns: list[str]
    tree: Branch
    headings: list[tuple[str, str]]
    operators: list[Operator]
    more_operators: int
    cache: list[list[str]]
    cache_format: str
    fits: bool
    kinds: list[Share]
    tied: dict[str, str]
    uncounted: dict[str, int]


def render_profile(costs: Sequence[Costs]) -> str:
    """Return what one model costs, or two side by side, as a self-contained HTML page.

    Args:
        costs: One model, or two to be compared.
    """
    models = [_model(item, f"m{place}") for place, item in enumerate(costs)]
    context: dict[str, Any] = {
        "models": models,
        "headline": _headline(costs),
        "batches": BATCHES,
        "differences": compared(*costs) if len(costs) == 2 else [],
        "version": __version__,
        "created": text.when(datetime.now(UTC).isoformat()),
    }
    return template("profile.html.j2", text.label, text.tail, text.integer, breakable).render(context)


def _headline(costs: Sequence[Costs]) -> str:
    """Return what the reader came for, in one sentence."""
    if len(costs) == 2:
        first, second = costs
        words = [
            f"{text.ratio(b / a)} the {name}"
            for name, a, b in (
                ("parameters", first.profile.parameters.total, second.profile.parameters.total),
                ("MACs", first.profile.macs, second.profile.macs),
                ("time", seconds(first.tree), seconds(second.tree)),
            )
            if a and b
        ]
        against = f"{text.label(second.profile.model, 40)} against {text.label(first.profile.model, 40)}"
        return f"{against}: {', '.join(words)}" if words else against
    (only,) = costs
    found = only.profile
    words = f"{text.count(found.parameters.total)} parameters, {text.count(found.macs)} multiply-accumulates"
    if only.estimate is None or only.device is None:
        return words
    return f"{words}: about {text.quantity(only.estimate.seconds, 's')} on {only.device.title}"


def _model(costs: Costs, mark: str) -> _Model:
    found = costs.profile
    alike = groups(costs)
    heavy = by_weight(costs)
    drawn = _rooflines(costs, alike, mark)
    timed = costs.estimate is not None
    cached = cache_rows(costs)
    return _Model(
        mark=mark,
        title=title(costs),
        name=found.model,
        keys=_keys(costs),
        rows=rows(costs),
        roofline_wide=drawn[0],
        roofline_narrow=drawn[1],
        legend=_legend(costs, alike),
        bounds=_bounds(costs),
        estimate=_band(costs),
        memory=_memory(costs, mark),
        measures=[*(["Time"] if timed else []), "MACs", "Bytes moved"],
        bars=bars(heavy[:MOST_BARS], costs),
        more_bars=max(len(heavy) - MOST_BARS, 0),
        columns=["Parameters", "MACs", "Moved", *(["Time"] if timed else [])],
        tree=branch(costs.tree, costs, level=0),
        headings=[
            ("macs", "MACs"),
            ("bytes", "Moved"),
            ("intensity", "FLOP/B"),
            *([("time", "Time")] if timed else []),
        ],
        operators=operators(alike, timed),
        more_operators=max(len(alike) - MOST_OPERATORS, 0),
        cache=_cache(cached),
        cache_format="" if costs.cache is None else costs.cache.format.name,
        fits=any(row.fit is not None for row in cached),
        kinds=shares(found.parameters.by_kind, found.parameters.total),
        tied=found.parameters.tied,
        uncounted=found.uncounted,
    )


def _keys(costs: Costs) -> list[Key]:
    found = costs.profile
    parameters = found.parameters
    idle = parameters.active != parameters.total
    keys = [
        Key(
            "Parameters",
            text.count(parameters.total),
            f"{text.count(parameters.active)} met by one token" if idle else text.integer(parameters.total),
        ),
        Key("MACs", text.count(found.macs), f"{text.count(found.flops)} FLOPs, biases and the rest apart"),
    ]
    if costs.memory is not None:
        held = f"{'training' if costs.memory.mode == 'train' else 'inference'} in {costs.policy.name}"
        keys.append(Key("Peak memory", text.quantity(costs.memory.peak, "bytes"), held))
    if costs.estimate is not None:
        keys.append(Key("Time", text.quantity(costs.estimate.seconds, "s"), _band(costs)))
    return keys


def _band(costs: Costs) -> str:
    """Return the estimate's error band and its floor."""
    found = costs.estimate
    if found is None:
        return ""
    low, high, floor = (text.quantity(value, "s") for value in (found.low, found.high, found.floor))
    return f"between {low} and {high}; never below {floor}"


# Roofline -------------------------------------------------------------------------------------------------------------


def _rooflines(costs: Costs, alike: Sequence[Group], mark: str) -> tuple[Markup, Markup]:
    """Return the roofline in two widths; empty without a device, or where the device's limits are not known."""
    roofs = _roofs(costs)
    if roofs is None:
        return Markup(), Markup()
    whole = costs.tree.seconds or 1.0
    dots = [
        Dot(group.kind, _words(group, whole), group.intensity, group.flops / group.seconds, group.seconds / whole)
        for group in alike
        if group.seconds
    ]
    wide = roofline(dots, roofs, name=f"{mark}-roofline-wide")
    narrow = roofline(dots, roofs, name=f"{mark}-roofline-narrow", width=400, height=400)
    return Markup(wide), Markup(narrow)


def _roofs(costs: Costs) -> Roofs | None:
    device = costs.device
    if device is None or costs.estimate is None or device.memory.bandwidth is None:
        return None
    main = device.peak(costs.policy.compute)
    formats = dict.fromkeys(item.compute for item in POLICIES.values())
    others = [peak for name in formats if (peak := device.peak(name)) is not None and peak != main]
    peaks = [main] if main is not None else []
    for peak in sorted(others, key=lambda peak: -peak.tflops):
        if all(peak.tflops != known.tflops for known in peaks):
            peaks.append(peak)
    if not peaks:
        return None
    shown = [Roof(text.format_name(peak.dtype), peak.tflops * 1e12, main=peak == main) for peak in peaks[:_MOST_ROOFS]]
    return Roofs(device.title, device.memory.bandwidth * 1e9, shown)


def _words(group: Group, whole: float) -> str:
    calls = f"{group.count} × " if group.count > 1 else ""
    took = f"{text.quantity(group.seconds, 's')}, {text.portion((group.seconds or 0.0) / whole)} of the time"
    return f"{calls}{group.name} {group.shapes}: {took}, bound by {group.bound}"


def _legend(costs: Costs, alike: Sequence[Group]) -> list[_Legend]:
    """Return the sorts of operators that take time, the most first."""
    by_kind: dict[Kind, float] = defaultdict(float)
    for group in alike:
        by_kind[group.kind] += group.seconds or 0.0
    whole = math.fsum(by_kind.values())
    ordered = sorted(by_kind, key=lambda kind: -by_kind[kind])
    return [_Legend(kind, COLOURS[kind], text.portion(by_kind[kind] / whole)) for kind in ordered if by_kind[kind]]


def _bounds(costs: Costs) -> list[Segment]:
    if costs.estimate is None:
        return []
    shares = {name: share for name, share in costs.estimate.shares.items() if share > 0 and name in _BOUND_COLOURS}
    return [Segment(name, text.share(share), 100 * share, _BOUND_COLOURS[name]) for name, share in shares.items()]


# Memory ---------------------------------------------------------------------------------------------------------------


def _memory(costs: Costs, mark: str) -> _Memory | None:
    found = costs.memory
    if found is None:
        return None
    held = {name: size for name, size in found.parts.items() if size}
    segments = [
        Segment(part_name(name), text.portion(size / found.peak), 100 * size / found.peak, _PART_COLOURS[name])
        for name, size in held.items()
    ]
    steps = found.timeline or ((found.peak, "forward"),)
    limit = None
    if costs.device is not None and costs.device.memory.bytes is not None:
        limit = (costs.device.memory.bytes, f"memory of {costs.device.title}")
    alive, whole = (text.quantity(size, "bytes") for size in (max(size for size, _ in steps), found.peak))
    peak = f"{alive} at {found.when}" if alive == whole else f"{alive}; with workspaces {whole} at {found.when}"
    wide = timeline(steps, peak=peak, name=f"{mark}-memory-wide", limit=limit)
    narrow = timeline(steps, peak=peak, name=f"{mark}-memory-narrow", limit=limit, width=400, height=300)
    spread = f" on each of {found.devices} devices ({found.sharding})" if found.devices > 1 else ""
    return _Memory(
        f"The most is alive at {found.when}: {text.quantity(found.peak, 'bytes')}{spread}.",
        segments,
        {part_name(name): text.quantity(size, "bytes") for name, size in held.items()},
        Markup(wide),
        Markup(narrow),
        phase_colours([phase for _, phase in steps]),
    )


def _cache(cached: Sequence[CacheRow]) -> list[list[str]]:
    return [
        [
            text.integer(row.tokens),
            *(text.quantity(size, "bytes") for size in row.bytes),
            *([] if row.fit is None else [text.integer(row.fit)]),
        ]
        for row in cached
    ]
