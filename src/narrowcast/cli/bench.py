"""``narrowcast bench``: an artifact against a model, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from narrowcast.cli.console import Debug, Json, console, print_json, progress
from narrowcast.cli.options import Data, Metric, Seed

__all__ = ["bench"]


def bench(
    folder: Annotated[Path, typer.Argument(help="Artifact folder.")],
    against: Annotated[str, typer.Option(help="Model reference (or artifact folder) to compare with.")],
    data: Data,
    metric: Metric = None,
    seconds: Annotated[float, typer.Option(min=0.5, help="About how long latency is measured.")] = 14.0,
    seed: Seed = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare an artifact with a model on its runtime: interleaved runs, intervals, ties called ties."""
    from narrowcast.report import measurement_table
    from narrowcast.search.bench import bench as compare

    with progress(quiet=json) as shown:
        found = compare(folder, against=against, data=data, metric=metric, seconds=seconds, seed=seed, progress=shown)
    if json:
        print_json(found.model_dump_json(indent=1))
        return
    console().print(found.verdict.headline, markup=False)
    console().print(measurement_table(found.measurements, found.metric))
