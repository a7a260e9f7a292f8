"""``narrowcast run``: run an artifact on a batch from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from narrowcast.artifacts import load_artifact
from narrowcast.cli.console import Debug, Json, console, print_json
from narrowcast.data.loaders import read_npz
from narrowcast.errors import OutputError
from narrowcast.runtimes import get_runtime
from narrowcast.runtimes.base import check_batch

__all__ = ["run"]


def run(
    folder: Annotated[Path, typer.Argument(help="Artifact folder.")],
    input: Annotated[Path, typer.Option(help="Inputs: an .npz file with one array per model input.")],  # noqa: A002
    out: Annotated[Path, typer.Option("--output", help="Where to write the outputs, as .npz.")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run an artifact on a batch and write its outputs, by name."""
    artifact = load_artifact(folder)
    target = artifact.manifest.target
    session = get_runtime(target.runtime).load(artifact.graph, threads=target.threads)
    batch = read_npz(input)
    check_batch(session.inputs, batch, str(input))
    outputs = session.run(batch)
    partial = out.with_name(out.name + ".partial.npz")
    try:
        np.savez(partial, **outputs)  # type: ignore[arg-type]
        partial.replace(out)
    except OSError as error:
        raise OutputError(f"output file {out} cannot be written: {error.strerror}", next_step="name another") from error
    shapes = {name: [str(array.dtype), list(array.shape)] for name, array in outputs.items()}
    if json:
        print_json({"output": str(out), "outputs": shapes})
        return
    for name, (dtype, shape) in shapes.items():
        console().print(f"{name}: {dtype} {shape}", markup=False)
    console().print(f"written to {out}", markup=False)
