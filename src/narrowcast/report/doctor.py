"""What happened to the numbers of a run, as one HTML page that needs nothing else: no network, no script, no font."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from narrowcast._version import __version__
from narrowcast.report import text
from narrowcast.report.doctor_plots import HeatRow, Mark, heat_map, timeline
from narrowcast.report.doctor_run import CAST, PARTS, Happening, Held, LayerView, PartView, Run, harm
from narrowcast.report.doctor_words import (
    bounds,
    cause_title,
    event_words,
    format_title,
    held_words,
    magnitude,
    part_words,
    range_words,
    sample_words,
    scale_words,
    scaled_words,
)
from narrowcast.report.page import Key, template
from narrowcast.report.weights import breakable
from narrowcast.training.doctor.values import Cause, Part

__all__ = ["render_doctor"]

#: Layers that a heat map draws, and events that are told in full.
MOST_ROWS = 120
MOST_EVENTS = 40
#: Share of lost numbers from which on a cell is marked.
_MARKED = 1e-3


@dataclass(frozen=True)
class _Remedy:
    setting: str
    mended: bool
    evidence: str


@dataclass(frozen=True)
class _Cause:
    """A cause as a card: its title, facts, inputs as rows of a table, and what was tried."""

    title: str
    seen: str
    facts: list[tuple[str, str]]
    inputs: list[list[str]]
    remedies: list[_Remedy]


@dataclass(frozen=True)
class _Event:
    step: str
    rank: str
    kind: str
    normal: bool
    sentence: str
    again: str
    cause: _Cause | None


@dataclass(frozen=True)
class _Map:
    """The heat map of a part in two widths."""

    part: str
    title: str
    words: str
    wide: Markup
    narrow: Markup
    more: int


@dataclass(frozen=True)
class _Cell:
    """What a format does to a layer and part; ``level`` is ``bad`` where it loses many numbers, ``warm`` where some."""

    text: str
    level: str
    title: str


@dataclass(frozen=True)
class _Row:
    name: str
    kind: str
    cells: list[_Cell]


@dataclass(frozen=True)
class _Advice:
    layer: str
    part: str
    format: str
    scale: str
    evidence: str


def render_doctor(run: Run) -> str:
    """Return what happened to a run's numbers as a self-contained HTML page.

    Args:
        run: What its folder says.
    """
    summary = run.record.summary
    context: dict[str, Any] = {
        "run": run,
        "setting": run.record.setting,
        "headline": run.headline,
        "healthy": run.healthy,
        "findings": run.findings,
        "keys": _keys(run),
        "events": [_event(one) for one in run.events[:MOST_EVENTS]],
        "more_events": max(len(run.events) - MOST_EVENTS, 0),
        "timeline_wide": _timeline(run, "timeline-wide", 860),
        "timeline_narrow": _timeline(run, "timeline-narrow", 400),
        "maps": list(_maps(run)),
        "parts": [(part, PARTS[part]) for part in PARTS if any(part in layer.parts for layer in run.layers)],
        "formats": run.formats,
        "tables": [(PARTS[part], _table(run, part)) for part in CAST if _seen(run, part)],
        "stagnation": _stagnation(run),
        "scale": None if summary is None else summary.scale,
        "scale_words": "" if summary is None or summary.scale is None else scale_words(summary.scale.scale),
        "advice": [] if summary is None else [_advice(one) for one in summary.formats],
        "version": __version__,
        "created": text.when(datetime.now(UTC).isoformat()),
    }
    return template("doctor.html.j2", text.label, text.tail, text.integer, breakable, format_title).render(context)


def _keys(run: Run) -> list[Key]:
    setting = run.record.setting
    readings = run.readings
    keys = [
        Key("Precision", setting.precision, f"computes in {setting.compute}"),
        Key(
            "Steps seen",
            text.integer(run.steps),
            f"{setting.level} level, sampled each {setting.every} steps",
        ),
        Key("Left out", text.integer(len(run.skipped)), "updates with a gradient that is not finite"),
    ]
    count, numbers = run.counted
    if count < numbers:
        keys.append(
            Key("Numbers counted", text.integer(count), f"shares are of this sample of {text.integer(numbers)}")
        )
    if any(reading.scale != 1 for reading in readings):
        keys.append(Key("Loss scale", scale_words(run.scale), "of the last update"))
    return keys


def _timeline(run: Run, name: str, width: int) -> Markup:
    marks = [Mark(one.first.step, one.first.kind, one.first.sentence, one.first.normal) for one in run.events]
    return Markup(timeline(run.readings, run.skipped, marks, name=name, width=width))


# Events and causes ----------------------------------------------------------------------------------------------------


def _event(one: Happening) -> _Event:
    event = one.first
    cause = None if event.cause is None else _cause(event.cause)
    words = event_words(event) + (f" ({one.again})" if one.again else "")
    return _Event(text.integer(event.step), str(event.rank), event.kind, event.normal, words, one.again, cause)


def _cause(cause: Cause) -> _Cause:
    facts = [
        ("Step", text.integer(cause.step)),
        ("Rank", str(cause.rank)),
        ("Pass", part_words(cause.part)),
        ("Layer", cause.layer or "the model itself"),
        ("Operator", cause.operator + (f", call {cause.call + 1}" if cause.call else "")),
    ]
    if cause.samples:
        facts.append(("Samples of the batch", ", ".join(map(str, cause.samples[:16]))))
    if not cause.reproduced:
        facts.append(("Replay", "did not break again, so nothing could be tried"))
    inputs = [[one.name, one.dtype, " × ".join(map(str, one.shape)) or "1", *range_words(one)] for one in cause.inputs]
    remedies = [_Remedy(one.setting, one.mended, one.evidence) for one in cause.remedies]
    return _Cause(cause_title(cause), cause.seen, facts, inputs, remedies)


def _advice(one: Any) -> _Advice:
    return _Advice(one.layer, part_words(one.part), one.format, scale_words(one.scale), one.evidence)


# Exponents ------------------------------------------------------------------------------------------------------------


def _maps(run: Run) -> Iterator[_Map]:
    """Yield a heat map for each part that was counted; of many layers those that the main format harms most are drawn."""
    main = run.formats[0]
    for part, words in PARTS.items():
        views = [(layer.name, layer.parts[part]) for layer in run.layers if part in layer.parts]
        if not views:
            continue
        shown = sorted(views, key=lambda item: -harm(item[1].held[main].plain))[:MOST_ROWS]
        kept = {name for name, _ in shown}
        rows = [
            HeatRow(name or "(model)", _columns(run, name, part), _row_words(name, view, main))
            for name, view in views
            if name in kept
        ]
        scale = views[0][1].held[main].plain.scale
        moved = (
            f" Ranges are drawn under the loss scale of the last update, {scale_words(scale)}." if scale != 1 else ""
        )
        drawn = [
            Markup(heat_map(rows, run.formats, name=f"heat-{part}-{width}", scale=scale, width=width))
            for width in (860, 400)
        ]
        yield _Map(part, words.capitalize(), moved, drawn[0], drawn[1], len(views) - len(rows))


def _columns(run: Run, layer: str, part: Part) -> Any:
    from narrowcast.training.doctor.buckets import fold

    series = run.record.of(layer, part)
    assert series is not None
    return fold(series.total)


def _row_words(name: str, view: PartView, format: str) -> str:
    return (
        f"{name or 'the model'}: largest {magnitude(view.largest)}; as {format} {held_words(view.held[format].plain)}"
    )


# What if --------------------------------------------------------------------------------------------------------------


def _seen(run: Run, part: Part) -> bool:
    return any(part in layer.parts for layer in run.layers)


def _table(run: Run, part: Part) -> list[_Row]:
    return [_row(layer, layer.parts[part], run.formats) for layer in run.layers if part in layer.parts]


def _row(layer: LayerView, view: PartView, formats: Sequence[str]) -> _Row:
    broken = view.infinite + view.nan
    cells = [_Cell(magnitude(view.largest), "bad" if broken else "", _broken(view))]
    for format in formats:
        held = view.held[format]
        cells += [_cell(held), _scaled(held)]
    return _Row(layer.name or "(model)", layer.kind, cells)


def _broken(view: PartView) -> str:
    if not view.infinite + view.nan:
        return f"{sample_words(view.count, view.numbers)}, the smallest above {magnitude(view.smallest)}"
    return f"{text.integer(view.infinite)} infinities, {text.integer(view.nan)} NaN"


def _cell(held: Held) -> _Cell:
    plain = held.plain
    level = "bad" if plain.overflow.high > 0 else "warm" if harm(plain) > _MARKED else ""
    return _Cell(f"{bounds(plain.overflow)} / {bounds(plain.zero)}", level, held_words(plain))


def _scaled(held: Held) -> _Cell:
    found = held.scaled
    level = "warm" if harm(found) > _MARKED else ""
    return _Cell(bounds(found.zero), level, scaled_words(found, held.plain))


def _stagnation(run: Run) -> list[_Row]:
    """Return the share of updates that plain weights in each format would lose, by layer."""
    return [
        _Row(
            layer.name or "(model)",
            layer.kind,
            [
                _Cell(bounds(layer.stagnant[name]), "bad" if layer.stagnant[name].low > 0.5 else "", "")
                if name in layer.stagnant
                else _Cell(text.MISSING, "", "")
                for name in run.formats
            ],
        )
        for layer in run.layers
        if layer.stagnant
    ]
