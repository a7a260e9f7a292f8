"""What happened to the numbers of a run, on a terminal: the verdict first, then causes, layers, events and advice."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from narrowcast.report import text
from narrowcast.report.doctor_run import CAST, PARTS, LayerView, PartView, Run, worst
from narrowcast.report.doctor_words import (
    bounds,
    cause_title,
    event_words,
    held_words,
    magnitude,
    part_words,
    sample_words,
    scale_words,
    scaled_words,
)
from narrowcast.report.screen import HEAD, QUIET, Say, new_table, sayer
from narrowcast.training.doctor.values import Cause, Part

__all__ = ["render_doctor_terminal"]

_NARROW = 100  # columns of a terminal below which classes and the size of updates are left out
_MOST_EVENTS = 12
_MOST_LAYERS = 60
_MOST_REMEDIES = 6


def render_doctor_terminal(run: Run, console: Console) -> None:
    """Print what happened to a run's numbers; symbols go where the terminal has no Unicode.

    Args:
        run: What its folder says.
        console: Where to print.
    """
    say = sayer(console)
    mark, style = {True: ("✓", "green"), False: ("✗", "red"), None: ("–", "yellow")}[run.healthy]
    console.print(say(f"{mark} {run.headline}", f"bold {style}"))
    summary = run.record.summary
    for sentence in run.findings:
        console.print(Padding(say(sentence), (0, 0, 0, 2)))
    console.print(say(_about(run), QUIET))
    for note in run.notes:
        console.print(say(f"Note: {note}", "yellow"))
    for one in run.events:
        if one.first.cause is not None:
            console.print()
            for line in _cause(one.first.cause, one.again, say):
                console.print(line)
    if run.layers:
        console.print(_layers(run, say, console.width))
        console.print(_formats(run, say))
    if run.events:
        console.print(_events(run, say))
    if summary is not None and summary.scale is not None:
        console.print(say(f"Recommended loss scale: {scale_words(summary.scale.scale)}", HEAD))
        console.print(Padding(say(summary.scale.evidence, QUIET), (0, 0, 0, 2)))
    if summary is not None and summary.formats:
        console.print(_advice(run, say))


def _about(run: Run) -> str:
    setting = run.record.setting
    steps = text.integer(run.steps)
    skipped = f"{text.integer(len(run.skipped))} update{'' if len(run.skipped) == 1 else 's'} left out"
    scale = f", loss scale {scale_words(run.scale)}" if any(one.scale != 1 for one in run.readings) else ""
    count, numbers = run.counted
    sample = f"; shares are of {sample_words(count, numbers)}" if count < numbers else ""
    level = f"{setting.level} level, sampled each {setting.every} steps"
    return f"{setting.precision}, {steps} steps, {skipped}{scale}; {level}{sample}"


def _cause(cause: Cause, again: str, say: Say) -> Iterator[Text | Padding]:
    rank = f", rank {cause.rank}" if cause.rank else ""
    title = say(f"Step {text.integer(cause.step)}{rank}: {cause_title(cause)}", HEAD)
    yield title + say(f" ({again})", QUIET) if again else title
    yield Padding(say(cause.seen), (0, 0, 0, 2))
    if not cause.reproduced:
        yield Padding(say("The replay did not break again, so nothing could be tried.", "yellow"), (0, 0, 0, 2))
    for remedy in sorted(cause.remedies, key=lambda one: not one.mended)[:_MOST_REMEDIES]:
        mark, style = ("✓", "green") if remedy.mended else ("✗", QUIET)
        line = say(f"{mark} {remedy.setting}", style)
        if remedy.evidence:
            line.append_text(say(f": {remedy.evidence}", QUIET))
        yield Padding(line, (0, 0, 0, 4))


# Layers ---------------------------------------------------------------------------------------------------------------


def _layers(run: Run, say: Say, width: int) -> Table:
    """Return the layers with their largest numbers, and what the main format does to them.

    They are activations and their gradients; without those, weights and theirs.
    """
    main = run.formats[0]
    seen = {part for layer in run.layers for part in layer.parts}
    pairs = ((Part.FORWARD, Part.WEIGHT), (Part.BACKWARD, Part.GRADIENT))
    shown = [first if first in seen else second for first, second in pairs if seen & {first, second}]
    moved = width >= _NARROW and any(layer.ratio is not None for layer in run.layers)
    stagnant = run.stored == main and any(main in layer.stagnant for layer in run.layers)
    table = new_table()
    table.add_column(say(f"\nlayer, as {main}"), overflow="fold", min_width=12)
    if width >= _NARROW:
        table.add_column("\nclass", no_wrap=True, style=QUIET)
    for part in shown:
        for heading in (f"{part_words(part)}\nlargest", "\nbeyond", "\nto zero"):
            table.add_column(heading, justify="right", no_wrap=True)
    if moved:
        table.add_column("update/\nweight", justify="right", no_wrap=True)
    if stagnant:
        table.add_column("updates\nlost", justify="right", no_wrap=True)
    for layer in run.layers[:_MOST_LAYERS]:
        cells = [say(text.tail(layer.name or "(model)", 40), HEAD)]
        cells += [say(text.label(layer.kind, 20))] if width >= _NARROW else []
        for part in shown:
            cells += _part(layer.parts.get(part), main, say)
        cells += [say("" if layer.ratio is None else text.number(layer.ratio, 2))] if moved else []
        cells += [_lost(layer, main, say)] if stagnant else []
        table.add_row(*cells)
    if len(run.layers) > _MOST_LAYERS:
        table.add_row(say(f"and {len(run.layers) - _MOST_LAYERS} more", QUIET))
    return table


def _part(view: PartView | None, format: str, say: Say) -> list[Text]:
    if view is None:
        return [say(""), say(""), say("")]
    found = view.held[format].plain
    broken = ", inf" if view.infinite else ", nan" if view.nan else ""
    largest = say(magnitude(view.largest) + broken, "red" if broken else "")
    return [
        largest,
        say(bounds(found.overflow), "red" if found.overflow.high > 0 else QUIET),
        say(bounds(found.zero), "yellow" if found.zero.high > 1e-3 else QUIET),
    ]


def _lost(layer: LayerView, format: str, say: Say) -> Text:
    found = layer.stagnant.get(format)
    return say("") if found is None else say(bounds(found), "red" if found.low > 0.5 else QUIET)


def _formats(run: Run, say: Say) -> Table:
    """Return what each format would do to the layer that it harms most: cast as it is, and with a scale of its own."""
    table = new_table()
    table.add_column("what if", no_wrap=True)
    table.add_column("of", no_wrap=True)
    table.add_column("worst layer", overflow="fold", min_width=12)
    table.add_column("cast as they are")
    table.add_column("with a scale of its own")
    for format in run.formats:
        for part in CAST:
            found = worst(run, part, format)
            if found is None:
                continue
            name, held = found
            words = held_words(held.plain)
            where = "every layer" if words == "all are held" else text.tail(name or "(model)", 28)
            bad = held.plain.overflow.high > 0
            table.add_row(
                say(format, HEAD),
                say(PARTS[part]),
                say(where),
                say(words, "red" if bad else ""),
                say(scaled_words(held.scaled, held.plain), QUIET),
            )
    return table


# Events and advice ----------------------------------------------------------------------------------------------------


def _events(run: Run, say: Say) -> Table:
    table = new_table()
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("event", no_wrap=True)
    table.add_column("")
    for one in run.events[:_MOST_EVENTS]:
        event = one.first
        style = QUIET if event.normal else "red"
        kind = f"{event.kind}, normal" if event.normal else str(event.kind)
        words = event_words(event) + (f" ({one.again})" if one.again else "")
        table.add_row(say(text.integer(event.step)), say(str(event.rank)), say(kind, style), say(words))
    if len(run.events) > _MOST_EVENTS:
        table.add_row(say(""), say(""), say(f"and {len(run.events) - _MOST_EVENTS} more", QUIET))
    return table


def _advice(run: Run, say: Say) -> Table:
    table = new_table()
    table.add_column("recommended for", overflow="fold", min_width=12)
    for heading in ("pass", "format"):
        table.add_column(heading, no_wrap=True)
    table.add_column("scale", justify="right", no_wrap=True)
    table.add_column("evidence")
    summary = run.record.summary
    advised = () if summary is None else summary.formats
    for one in advised[:_MOST_LAYERS]:
        cells = (text.tail(one.layer or "(model)", 40), part_words(one.part), one.format, scale_words(one.scale))
        table.add_row(*map(say, cells), say(one.evidence, QUIET))
    if len(advised) > _MOST_LAYERS:
        table.add_row(say(f"and {len(advised) - _MOST_LAYERS} more", QUIET))
    return table
