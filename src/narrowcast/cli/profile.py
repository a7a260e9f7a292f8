"""``narrowcast profile``: what a model costs, before anything runs."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from narrowcast.accounting.profile import Part, Profile
from narrowcast.cli.console import Debug, Json, console, errors_console, print_json

__all__ = ["profile"]


class Mode(StrEnum):
    """What is counted."""

    INFER = "infer"
    TRAIN = "train"


def profile(
    model: Annotated[
        str, typer.Argument(help="timm:NAME, torchvision:NAME, py:MODULE:FUNCTION, bundled:NAME or hf:DIR.")
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="Shape of an input: [NAME=]1x3x224x224[:DTYPE]. May be given several times."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a language model (128 unless given).")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples, where no shape is given.")] = 1,
    mode: Annotated[Mode, typer.Option(help="One inference, or forward and backward.")] = Mode.INFER,
    depth: Annotated[int, typer.Option(min=0, help="Levels of modules to show.")] = 2,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Count parameters, MACs, bytes and peak memory of a model, without weights and without running it."""
    from narrowcast.accounting.profile import profile as count
    from narrowcast.accounting.sources import source

    asked = source(model, inputs=inputs or [], tokens=tokens, batch=batch)
    with errors_console().status("tracing", spinner="dots"):
        found = count(asked, train=mode is Mode.TRAIN)
    if json:
        print_json(found.model_dump_json(indent=1))
        return
    console().print(_summary(found))
    console().print(_tree(found, depth))
    if found.uncounted:
        missed = ", ".join(f"{name} ({count})" for name, count in found.uncounted.items())
        console().print(Text(f"Not counted, for want of a rule: {missed}", style="yellow"))


def _summary(found: Profile) -> Table:
    table = Table(
        title=f"{found.model} · {' '.join('x'.join(map(str, shape)) for shape in found.inputs)} · {found.mode}"
    )
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("exactly", justify="right", style="dim")
    parameters = found.parameters
    rows = [
        ("parameters", parameters.total),
        ("  of them trainable", parameters.trainable),
        *([("  met by one token", parameters.active)] if parameters.active != parameters.total else []),
        ("MACs", found.macs),
        ("FLOPs (2 x MACs)", found.flops),
        ("bias additions", found.bias_adds),
        ("other operations", found.other_flops),
    ]
    for name, value in rows:
        table.add_row(name, _short(value), f"{value:,}")
    for name, value in (
        ("weights and buffers", found.static_bytes),
        ("bytes that operators move", found.bytes_moved),
        ("peak memory, without workspaces", found.peak_bytes),
    ):
        table.add_row(name, _bytes(value), f"{value:,} B")
    if parameters.tied:
        table.add_row("tied tensors, counted once", str(len(parameters.tied)), "")
    return table


def _tree(found: Profile, depth: int) -> Tree:
    whole = found.parts[0]
    root = Tree(_line(whole, found))
    branches = {"": root}
    for part in found.parts[1:]:
        level = part.path.count(".") + 1
        if level > depth or not (part.macs or part.parameters):
            continue
        parent = branches.get(part.path.rpartition(".")[0])
        if parent is not None:
            branches[part.path] = parent.add(_line(part, found))
    return root


def _line(part: Part, found: Profile) -> Text:
    name = part.path.rpartition(".")[2] or found.model
    share = part.macs / found.macs if found.macs else 0.0
    text = Text(name, style="bold")
    text.append(f" {part.kind}", style="cyan")
    text.append(f"  {_short(part.macs)} MACs ({share:.0%})", style="")
    text.append(f"  {_short(part.parameters)} parameters  {part.intensity:.3g} FLOP/B", style="dim")
    return text


def _short(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:g}"


def _bytes(value: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:g} B"
