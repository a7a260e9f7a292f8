"""``narrowcast verify``: check an artifact."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from narrowcast.cli.console import Debug, Json, console, print_json
from narrowcast.measure.verify import verify_artifact

__all__ = ["verify"]


def verify(
    folder: Annotated[Path, typer.Argument(help="Artifact folder.")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check an artifact's hashes, load it, and compare its outputs with those stored when it was built.

    Exit code 1: the outputs differ by more than the artifact accepts.
    """
    checks, differences = verify_artifact(folder)
    passed = all(check.passed for check in checks)
    if json:
        print_json({"passed": passed, "checks": [asdict(check) for check in checks], "differences": differences})
    else:
        for check in checks:
            mark = "[green]ok[/]    " if check.passed else "[red]failed[/]"
            console().print(f"{mark} {check.name}: ", end="")
            console().print(check.seen, markup=False)
        for text in differences:
            console().print(f"note   {text}", markup=False)
    if not passed:
        raise typer.Exit(1)
