"""``narrowcast optimize``: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from narrowcast.cli.console import Debug, Json, console, errors_console, print_json, progress
from narrowcast.cli.options import Batch, Data, Metric, RuntimeName, Seed, Threads
from narrowcast.recipes.budget import Budget
from narrowcast.recipes.target import Target

__all__ = ["optimize"]


def optimize(
    model: Annotated[
        str,
        typer.Argument(
            help="Model: timm:NAME, torchvision:NAME, a path to an .onnx file, py:MODULE:FUNCTION, bundled:NAME, or an "
            "artifact folder."
        ),
    ],
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the artifact and its report.")],
    max_drop: Annotated[
        str | None,
        typer.Option(help="Accuracy that may go: 0.5% of the original, 0.5pt, or 0.005 in the metric's unit."),
    ] = None,
    at_least: Annotated[
        float | None, typer.Option(help="Bound on the metric itself (at most, for errors such as mse).")
    ] = None,
    latency: Annotated[str | None, typer.Option(help="Largest median latency, for example 5ms.")] = None,
    speedup: Annotated[str | None, typer.Option(help="Least speed-up over the original, for example 2x.")] = None,
    size: Annotated[str | None, typer.Option(help="Largest size on disk, for example 4MB.")] = None,
    ratio: Annotated[str | None, typer.Option(help="Least compression ratio, for example 3.5x.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Largest peak memory of a serving process, for example 300MB.")
    ] = None,
    minimise: Annotated[str, typer.Option(help="What to minimise: latency, size or memory.")] = "latency",
    metric: Metric = None,
    runtime: RuntimeName = "onnxruntime",
    threads: Threads = 1,
    batch: Batch = 1,
    seed: Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that is in the output folder.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make the best artifact that meets a budget, measured on the runtime that will serve it.

    Exit code 3: the budget cannot be met; the nearest artifact is saved, with what is to blame and what would help.
    """
    from narrowcast.report import render_terminal
    from narrowcast.search.optimize import optimize as search

    budget = Budget.parse(
        max_drop=max_drop,
        at_least=at_least,
        latency=latency,
        speedup=speedup,
        size=size,
        ratio=ratio,
        memory=memory,
        minimise=minimise,
    )
    target = Target(runtime=runtime, threads=threads, batch=batch)
    try:
        with progress(quiet=json) as shown:
            result = search(
                model,
                data=data,
                out=out,
                budget=budget,
                metric=metric,
                target=target,
                seed=seed,
                force=force,
                progress=shown,
            )
    except KeyboardInterrupt:
        errors_console().print("interrupted; run the same command again to go on where it stopped", style="yellow")
        raise typer.Exit(130) from None
    if json:
        print_json(result.evidence.model_dump_json(indent=1))
    else:
        render_terminal(result.evidence, console())
        console().print(f"artifact: {out}\nreport:   {out / 'report.html'}", markup=False, soft_wrap=True)
    if not result.met:
        raise typer.Exit(3)
