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
    trial: Any = SimpleNamespace(budget=Budget.parse(max_drop="2%", minimise=minimise), metric=get_metric("agreement"))
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
