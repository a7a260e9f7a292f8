"""``narrowcast bundle``: an artifact with all that an edge device needs to run it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from narrowcast.cli.console import Debug, Json, console, print_json
from narrowcast.report.text import quantity

__all__ = ["bundle"]


def bundle(
    folder: Annotated[Path, typer.Argument(help="Artifact folder.")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a folder that runs an artifact with its runtime and NumPy alone, and check that it does.

    It holds the artifact, pinned requirements, a short runner that needs no narrowcast, and a README.
    """
    from narrowcast.serving.bundling import write_bundle

    written = write_bundle(folder, out, force=force)
    if json:
        print_json(
            {
                "bundle": str(written.folder),
                "bytes": written.bytes,
                "requirements": list(written.requirements),
                "checked": list(written.checked),
                "notes": list(written.notes),
            }
        )
        return
    for line in written.checked:
        console().print("[green]ok[/]    ", end="")
        console().print(line, markup=False)
    for line in written.notes:
        console().print(f"note  {line}", markup=False)
    console().print(
        f"{written.folder}: {quantity(written.bytes, 'bytes')}, {', '.join(written.requirements)}", markup=False
    )
