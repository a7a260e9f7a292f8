"""``narrowcast runtimes``: which runtimes there are."""

from __future__ import annotations

from rich.table import Table

from narrowcast.cli.console import Debug, Json, console, print_json
from narrowcast.errors import RuntimeMissingError
from narrowcast.runtimes import get_runtime, runtime_names

__all__ = ["runtimes"]


def runtimes(json: Json = False, debug: Debug = False) -> None:
    """List the runtimes, their versions, and how to install those that are missing."""
    found: list[dict[str, str | None]] = []
    for name in runtime_names():
        runtime = get_runtime(name)
        try:
            version = runtime.version()
        except RuntimeMissingError:
            version = None
        install = f"pip install 'narrowcast[{runtime.extra}]'" if runtime.extra else "pip install narrowcast"
        found.append({"name": name, "version": version, "install": install})
    if json:
        print_json({"runtimes": found})
        return
    table = Table("runtime", "version", "install with")
    for item in found:
        table.add_row(item["name"], item["version"] or "not installed", "" if item["version"] else item["install"])
    console().print(table)
