"""The ``narrowcast`` command: collects the commands and turns errors into exit codes.

Exit codes: 0 done (and the budget met), 1 a check failed (``verify``), 2 the request cannot be carried out, 3 the budget
cannot be met, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer

from narrowcast._version import __version__
from narrowcast.cli.advise import advise
from narrowcast.cli.bench import bench
from narrowcast.cli.bundle import bundle
from narrowcast.cli.compare import compare
from narrowcast.cli.console import print_error, print_json
from narrowcast.cli.devices import devices
from narrowcast.cli.doctor import doctor
from narrowcast.cli.format import format_
from narrowcast.cli.formats import formats
from narrowcast.cli.garbage import leave_at_once
from narrowcast.cli.load import load
from narrowcast.cli.models import models
from narrowcast.cli.optimize import optimize
from narrowcast.cli.profile import profile
from narrowcast.cli.run import run
from narrowcast.cli.runtimes import runtimes
from narrowcast.cli.serve import serve
from narrowcast.cli.train import train
from narrowcast.cli.verify import verify
from narrowcast.errors import NarrowcastError

__all__ = ["app", "main", "run_command"]

app = typer.Typer(
    name="narrowcast",
    help="One budget in, one proven low-precision model out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    *(optimize, bench, verify, run, runtimes),
    *(train, doctor),
    *(serve, load, models, bundle),
    *(profile, advise, devices),
    *(formats, compare),
):
    app.command()(command)
# A value may be negative: what begins with a dash and is no option is a value.
app.command("format", context_settings={"ignore_unknown_options": True})(format_)

_COUNTING = frozenset(["advise", "profile"])  # they import much, print, and leave nothing behind


def _version(value: bool) -> None:
    if value:
        typer.echo(f"narrowcast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """One budget in, one proven low-precision model out."""


def main() -> None:
    """Run the command line as a process of its own, and exit."""
    arguments = sys.argv[1:]
    try:
        run_command(arguments)
    except SystemExit as end:
        if arguments and arguments[0] in _COUNTING and isinstance(end.code, int):
            leave_at_once(end.code)
        raise


def run_command(arguments: list[str]) -> None:
    """Run the command line, and leave the process alive.

    Args:
        arguments: What follows the program's name.

    Raises:
        SystemExit: With the exit code.
    """
    debug = "--debug" in arguments
    try:
        app(arguments)
    except NarrowcastError as error:
        if debug:
            raise
        if "--json" in arguments:
            print_json({"error": {"type": type(error).__name__, "message": str(error)}})
        else:
            print_error(error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
