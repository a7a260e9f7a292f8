"""The artifact that carries the chosen graph and all the evidence."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from narrowcast.artifacts.manifest import Evidence, Manifest
from narrowcast.artifacts.store import GRAPH, REFERENCE, publish, save_artifact, write_atomic
from narrowcast.report import render_html
from narrowcast.search.trial import Trial
from narrowcast.search.workspace import Finished

__all__ = ["write_artifact"]

REFERENCE_SAMPLES = 4
#: Difference from the stored outputs that verification accepts, as a share of the largest output.
PARITY_FLOAT, PARITY_INT8 = 1e-3, 3e-2


def write_artifact(trial: Trial, chosen: Finished, evidence: Evidence, out: Path) -> None:
    """Write the artifact beside its place and move it there when it is complete."""
    trial.progress.stage("writing the artifact")
    folder = trial.workspace.fresh("artifact")
    graph = folder / GRAPH
    graph.write_bytes(trial.workspace.graph(chosen.candidate.name).read_bytes())
    feeds = trial.splits.report.load(np.arange(min(REFERENCE_SAMPLES, trial.splits.report.size), dtype=np.int64))
    outputs = trial.runtime.load(graph, threads=trial.target.threads).run(feeds)
    arrays = {f"in:{k}": v for k, v in feeds.items()} | {f"out:{k}": v for k, v in outputs.items()}
    np.savez_compressed(folder / REFERENCE, **arrays)  # type: ignore[arg-type]
    write_atomic(folder / "report.json", evidence.model_dump_json(indent=1))
    write_atomic(folder / "report.html", render_html(evidence))
    executed = any(operator.format == "int8" and operator.executed for operator in chosen.plan.operators)
    manifest = Manifest(
        narrowcast=evidence.narrowcast,
        created=evidence.created,
        model=evidence.model,
        data=evidence.data,
        metric=evidence.metric,
        target=evidence.target,
        plan=evidence.plan,
        versions=evidence.environment.versions,
        files={},
        parity=PARITY_INT8 if executed else PARITY_FLOAT,
        measurements=evidence.measurements,
        environment=evidence.environment,
        verdict=evidence.verdict,
    )
    save_artifact(folder, manifest)
    publish(folder, out)
