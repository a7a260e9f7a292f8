"""An artifact against any model, on the artifact's runtime."""

from __future__ import annotations

import datetime
import tempfile
from pathlib import Path

import numpy as np

from narrowcast._version import __version__
from narrowcast.artifacts.manifest import Evidence, MetricRecord, Verdict
from narrowcast.artifacts.store import load_artifact
from narrowcast.data.dataset import Dataset, check_fits, check_no_more, split
from narrowcast.data.loaders import load_data
from narrowcast.data.metrics import get_metric
from narrowcast.errors import ModelError
from narrowcast.measure.environment import environment
from narrowcast.measure.suite import SECONDS, measure_pair
from narrowcast.models.loaders import load_model
from narrowcast.models.reference import ModelRef
from narrowcast.recipes.budget import Budget
from narrowcast.runtimes import get_runtime
from narrowcast.search.progress import Progress, Silent

__all__ = ["bench"]


def bench(
    folder: str | Path,
    *,
    against: str,
    data: str,
    metric: str | None = None,
    seconds: float = SECONDS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evidence:
    """Return evidence with the measurements of an artifact beside those of a model, both on the artifact's runtime.

    If the data are those that the artifact was built with, only its report part is used, which no step of the search saw.

    Args:
        folder: The artifact's folder.
        against: Model reference, or another artifact's folder.
        data: Data reference.
        metric: Name of the metric; None takes the artifact's own.
        seconds: About how long latency is measured.
        seed: Seed of the measuring order.
        progress: Told what is being done.

    Raises:
        UserError: The artifact, the model or the data cannot be used.
    """
    shown = progress or Silent()
    artifact = load_artifact(folder)
    manifest = artifact.manifest
    runtime = get_runtime(manifest.target.runtime)
    runtime.version()
    shown.stage(f"loading {against}")
    with tempfile.TemporaryDirectory() as temporary:
        ref = ModelRef.parse(against)
        original = Path(temporary) / "original.onnx"
        if ref.scheme == "artifact":
            original = load_artifact(ref.id).graph
            model = None
        else:
            model = load_model(ref, seed=manifest.data.seed)
            original.write_bytes(model.exported)
        if model is None:
            model = load_model(manifest.model.ref, seed=manifest.data.seed)
        samples = _report_part(load_data(data, model), manifest.data.sha256, manifest.data.seed)
        inputs = list(runtime.load(artifact.graph).inputs)
        if {info.name for info in inputs} != {info.name for info in model.graph.inputs}:
            names = ", ".join(repr(info.name) for info in inputs)
            raise ModelError(
                f"{against} and {folder} take different inputs: {', '.join(repr(i.name) for i in model.graph.inputs)} "
                f"and {names}",
                allowed=f"models that take {names}",
                next_step="name the model that the artifact was made from",
            )
        check_fits(samples, inputs)
        check_no_more(samples, inputs)
        judged = get_metric(metric or manifest.metric.name)
        measurements = measure_pair(
            runtime,
            manifest.target,
            {"original": original, "artifact": artifact.graph},
            samples,
            judged,
            Path(temporary),
            seconds=seconds,
            seed=seed,
            progress=shown.stage,
        )
    return Evidence(
        narrowcast=__version__,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=manifest.model.model_copy(update={"ref": against}),
        data=manifest.data.model_copy(update={"ref": data, "sha256": samples.sha256, "report": samples.size}),
        metric=MetricRecord.of(judged),
        budget=Budget(),
        target=manifest.target,
        environment=environment(),
        chosen=manifest.plan.recipe.name,
        verdict=Verdict(met=True, headline=f"{folder} against {against} on {runtime.name}"),
        measurements=tuple(measurements),
        plan=manifest.plan,
    )


def _report_part(data: Dataset, sha256: str, seed: int) -> Dataset:
    return split(data, seed).report if data.sha256 == sha256 else data.take(np.arange(data.size, dtype=np.int64))
