"""The report on a terminal: verdict, before and after, candidates, and the operators that lose the most accuracy."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, Group
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from narrowcast.artifacts.manifest import Evidence, Measurement, MetricRecord
from narrowcast.report import text
from narrowcast.report.bars import blame_bars
from narrowcast.report.candidates import candidate_rows
from narrowcast.report.screen import HEAD, QUIET, Say, sayer
from narrowcast.report.summary import (
    Cell,
    SummaryRow,
    key_numbers,
    limit_rows,
    measurement_rows,
    summary_rows,
    verdict_badge,
)

__all__ = ["measurement_table", "render_terminal"]

#: Terminals narrower than this lose columns that the page has as well.
WIDE = 100
MOST_BLAME = 8

_GOOD, _BAD = "green", "red"


def render_terminal(evidence: Evidence, console: Console) -> None:
    """Print the report to a console; columns go where it is narrow, symbols where it has no Unicode.

    Args:
        evidence: Everything that is shown.
        console: Where to print.
    """
    say = sayer(console)
    wide = console.width >= WIDE
    brackets = ", 95% intervals in brackets" if wide else ""
    console.print(_verdict(evidence, say))
    rows = summary_rows(evidence)
    for title, table in (
        (f"Before and after (accuracy on the report part{brackets})", _rows_table(rows, say, wide) if rows else None),
        ("Candidates (accuracy on the search part)", _candidates(evidence, say, wide)),
        ("Which operators lose accuracy (simulation, guides the search only)", _blame(evidence, say, wide)),
    ):
        if table is not None:
            console.print(Padding(say(title, HEAD), (1, 0, 0, 1)))
            console.print(table)


def _verdict(evidence: Evidence, say: Say) -> Panel:
    met = evidence.verdict.met
    keys = Table.grid(padding=(0, 4), expand=False)
    shown = key_numbers(evidence)
    keys.add_row(*(say(f"{key.value} {key.word}", HEAD) for key in shown))
    keys.add_row(*(say(key.detail, QUIET) for key in shown))
    limits = Table.grid(padding=(0, 2))
    for row in limit_rows(evidence):
        style = _GOOD if row.met else _BAD
        limits.add_row(say("✓" if row.met else "✗", style), say(row.text), say(row.value, HEAD), say(row.margin, style))
    parts: list[Text | Table] = [say(evidence.verdict.headline, HEAD)]
    if evidence.model.random_weights:
        parts += [Text(), say("Random weights: accuracy says nothing about the task.", "yellow")]
    parts += [Text(), keys]
    if limits.rows:
        parts += [Text(), limits]
    if evidence.verdict.advice:
        parts += [Text(), say("What would help", HEAD), *(say(f"· {line}") for line in evidence.verdict.advice)]
    title = say(f"{'✓' if met else '✗'} {verdict_badge(evidence)}", f"bold {_GOOD if met else _BAD}")
    return Panel(Group(*parts), title=title, title_align="left", border_style=_GOOD if met else _BAD, padding=(1, 2))


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, header_style=QUIET, pad_edge=False, padding=(0, 1))


def _both(cell: Cell, say: Say, wide: bool, style: str = "") -> Text:
    """Return a value and, where there is room, its interval."""
    found = say(f"{cell.value} {cell.word}".rstrip(), style)
    if wide and cell.interval:
        found.append_text(say(f" ({text.unitless(cell.interval)})", QUIET))
    return found


def measurement_table(measurements: Sequence[Measurement], metric: MetricRecord | None = None) -> Table:
    """Return measurements of an original and an artifact as a table, with intervals and ties.

    Args:
        measurements: What was measured.
        metric: What accuracy is; where nobody says, it is shown as a plain number in its unit.
    """
    return _rows_table(measurement_rows(measurements, metric), Text, True)


def _rows_table(rows: Sequence[SummaryRow], say: Say, wide: bool) -> Table:
    table = _table()
    for name in ("Measure", "Original", "Artifact", "The artifact is"):
        table.add_column(name)
    for row in rows:
        table.add_row(
            say(text.label(row.label, 28)),
            _both(row.original, say, False),
            _both(row.artifact, say, wide, HEAD),
            _both(row.ratio, say, wide, "" if row.ratio.better is None else _GOOD if row.ratio.better else _BAD),
        )
    return table


def _candidates(evidence: Evidence, say: Say, wide: bool) -> Group | None:
    rows = candidate_rows(evidence)
    if not rows:
        return None
    table = _table()
    table.add_column("", width=1)
    table.add_column("Candidate", overflow="fold", max_width=32)
    for name in ("Accuracy", "Speed", "Size", *(("Memory", "FP32") if wide else ())):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("Budget")
    for row in rows:
        style = HEAD if row.chosen else QUIET if row.failure else ""
        cells = [row.accuracy.value, row.speedup.value, row.size, *((row.memory, row.kept_float) if wide else ())]
        table.add_row(
            say("→" if row.chosen else "", style),
            say(text.label(row.name, 64), style),
            *(say(cell, style) for cell in cells),
            say(row.verdict, _GOOD if row.feasible else _BAD),
        )
    failures = [
        Padding(say(f"✗ {text.label(r.name, 64)}: {r.failure.strip()}", _BAD), (0, 1)) for r in rows if r.failure
    ]
    return Group(table, *failures)


def _blame(evidence: Evidence, say: Say, wide: bool) -> Table | None:
    bars, _ = blame_bars(evidence.blame, MOST_BLAME)
    if not bars:
        return None
    table = _table()
    table.add_column("Operator group", no_wrap=True)
    if wide:
        table.add_column("Type", no_wrap=True)
    table.add_column("Noise", justify="right", no_wrap=True)
    table.add_column("Log scale", no_wrap=True)
    table.add_column("", no_wrap=True)
    names, length = (32, 18) if wide else (36, 10)
    for bar in bars:
        table.add_row(
            say(text.label(bar.group, names)),
            *((say(text.label(bar.op_type, 17)),) if wide else ()),
            say(bar.noise),
            say(_blocks(bar.width, length), "yellow" if bar.kept_float else "blue"),
            say("kept in FP32" if bar.kept_float else "", "yellow"),
        )
    return table


def _blocks(width: float, length: int) -> str:
    eighths = round(width / 100 * length * 8)
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")
