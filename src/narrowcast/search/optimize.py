"""The main job: one budget in, one proven artifact out."""

from __future__ import annotations

import datetime
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from narrowcast._version import __version__
from narrowcast.artifacts.manifest import (
    Candidate,
    DataRecord,
    Evidence,
    Measurement,
    MetricRecord,
    ModelRecord,
    OperatorShare,
    Verdict,
)
from narrowcast.artifacts.store import check_output_folder
from narrowcast.data.dataset import check_no_more, split
from narrowcast.data.loaders import load_data
from narrowcast.data.metrics import default_metric, get_metric
from narrowcast.errors import RuntimeFailedError
from narrowcast.measure.accuracy import check_classes
from narrowcast.measure.environment import environment
from narrowcast.measure.suite import measure_pair
from narrowcast.models.graph import attribute
from narrowcast.models.loaders import load_model
from narrowcast.recipes.budget import Budget
from narrowcast.recipes.recipe import Recipe
from narrowcast.recipes.target import Target
from narrowcast.report import text
from narrowcast.runtimes import OperatorTime, get_runtime
from narrowcast.search.candidates import FULL, first_recipes, nearest, preferred
from narrowcast.search.diagnosis import diagnose, static_step
from narrowcast.search.final import write_artifact
from narrowcast.search.mixed import MixedSearch, fastest, float_recipe
from narrowcast.search.progress import Progress, Silent
from narrowcast.search.trial import Trial, standings_of
from narrowcast.search.verdict import verdict_of
from narrowcast.search.workspace import Finished, Workspace

__all__ = ["MAX_EVALUATIONS", "Result", "optimize"]

#: Candidates that are built and run in full, at the most.
MAX_EVALUATIONS = 8


@dataclass(frozen=True)
class Result:
    """What a run of ``optimize`` gives.

    Attributes:
        folder: The artifact's folder.
        evidence: Everything that was measured; what the report shows.
    """

    folder: Path
    evidence: Evidence

    @property
    def met(self) -> bool:
        """Whether the budget is met, accuracy judged on the report part."""
        return self.evidence.verdict.met

    def __str__(self) -> str:
        return self.evidence.verdict.headline


def optimize(
    model: str,
    *,
    data: str,
    out: str | Path,
    budget: Budget | None = None,
    metric: str | None = None,
    target: Target | None = None,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Return the best artifact that meets a budget, or the nearest to it, measured on the runtime that will serve it.

    A run that was interrupted goes on where it stopped when it is called again with the same arguments.

    Args:
        model: Model reference, for example ``timm:resnet18`` or ``path/to/model.onnx``.
        data: Data reference, for example ``npz:data.npz``.
        out: Folder for the artifact and its report.
        budget: Limits and the objective; None minimises latency without limits.
        metric: Name of the metric; None takes top1 with labels, else agreement with the original, else cosine.
        target: Runtime, threads and batch size.
        seed: Seed of the split, of random weights and of the measuring order.
        force: Whether to replace an artifact that is in the folder.
        progress: Told what is being done.

    Raises:
        UserError: Something that was asked for cannot be done; see ``narrowcast.errors``.
    """
    begin = time.perf_counter()
    budget, target, progress, out = budget or Budget(), target or Target(), progress or Silent(), Path(out)
    check_output_folder(out, force=force)
    trial = _prepare(model, data, out, budget, metric, target, seed, progress)
    with trial.workspace:
        finished = _search(trial)
        chosen = _choose(trial, finished)
        profile = _profile(trial)
        measurements = measure_pair(
            trial.runtime,
            trial.target,
            {"original": trial.original, "artifact": trial.workspace.graph(chosen.candidate.name)},
            trial.splits.report,
            trial.metric,
            trial.workspace.folder,
            seed=seed,
            progress=lambda name, share: progress.stage(f"report: {name}", share),
        )
        evidence = _evidence(trial, finished, chosen, profile, measurements, time.perf_counter() - begin)
        write_artifact(trial, chosen, evidence, out)
    trial.workspace.remove()
    return Result(out, evidence)


def _prepare(
    model_ref: str,
    data_ref: str,
    out: Path,
    budget: Budget,
    metric_name: str | None,
    target: Target,
    seed: int,
    progress: Progress,
) -> Trial:
    runtime = get_runtime(target.runtime)
    version = runtime.version()
    if metric_name is not None:
        get_metric(metric_name)  # a wrong name is found before minutes of work
    progress.stage(f"loading {model_ref}")
    model = load_model(model_ref, seed=seed)
    progress.stage(f"loading {data_ref}")
    data = load_data(data_ref, model)
    check_no_more(data, model.graph.inputs)
    shape = model.graph.outputs[0].shape
    metric = get_metric(metric_name or default_metric(data.labels is not None, len(shape)))
    check_classes(data, metric, shape)
    splits = split(data, seed)
    fingerprint: dict[str, object] = {
        "narrowcast": __version__,
        "runtime": version,
        "model": model.sha256,
        "data": data.sha256,
        "metric": metric.name,
        "budget": budget.model_dump_json(),
        "target": target.model_dump_json(),
        "seed": seed,
    }
    workspace = Workspace(out, fingerprint)
    if workspace.resumed:
        progress.note(f"going on with an earlier run: {workspace.resumed} candidates are finished already")
    with workspace:
        return Trial(model, splits, metric, runtime, target, budget, workspace, progress, seed)


def _search(trial: Trial) -> list[Finished]:
    finished: list[Finished] = []
    recipes = list(first_recipes(trial.model.graph))
    for recipe in recipes:
        finished.append(_run(trial, recipe))
        full = finished[-1].candidate
        if recipe.name != FULL or full.failure:
            continue
        trial.memory.recall(finished[-1].plan, signed=trial.runtime.rules.signed_activations)
        left = MAX_EVALUATIONS - len(recipes)
        unmet = not any(done.candidate.feasible for done in finished)
        if _accurate(full):
            finished += _faster(trial, finished[-1]) if trial.budget.minimise == "latency" else []
        elif unmet:
            finished += _mixed(trial, finished[-1], left)
    return finished


def _run(trial: Trial, recipe: Recipe) -> Finished:
    done = trial.run(recipe)
    found = done.candidate
    if found.failure:
        trial.progress.note(f"{found.name}: failed: {found.failure}")
    else:
        trial.progress.note(
            f"{found.name}: {trial.metric.name} {text.accuracy(MetricRecord.of(trial.metric))(found.accuracy, 0)}, "
            f"{text.ratio(found.speedup)} as fast, {text.quantity(found.size, 'bytes')}"
            f"{', meets the budget' if found.feasible else ''}"
        )
    return done


def _accurate(candidate: Candidate) -> bool:
    return all(standing.met for standing in candidate.standings if standing.limit.measure == "accuracy")


def _mixed(trial: Trial, full: Finished, evaluations: int) -> list[Finished]:
    """Put the groups to blame back to FP32 until the accuracy limit holds, with as few evaluations as possible."""
    path = diagnose(trial, full).path
    limit = next(s.limit for s in full.candidate.standings if s.limit.measure == "accuracy")
    original = trial.judge.original.value
    sign = 1 if trial.metric.higher_is_better else -1
    drop, allowed = sign * (original - full.candidate.accuracy), sign * (original - limit.bound)
    search = MixedSearch(static_step(full), path, drop, allowed)
    finished: list[Finished] = []
    for _ in range(evaluations):
        recipe = search.next()
        if recipe is None:
            break
        finished.append(_run(trial, recipe))
        search.tell(not finished[-1].candidate.failure and _accurate(finished[-1].candidate))
    return finished


def _faster(trial: Trial, full: Finished) -> list[Finished]:
    """Put back to FP32 what the target runtime computes faster so, if that is worth an evaluation."""
    found = fastest(diagnose(trial, full).path)
    if found is None:
        return []
    return [_run(trial, float_recipe(static_step(full), found))]


def _choose(trial: Trial, finished: list[Finished]) -> Finished:
    candidates = [done.candidate for done in finished]
    best = preferred(candidates, trial.budget.minimise, higher_is_better=trial.metric.higher_is_better)
    chosen = best or nearest(candidates, trial.budget.minimise)
    if chosen is None:
        reasons = "; ".join(f"{c.name}: {c.failure}" for c in candidates)
        raise RuntimeFailedError(f"no candidate could be run on {trial.runtime.name}: {reasons}")
    trial.progress.note(f"chosen: {chosen.name}")
    return next(done for done in finished if done.candidate is chosen)


def _profile(trial: Trial) -> list[OperatorShare]:
    """Return where the original spends time and bytes, by operator type, as far as the runtime tells."""
    trial.progress.stage("profiling the original")
    times = trial.runtime.profile(trial.original, trial.batch, threads=trial.target.threads)
    total = sum(item.seconds for item in times) or 1.0
    grouped: dict[str, list[OperatorTime]] = defaultdict(list)
    for item in times:
        grouped[item.op_type].append(item)
    sizes: dict[str, int] = defaultdict(int)
    graph = trial.model.graph
    seen: set[str] = set()
    for node in graph.nodes:
        for name in node.input:
            if name in graph.constants and name not in seen:
                seen.add(name)
                depthwise = node.op_type == "Conv" and attribute(node, "group", 1) > 1
                sizes["depthwise Conv" if depthwise else node.op_type] += graph.constants[name].nbytes
    kinds = sorted(grouped.items(), key=lambda pair: -sum(item.seconds for item in pair[1]))
    shares = [
        OperatorShare(
            op_type=kind,
            count=len(items),
            seconds=sum(item.seconds for item in items),
            time_share=sum(item.seconds for item in items) / total,
            bytes=sizes.pop(kind, 0),
        )
        for kind, items in kinds
    ]
    rest = [OperatorShare(op_type=k, count=0, seconds=0.0, time_share=0.0, bytes=b) for k, b in sizes.items()]
    return shares + sorted(rest, key=lambda item: -item.bytes)


def _evidence(
    trial: Trial,
    finished: list[Finished],
    chosen: Finished,
    profile: list[OperatorShare],
    measurements: list[Measurement],
    seconds: float,
) -> Evidence:
    model, splits = trial.model, trial.splits
    values: dict[str, float | None] = {m.measure: m.value for m in measurements if m.subject == "artifact"}
    ratios = {m.measure: m.value for m in measurements if m.subject == "ratio"}
    original = next(m.value for m in measurements if (m.measure, m.subject) == ("accuracy", "original"))
    standings = standings_of(
        trial.limits_for(original),
        {
            "accuracy": values.get("accuracy"),
            "latency": values.get("latency_p50"),
            "speedup": ratios.get("latency_p50"),
            "size": values.get("size"),
            "memory": values.get("peak_memory"),
        },
    )
    kept = {operator.group for operator in chosen.plan.operators if operator.format == "fp32"}
    blame = (
        [item.model_copy(update={"kept_float": item.group in kept}) for item in trial.workspace.diagnosis.blame]
        if trial.workspace.diagnosis
        else []
    )
    candidates = tuple(done.candidate for done in finished)
    verdict: Verdict = verdict_of(trial, chosen.candidate, candidates, standings, measurements, blame)
    return Evidence(
        narrowcast=__version__,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=ModelRecord(
            ref=str(model.ref), sha256=model.sha256, bytes=len(model.exported), random_weights=model.random_weights
        ),
        data=DataRecord(
            ref=splits.report.source,
            sha256=splits.report.sha256,
            seed=trial.seed,
            calibration=splits.calibration.size,
            search=splits.search.size,
            report=splits.report.size,
            note=splits.report.note,
        ),
        metric=MetricRecord.of(trial.metric),
        budget=trial.budget,
        target=trial.target,
        environment=environment(),
        chosen=chosen.candidate.name,
        verdict=verdict,
        measurements=tuple(measurements),
        candidates=candidates,
        blame=tuple(blame),
        profile=tuple(profile),
        histograms=chosen.histograms,
        plan=chosen.plan,
        evaluations=len(finished),
        seconds=seconds,
    )
