"""What full INT8 tells about the model: which operators lose the accuracy, and what to put back to FP32 first."""

from __future__ import annotations

from narrowcast.recipes.recipe import StaticInt8
from narrowcast.search.blame import blame_of, noise_sources
from narrowcast.search.costs import Costs
from narrowcast.search.mixed import Diagnosis, float_path
from narrowcast.search.trial import Trial
from narrowcast.search.workspace import Finished
from narrowcast.transforms.static_int8 import prepare_static

__all__ = ["diagnose", "static_step"]


def static_step(full: Finished) -> StaticInt8:
    """Return the step that quantised every operator."""
    return next(step for step in full.plan.recipe.steps if isinstance(step, StaticInt8))


def diagnose(trial: Trial, full: Finished) -> Diagnosis:
    """Return the diagnosis of a model; the workspace keeps it.

    Args:
        trial: The trial.
        full: The candidate with every operator in static INT8.
    """
    if trial.workspace.diagnosis is not None:
        return trial.workspace.diagnosis
    rules, calibration = trial.runtime.rules, trial.splits.calibration
    title = "finding the operators to blame"
    prepared = prepare_static(
        trial.model.graph,
        calibration,
        static_step(full),
        rules,
        lambda name, share: trial.progress.stage(f"{title}: {name}", share),
        trial.memory,
    )
    sources = noise_sources(
        prepared,
        trial.memory.quantizers,
        calibration,
        rules,
        lambda share: trial.progress.stage(title, share),
    )
    whole = trial.workspace.graph("prepared")  # the original itself may name its operators otherwise, or not at all
    prepared.graph.save(whole)
    original, quantised = (
        trial.runtime.profile(path, trial.batch, threads=trial.target.threads)
        for path in (whole, trial.workspace.graph(full.candidate.name))
    )
    costs = Costs.of(
        prepared.groups,
        original,
        quantised,
        conversions=trial.runtime.conversions,
        converted=sum(source.elements for source in sources if source.writer is None),
        others={name for node in prepared.graph.nodes for name in (node.name, *node.output)},
    )
    path = float_path([group.name for group in prepared.groups], sources, costs)
    found = Diagnosis(blame=tuple(blame_of(prepared, sources, costs.fp32)), path=tuple(path))
    trial.workspace.diagnosis = found
    return found
