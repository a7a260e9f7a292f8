"""One trial: everything that stays the same while candidates are built, run and measured."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrowcast.artifacts.manifest import Candidate, Histogram
from narrowcast.data.dataset import Splits
from narrowcast.data.metrics import Metric
from narrowcast.errors import NarrowcastError, RuntimeFailedError
from narrowcast.measure.accuracy import Judge
from narrowcast.measure.latency import compare
from narrowcast.measure.memory import peak_memory
from narrowcast.measure.suite import repeat_to
from narrowcast.models.reference import Model
from narrowcast.recipes.budget import Budget, Limit, Standing
from narrowcast.recipes.plan import Plan
from narrowcast.recipes.recipe import Recipe
from narrowcast.recipes.target import Target
from narrowcast.runtimes import Runtime, Session
from narrowcast.search.progress import Progress
from narrowcast.search.workspace import Finished, Workspace
from narrowcast.transforms.apply import Built, apply_recipe
from narrowcast.transforms.static_int8 import Memory

__all__ = ["Trial", "standings_of"]

#: Seconds of timing for each candidate during the search; the chosen one is measured at length afterwards.
SEARCH_SECONDS = 2.5


@dataclass
class Trial:
    """A model, its data, a target and a budget; runs one recipe after the other.

    Attributes:
        model: The model.
        splits: The parts of the data.
        metric: The metric.
        runtime: Adapter of the target's runtime.
        target: Where the artifact will run.
        budget: The budget.
        workspace: Where finished candidates are kept.
        progress: Told what is being done.
        seed: Seed of everything random.
    """

    model: Model
    splits: Splits
    metric: Metric
    runtime: Runtime
    target: Target
    budget: Budget
    workspace: Workspace
    progress: Progress
    seed: int
    judge: Judge = field(init=False)
    limits: tuple[Limit, ...] = field(init=False)
    original: Path = field(init=False)
    batch: dict[str, NDArray[Any]] = field(init=False)
    memory: Memory = field(default_factory=Memory)

    def __post_init__(self) -> None:
        """Write the original, run it over the search part, and resolve the budget's limits."""
        self.original = self.workspace.graph("original")
        self.original.write_bytes(self.model.exported)
        self.progress.stage("running the original")
        session = self.runtime.load(self.original, threads=self.target.threads)
        self.judge = Judge(self.splits.search, self.metric, session, self.seed)
        self.limits = self.limits_for(self.judge.original.value)
        self.batch = repeat_to(self.splits.search.load(np.zeros(1, np.int64)), self.target.batch)
        np.savez(self.workspace.folder / "batch.npz", **self.batch)  # type: ignore[arg-type]

    def limits_for(self, accuracy: float) -> tuple[Limit, ...]:
        """Return the budget's limits, given the original's metric on the same part of the data."""
        return self.budget.limits(
            metric=self.metric.name,
            higher_is_better=self.metric.higher_is_better,
            accuracy=accuracy,
            size=len(self.model.exported),
        )

    def timing_session(self, graph: Path) -> Session:
        """Return a session as a service that runs one batch size only would load it."""
        return self.runtime.load(graph, threads=self.target.threads, batch=self.target.batch)

    def run(self, recipe: Recipe) -> Finished:
        """Return the measured candidate of a recipe; one that an earlier run finished is not built again."""
        done = self.workspace.find(recipe.name)
        if done is None:
            done = self._run(recipe)
            self.workspace.finish(done)
        return done

    def _run(self, recipe: Recipe) -> Finished:
        begin = time.perf_counter()
        plan = Plan(recipe=recipe, target=self.target)
        try:
            built = apply_recipe(
                recipe,
                self.model.graph,
                self.splits.calibration,
                self.runtime.rules,
                lambda name, share: self.progress.stage(f"{recipe.name}: {name}", share),
                self.memory,
            )
            plan = plan.model_copy(update={"operators": tuple(built.operators), "ranges": tuple(built.ranges)})
            path = self.workspace.graph(recipe.name)
            built.graph.save(path)
            candidate = self._measure(recipe, plan, path)
        except RuntimeFailedError as error:
            return Finished(candidate=Candidate(name=recipe.name, recipe=recipe, failure=error.what), plan=plan)
        seconds = time.perf_counter() - begin
        return Finished(
            candidate=candidate.model_copy(update={"seconds": seconds}), plan=plan, histograms=_histograms(built, plan)
        )

    def _measure(self, recipe: Recipe, plan: Plan, path: Path) -> Candidate:
        name = recipe.name
        session = self.runtime.load(path, threads=self.target.threads)
        score = self.judge.score(session, lambda share: self.progress.stage(f"{name}: accuracy", share))
        if not math.isfinite(score.value) and self.metric.perfect is not math.inf:
            raise RuntimeFailedError(f"candidate {name} gives {self.metric.name} {score.value} on {self.runtime.name}")
        pair = {"original": self.timing_session(self.original), "candidate": self.timing_session(path)}
        found = compare(
            pair,
            [self.batch],
            seconds=SEARCH_SECONDS,
            seed=self.seed,
            progress=lambda share: self.progress.stage(f"{name}: latency", share),
        )
        latency, speedup = found.median("candidate"), found.speedup("original", "candidate")
        needs_memory = self.budget.memory is not None or self.budget.minimise == "memory"
        memory = self._memory(path) if needs_memory else None
        size = path.stat().st_size
        values = {"latency": latency.value, "speedup": speedup.value, "size": float(size), "memory": memory}
        standings = standings_of(self.limits, {"accuracy": score.value, **values})
        return Candidate(
            name=name,
            recipe=recipe,
            accuracy=score.value,
            accuracy_low=score.low,
            accuracy_high=score.high,
            latency=latency.value,
            speedup=speedup.value,
            speedup_low=speedup.low,
            speedup_high=speedup.high,
            size=size,
            memory=memory,
            standings=standings,
            feasible=all(standing.met for standing in standings),
            shares=plan.shares() if plan.operators else {},
            kept_float=sum(operator.format == "fp32" for operator in plan.operators),
        )

    def _memory(self, path: Path) -> float | None:
        try:
            return float(peak_memory(path, self.workspace.folder / "batch.npz", self.target).peak)
        except NarrowcastError as error:
            self.progress.note(error.what)
            return None


def standings_of(limits: tuple[Limit, ...], values: dict[str, float | None]) -> tuple[Standing, ...]:
    """Return each limit beside its measured value; a measure that could not be taken does not keep its limit."""
    standings: list[Standing] = []
    for limit in limits:
        value = values.get(limit.measure)
        held = value is not None and limit.holds(value)
        standings.append(Standing(limit=limit, value=math.nan if value is None else value, met=held))
    return tuple(standings)


def _histograms(built: Built, plan: Plan) -> tuple[Histogram, ...]:
    sqnr = {item.tensor: item.sqnr_db for item in plan.ranges}
    return tuple(
        Histogram(tensor=name, sqnr_db=sqnr.get(name, math.nan), edges=tuple(e), before=tuple(b), after=tuple(a))
        for name, (e, b, a) in built.histograms.items()
    )
