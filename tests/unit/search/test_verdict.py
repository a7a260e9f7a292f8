from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from narrowcast.artifacts.manifest import Candidate, Verdict
from narrowcast.data.metrics import get_metric
from narrowcast.recipes.budget import Budget, Limit, Standing
from narrowcast.recipes.recipe import Optimise, Recipe
from narrowcast.search.verdict import verdict_of

LIMIT = Limit(measure="accuracy", bound=0.98, at_least=True, text="agreement may lose 2%")


def candidate(name: str, accuracy: float, speedup: float) -> Candidate:
    met = accuracy >= LIMIT.bound
    return Candidate(
        name=name,
        recipe=Recipe(name=name, steps=(Optimise(),)),
        accuracy=accuracy,
        speedup=speedup,
        standings=(Standing(limit=LIMIT, value=accuracy, met=met),),
        feasible=met,
    )


def verdict(chosen: Candidate, *others: Candidate, minimise: str = "latency") -> Verdict:
    trial: Any = SimpleNamespace(
        budget=Budget.parse(max_drop="2%", minimise=minimise),
        metric=get_metric("agreement"),
        splits=SimpleNamespace(calibration=SimpleNamespace(size=100)),
    )
    return verdict_of(trial, chosen, (chosen, *others), chosen.standings, [], [])


def test_limits_that_leave_no_gain_are_told_what_they_cost() -> None:
    found = verdict(candidate("fp32", 1.0, 1.01), candidate("int8", 0.9, 2.0), candidate("int8-float3", 0.924, 2.1))
    assert found.met
    (line,) = found.advice
    assert "int8-float3 comes nearest: 2.10x faster, agreement 92.4" in line


@pytest.mark.parametrize(("speedup", "minimise"), [(1.8, "latency"), (1.01, "size")])
def test_a_gain_or_another_objective_needs_no_such_line(speedup: float, minimise: str) -> None:
    assert verdict(candidate("best", 0.99, speedup), candidate("int8", 0.9, 2.0), minimise=minimise).advice == ()


def test_nothing_is_said_where_nothing_is_faster() -> None:
    assert verdict(candidate("fp32", 1.0, 1.01), candidate("int8", 0.9, 0.8)).advice == ()


def test_each_limit_that_alone_stands_in_the_way_of_a_candidate_is_named() -> None:
    fast = Limit(measure="speedup", bound=1.2, at_least=True, text="at least 1.2x faster")

    def both(name: str, accuracy: float, speedup: float) -> Candidate:
        made = candidate(name, accuracy, speedup)
        standings = (*made.standings, Standing(limit=fast, value=speedup, met=fast.holds(speedup)))
        return made.model_copy(update={"standings": standings, "feasible": all(s.met for s in standings)})

    found = verdict(both("fp16", 1.0, 1.0), both("int8", 0.9, 1.5), both("worst", 0.5, 0.5))
    assert not found.met
    relaxed = [line for line in found.advice if "alone relaxed" in line]
    assert len(relaxed) == 2
    assert "accuracy limit alone relaxed, int8 would do" in relaxed[0]
    assert "speedup limit alone relaxed, fp16 would do" in relaxed[1]
