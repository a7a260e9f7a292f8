"""What the commands print with: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from narrowcast.errors import NarrowcastError

__all__ = ["Debug", "Json", "console", "errors_console", "print_error", "print_json", "progress"]

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def console() -> Console:
    """Return the console for results."""
    return Console(highlight=False)


def errors_console() -> Console:
    """Return the console for progress and errors."""
    return Console(stderr=True, highlight=False)


def print_json(value: dict[str, Any] | str) -> None:
    """Print a value as JSON on stdout."""
    typer.echo(value if isinstance(value, str) else json.dumps(value, indent=1))


def print_error(error: NarrowcastError) -> None:
    """Print an error with what is allowed and what to do next."""
    text = Text(error.what)
    if error.allowed:
        text.append("\nAllowed: ", style="bold").append(error.allowed)
    if error.next_step:
        text.append("\nNext: ", style="bold").append(error.next_step)
    errors_console().print(
        Panel(text, title=type(error).__name__, title_align="left", border_style="red", expand=False)
    )


class _Shown:
    """Progress of the search as one moving line, and a line for each thing that was found."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.task = bar.add_task("starting", total=1.0)

    def stage(self, name: str, share: float = 0.0) -> None:
        self.bar.update(self.task, description=name, completed=share)

    def note(self, text: str) -> None:
        self.bar.console.print(f"  {text}", markup=False)


def _ignore(text: str) -> None:
    """Do nothing with a note."""


@contextmanager
def progress(*, quiet: bool) -> Generator[_Shown]:
    """Yield a progress display on stderr; nothing is shown when quiet."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<44}", markup=False),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=errors_console(),
        transient=True,
        disable=quiet,
    )
    with bar:
        shown = _Shown(bar)
        if quiet:
            shown.note = _ignore
        yield shown
