"""``narrowcast compare``: what number formats cost a model's weights, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from narrowcast.cli.console import Debug, Json, console, print_json, progress
from narrowcast.cli.files import check_file, write_file
from narrowcast.cli.numbers import json_number, plain
from narrowcast.cli.options import Seed

if TYPE_CHECKING:
    from narrowcast.measure.comparison import Comparison, FormatTotals, InFormat, TensorErrors

__all__ = ["compare"]

_DEFAULT = "fp16,bf16,e4m3fn,int8,int4,nf4,mxfp4,nvfp4"
_NAME = 24  # characters of a tensor's name, at least
_WORDS = 50  # characters of what is done to weights
_CELL = 6  # characters of an SQNR, or of why there is none


def compare(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A .safetensors file, a folder of them, or a model: timm:NAME, torchvision:NAME, a path to an .onnx file, "
            "py:MODULE:FUNCTION, bundled:NAME, or an artifact folder.",
            show_default=False,
        ),
    ],
    formats: Annotated[
        str, typer.Option(help="Formats, separated by commas: any of `narrowcast formats`.", metavar="NAMES")
    ] = _DEFAULT,
    out: Annotated[
        Path | None, typer.Option(help="Write the report with all tensors and histograms to this HTML file.")
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(
            help="Format whose damage orders the tensors. Default: the one of the fewest bits.", metavar="NAME"
        ),
    ] = None,
    range: Annotated[str, typer.Option(help="How scales are chosen: minmax, percentile or mse.")] = "minmax",
    vectors: Annotated[
        bool, typer.Option("--all", help="Compare biases and other vectors too, which stay as they are otherwise.")
    ] = False,
    top: Annotated[int, typer.Option(min=0, help="Tensors to show here; the report has all.")] = 10,
    seed: Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a report that is there.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare number formats on a model's weights: error and size of each tensor, the most damaged first.

    Weights are read piece by piece, so a file may be larger than memory. Nothing is run: it is the weights that are judged.
    For example: narrowcast compare model.safetensors --formats int8,nf4,mxfp4 --out weights.html
    """
    from narrowcast.measure.treatments import treatments
    from narrowcast.measure.weights import compare_weights
    from narrowcast.models.stored import open_weights

    chosen = treatments([name for name in formats.split(",") if name.strip()], range)
    if sort is not None:
        sort = treatments([sort], range)[0].name
    if out is not None:
        check_file(out, force)
    with progress(quiet=json) as shown:
        shown.stage("opening")
        weights = open_weights(source, seed=seed)
        found = compare_weights(weights, chosen, range=range, sort=sort, vectors=vectors, tell=shown)
        if out is not None:
            from narrowcast.report.weights import render_weights

            shown.stage("writing the report", 1.0)
            write_file(out, render_weights(found))
    if json:
        print_json(_record(found) | {"report": None if out is None else str(out)})
        return
    _print(found, top)
    if out is not None:
        console().print(f"report: {out}", markup=False, soft_wrap=True)


# The terminal ---------------------------------------------------------------------------------------------------------


def _print(found: Comparison, top: int) -> None:
    from narrowcast.report import text

    screen = console()
    size = text.quantity(found.nbytes, "bytes").replace("\N{NO-BREAK SPACE}", " ")
    screen.print(plain(f"{found.source}: {size}, {len(found.tensors)} tensors compared", screen), style="bold")
    if found.random:
        screen.print("Random weights: nobody trained them.", style="yellow")
    screen.print(_formats_table(found, screen))
    if top:
        shown = min(top, len(found.tensors))
        screen.print(
            plain(f"SQNR in dB of the {shown} of {len(found.tensors)} tensors that {found.sort} damages most", screen),
            style="bold",
        )
        screen.print(_tensors_table(found, top, screen))
    for note in _notes(found):
        screen.print(plain(note, screen), style="bright_black")


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bright_black")


def _formats_table(found: Comparison, screen: Console) -> Table:
    """Return the whole model in each format; the worst tensor and what is done are shown where there is room."""
    from narrowcast.report import text

    columns: list[tuple[str, Callable[[FormatTotals], str]]] = [
        ("format", lambda item: item.name),
        ("bits", lambda item: f"{item.bits_per_element:.3g}"),
        ("size", lambda item: text.quantity(item.nbytes, "bytes")),
        ("smaller", lambda item: text.ratio(item.ratio)),
        ("vs FP32", lambda item: text.ratio(item.ratio_fp32)),
        ("SQNR", lambda item: text.decibels(item.sqnr_db)),
        ("beyond", lambda item: text.part(item.overflowed)),
        ("to zero", lambda item: text.part(item.underflowed)),
    ]
    if all(item.ratio == item.ratio_fp32 for item in found.formats):
        del columns[4]
    rows = [[show(item) for _, show in columns] for item in found.formats]
    headings = [heading for heading, _ in columns]
    table = _table()
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "format" else "right", no_wrap=True)
    room = screen.width - sum(2 + max(map(len, cells)) for cells in zip(headings, *rows, strict=True)) - 2
    for heading, least, most, show in (
        ("worst tensor", _NAME - 4, 44, lambda item: item.worst),
        ("what is done", _WORDS, _WORDS, lambda item: item.words),
    ):
        if room >= least + 2:
            width = min(room - 2, most, max(len(show(item)) for item in found.formats))
            table.add_column(heading, no_wrap=True)
            rows = [[*row, text.tail(show(item), width)] for row, item in zip(rows, found.formats, strict=True)]
            room -= width + 2
    for first, *rest in rows:
        table.add_row(plain(Text(first, "bold"), screen), *(plain(cell, screen) for cell in rest))
    return table


def _tensors_table(found: Comparison, top: int, screen: Console) -> Table:
    from narrowcast.report import text

    table = _table()
    room = screen.width - sum(max(len(item.name), _CELL) + 2 for item in found.formats) - 2
    shapes = room >= _NAME + 22
    table.add_column("tensor", no_wrap=True)
    if shapes:
        table.add_column("shape", no_wrap=True)
    for item in found.formats:
        table.add_column(item.name, justify="right", no_wrap=True, style="bold" if item.name == found.sort else "")
    for tensor in found.tensors[:top]:
        cells = [text.tail(tensor.name, max(_NAME, room - 20 * shapes - 1))]
        cells += ["×".join(map(str, tensor.shape)) or "1"] * shapes
        cells += [_sqnr(tensor.formats[item.name]) for item in found.formats]
        table.add_row(*(plain(cell, screen) for cell in cells))
    return table


def _sqnr(result: InFormat) -> str:
    from narrowcast.report import text

    return "failed" if result.error is None else text.decibels(result.error.sqnr_db)


def _notes(found: Comparison) -> list[str]:
    from narrowcast.report import text

    notes: list[str] = []
    if found.left_out:
        reasons = [item.reason for item in found.left_out]
        counted = ", ".join(f"{reasons.count(reason)} ({reason})" for reason in dict.fromkeys(reasons))
        size = text.quantity(sum(item.nbytes for item in found.left_out), "bytes").replace("\N{NO-BREAK SPACE}", " ")
        notes.append(f"left as they are, {size}: {counted}")
    for tensor in [tensor for tensor in found.tensors if tensor.not_finite][:5]:
        are = "1 number is" if tensor.not_finite == 1 else f"{tensor.not_finite:,} numbers are"
        notes.append(f"{tensor.name}: {are} NaN or infinite; the others were judged")
    for tensor in found.tensors:
        failed = [(name, result.failure) for name, result in tensor.formats.items() if result.failure]
        notes += [f"{tensor.name} cannot be {name}: {why}" for name, why in failed[:2]]
    return notes


# JSON -----------------------------------------------------------------------------------------------------------------


def _record(found: Comparison) -> dict[str, Any]:
    return {
        "source": found.source,
        "random_weights": found.random,
        "range": found.range,
        "sort": found.sort,
        "bytes": found.nbytes,
        "elements": found.elements,
        "formats": [_plain(asdict(item)) for item in found.formats],
        "tensors": [_tensor(item) for item in found.tensors],
        "left_out": [_plain(asdict(item)) for item in found.left_out],
    }


def _tensor(tensor: TensorErrors) -> dict[str, Any]:
    record = {key: value for key, value in vars(tensor).items() if key not in ("counts", "formats")}
    return _plain(record) | {"formats": {name: _result(item) for name, item in tensor.formats.items()}}


def _result(result: InFormat) -> dict[str, Any]:
    record = asdict(result)
    error = record.pop("error") or {}
    return _plain({key: value for key, value in record.items() if key not in ("signal", "noise")} | error)


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """Return values that JSON has: shapes as lists, infinity as a word; bytes under the name that other commands use."""
    made = {key: json_number(value) if isinstance(value, float) else value for key, value in record.items()}
    return {("bytes" if key == "nbytes" else key): value for key, value in made.items()}
