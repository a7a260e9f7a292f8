"""Which options somebody typed, and which are there by default."""

from __future__ import annotations

from dataclasses import dataclass

import typer

__all__ = ["Written", "given", "written"]


@dataclass(frozen=True)
class Written:
    """How a parameter is written on the command line: its name, and the name that turns a switch off, if it has one."""

    name: str
    off: str


def written(context: typer.Context) -> dict[str, Written]:
    """Return how the command's parameters are written, by their names in Python."""
    return {
        parameter.name or "": Written(parameter.opts[0], next(iter(parameter.secondary_opts), ""))
        for parameter in context.command.params
    }


def given(context: typer.Context) -> dict[str, Written]:
    """Return the parameters that were given on the command line, in the command's order."""
    found: dict[str, Written] = {}
    for name, how in written(context).items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            found[name] = how
    return found
