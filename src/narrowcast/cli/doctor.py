"""``narrowcast doctor``: what happened to the numbers of a training run, and what would mend it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from narrowcast.cli.console import Debug, Json, console, print_json
from narrowcast.cli.files import check_file, write_file

__all__ = ["doctor"]


def doctor(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a training run.", metavar="RUN_DIR", show_default=False)],
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="Ask what this number format would have done, beside those of the record. May be given several times.",
            metavar="NAME",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the report with all plots to this file.", metavar="FILE")
    ] = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option(help="Write scalars and histograms of exponents for TensorBoard to this folder.", metavar="DIR"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a report that is there.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what happened to the numbers of a training run: the verdict, the first cause, each layer, and what would mend it.

    For example: narrowcast doctor runs/mnist5k --format e5m2 --html numbers.html
    """
    from narrowcast.report.doctor_run import open_run

    if html is not None:
        check_file(html, force)
    run = open_run(run_dir, formats or [])
    if html is not None:
        from narrowcast.report.doctor import render_doctor

        write_file(html, render_doctor(run))
    if tensorboard is not None:
        from narrowcast.report.doctor_board import write_board

        write_board(run, tensorboard)
    if json:
        from narrowcast.report.doctor_json import doctor_record

        written = {"report": html, "tensorboard": tensorboard}
        print_json(doctor_record(run) | {name: path and str(path) for name, path in written.items()})
        return
    from narrowcast.report.doctor_terminal import render_doctor_terminal

    render_doctor_terminal(run, console())
    for name, path in (("report", html), ("tensorboard", tensorboard)):
        if path is not None:
            console().print(f"{name}: {path}", markup=False, soft_wrap=True)
