"""``narrowcast formats``: the table of number formats, and a picture of where their values lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from narrowcast.cli.console import Debug, Json, console, print_json
from narrowcast.cli.numbers import brief, plain, power_of_two
from narrowcast.errors import FormatError, OutputError
from narrowcast.formats.facts import Facts, facts
from narrowcast.formats.table import BLOCKS, ELEMENTS, element, get

__all__ = ["formats"]

_PICTURED = ("e5m2", "e4m3fn", "e3m2", "e2m3", "e2m1", "nf4", "int4", "int8")
_GROUPS = {"float": "floats", "integer": "integers", "codebook": "tables", "block": "blocks"}
_HEADINGS = ("format", "bits", "layout", "largest", "min normal", "smallest", "digits", "special")
_NONE = "–"
_NARROW = 95  # columns of a screen on which everything fits into one line each


class Rendering(StrEnum):
    """How the table is written."""

    TEXT = "text"
    MARKDOWN = "markdown"
    JSON = "json"


def formats(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Formats to show. Default: all; in a picture, those of 4 to 8 bits that are met most.",
            show_default=False,
        ),
    ] = None,
    rendering: Annotated[Rendering, typer.Option("--as", help="How to print the table.")] = Rendering.TEXT,
    svg: Annotated[
        Path | None, typer.Option(help="Draw where the formats' values lie on a number line, to this SVG file.")
    ] = None,
    axis: Annotated[
        str | None,
        typer.Option(
            help="Of the picture: linear, log (symmetric), or scaled (each format's largest number at 1). Default: linear "
            "where it shows the values apart, else log."
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the number formats: range, precision, smallest values, decimal digits, bits per element.

    For example: narrowcast formats e2m1 nf4 int4 --svg line.svg
    """
    chosen = [facts(get(name)) for name in names or (*ELEMENTS, *BLOCKS)]
    if svg is not None:
        _draw(svg, names or _PICTURED, axis)
    elif axis is not None:
        raise FormatError(f"axis = {axis!r} without a picture", next_step="add --svg FILE")
    if json or rendering is Rendering.JSON:
        drawn = {} if svg is None else {"svg": str(svg)}
        print_json(drawn | {"formats": [asdict(known) for known in chosen]})
    elif svg is not None:
        console().print(f"written to {svg}", markup=False, soft_wrap=True)
    elif rendering is Rendering.MARKDOWN:
        typer.echo(_markdown(chosen))
    else:
        _print(chosen)


def _draw(file: Path, names: Sequence[str], axis: str | None) -> None:
    from narrowcast.report.number_line import number_line

    picture = number_line([element(name) for name in names], axis=axis)
    try:
        file.write_text(picture, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"picture {file} cannot be written: {error.strerror}", next_step="name another") from error


def _print(chosen: Sequence[Facts]) -> None:
    screen = console()
    apart = int(screen.width > _NARROW)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, apart, 0, 0), pad_edge=False, header_style="bright_black")
    for heading in _HEADINGS:
        right = heading in ("bits", "largest", "min normal", "smallest", "digits")
        whole = heading != "layout"  # which wraps where the screen is narrow, so that no number does
        table.add_column(heading, justify="right" if right else "left", no_wrap=whole)
    for kind, title in _GROUPS.items():
        group = [known for known in chosen if known.kind == kind]
        if group and len(chosen) > len(group):
            table.add_row(plain(title, screen), style="bright_black")
        for known in group:
            cells = [plain(cell, screen) for cell in _cells(known, raised=False)]
            cells[0].stylize("bold")
            table.add_row(*cells)
        table.add_section()
    screen.print(table)
    kinds = {known.kind for known in chosen}
    notes = {
        "float": "floats: layout in bits of sign-exponent-significand; digits are decimal",
        "block": "blocks: numbers include the block's scale, bits an element's share of it",
    }
    for kind, note in notes.items():
        if kind in kinds:
            screen.print(plain(f" {note}", screen), style="bright_black")


def _cells(known: Facts, *, raised: bool) -> tuple[str, ...]:
    small = _power if raised else _digits
    same = known.smallest_normal == known.smallest_positive
    return (
        known.name,
        f"{known.bits:g}",
        known.layout.replace("two's complement", "signed"),
        _digits(known.largest),
        _NONE if known.smallest_normal is None or known.kind == "block" else small(known.smallest_normal),
        "same" if same and known.kind != "block" else small(known.smallest_positive),
        _NONE if known.decimal_digits is None else f"{known.decimal_digits:.1f}",
        " ".join(word for word, has in (("inf", known.infinity), ("NaN", known.nan)) if has) or _NONE,
    )


def _digits(value: float) -> str:
    exact = brief(value, 9)
    return exact if len(exact) <= 9 else f"{value:.4g}"


def _power(value: float) -> str:
    power = power_of_two(value)
    return _digits(value) if not power or value >= 1 else f"{power} = {value:.3g}"


def _markdown(chosen: Sequence[Facts]) -> str:
    lines = [f"| {' | '.join((*_HEADINGS, 'source'))} |", "|---|---:|---|---:|---:|---:|---:|---|---|"]
    lines += [f"| {' | '.join((*_cells(known, raised=True), known.source or _NONE))} |" for known in chosen]
    return "\n".join(lines)
