"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["Batch", "Data", "Metric", "RuntimeName", "Seed", "Threads"]

Data = Annotated[
    str,
    typer.Option(help="Data: bundled:NAME, npz:FILE, imagefolder:DIR or py:MODULE:FUNCTION.", metavar="DATA"),
]
Metric = Annotated[
    str | None,
    typer.Option(
        help="top1, top5, macro-f1, mse, mae, cosine, agreement, sqnr or py:MODULE:FUNCTION. "
        "Default of optimize: top1 with labels, else agreement, else cosine; of bench: the artifact's own."
    ),
]
RuntimeName = Annotated[
    str, typer.Option("--runtime", help="Runtime that will serve the model: onnxruntime or openvino.")
]
Threads = Annotated[int, typer.Option(min=1, help="Threads that a session computes with.")]
Batch = Annotated[int, typer.Option(min=1, help="Batch size at which latency is judged.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the data split and of everything random.")]
