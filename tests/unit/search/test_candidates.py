from __future__ import annotations

import math
from typing import Any

import pytest

from contracts.graphs import CASES
from narrowcast.artifacts.manifest import Candidate
from narrowcast.models.prepare import prepare
from narrowcast.recipes.budget import Limit, Standing
from narrowcast.recipes.recipe import Recipe
from narrowcast.search.candidates import first_recipes, nearest, preferred
from narrowcast.search.optimize import MAX_EVALUATIONS


def recipes_of(name: str) -> list[Recipe]:
    return list(first_recipes(prepare(next(case for case in CASES if case.name == name).model(), name)))


def test_dynamic_int8_is_tried_only_where_matrix_products_hold_much_of_the_weight() -> None:
    everywhere = {"int8", "int8-weights", "fp16-weights", "fp32"}
    assert {recipe.name for recipe in recipes_of("residual")} == everywhere
    assert {recipe.name for recipe in recipes_of("attention")} == everywhere | {"int8-dynamic"}


@pytest.mark.parametrize("name", ["residual", "attention", "embedding"])
def test_the_first_recipes_have_names_of_their_own_and_leave_evaluations_for_the_search(name: str) -> None:
    names = [recipe.name for recipe in recipes_of(name)]
    assert len(set(names)) == len(names)
    assert MAX_EVALUATIONS - len(names) >= 3


def candidate(name: str, **values: Any) -> Candidate:
    return Candidate(name=name, recipe=Recipe(name=name, steps=()), **values)


def standing(measure: str, bound: float, value: float, met: bool, at_least: bool = True) -> Standing:
    return Standing(limit=Limit(measure=measure, bound=bound, at_least=at_least, text=""), value=value, met=met)


def test_the_best_feasible_candidate_by_the_objective_is_preferred() -> None:
    found = [
        candidate("fast", speedup=3.0, size=400, memory=90.0, feasible=True),
        candidate("small", speedup=1.1, size=100, memory=80.0, feasible=True),
        candidate("lean", speedup=1.0, size=300, memory=10.0, feasible=True),
        candidate("wrong", speedup=9.0, size=1, memory=1.0, feasible=False),
    ]
    for objective, name in (("latency", "fast"), ("size", "small"), ("memory", "lean")):
        chosen = preferred(found, objective)
        assert chosen is not None
        assert chosen.name == name
    assert preferred(found[3:], "latency") is None


@pytest.mark.parametrize(("higher_is_better", "name"), [(True, "accurate"), (False, "fast")])
def test_among_speeds_that_tie_the_more_accurate_candidate_is_preferred(higher_is_better: bool, name: str) -> None:
    found = [
        candidate("fast", accuracy=0.87, speedup=2.04, speedup_low=1.99, speedup_high=2.09, feasible=True),
        candidate("accurate", accuracy=0.88, speedup=1.97, speedup_low=1.94, speedup_high=2.02, feasible=True),
        candidate("slow", accuracy=1.0, speedup=1.5, speedup_low=1.4, speedup_high=1.6, feasible=True),
        candidate("worse", accuracy=0.5, speedup=1.5, speedup_low=1.4, speedup_high=1.6, feasible=True),
        candidate("wrong", accuracy=0.99, speedup=2.1, speedup_low=2.0, speedup_high=2.2, feasible=False),
    ]
    chosen = preferred(found, "latency", higher_is_better=higher_is_better)
    assert chosen is not None
    assert chosen.name == name


def test_memory_that_was_not_measured_is_never_the_least() -> None:
    found = [candidate("unknown", feasible=True), candidate("known", memory=1e9, feasible=True)]
    chosen = preferred(found, "memory")
    assert chosen is not None
    assert chosen.name == "known"


def test_the_nearest_candidate_breaks_its_limits_by_the_least() -> None:
    found = [
        candidate("far", speedup=9.0, standings=(standing("accuracy", 0.9, 0.45, False),)),
        candidate("near", speedup=1.0, standings=(standing("accuracy", 0.9, 0.88, False),)),
        candidate("broken", failure="the runtime refused it"),
        candidate("unmeasured", standings=(standing("memory", 1.0, math.nan, False, at_least=False),)),
    ]
    chosen = nearest(found, "latency")
    assert chosen is not None
    assert chosen.name == "near"
    assert nearest(found[2:3], "latency") is None


def test_among_equally_near_candidates_the_objective_decides() -> None:
    broken = (standing("size", 100.0, 200.0, False, at_least=False),)
    found = [candidate("slow", speedup=1.0, standings=broken), candidate("fast", speedup=2.0, standings=broken)]
    chosen = nearest(found, "latency")
    assert chosen is not None
    assert chosen.name == "fast"
