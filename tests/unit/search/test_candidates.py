from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from contracts.graphs import CASES
from narrowcast.artifacts.manifest import Blame, Candidate
from narrowcast.models.prepare import prepare
from narrowcast.recipes.budget import Limit, Standing
from narrowcast.recipes.recipe import Recipe, StaticInt8
from narrowcast.search.candidates import MixedSearch, first_recipes, nearest, preferred
from narrowcast.search.optimize import MAX_EVALUATIONS

STEP = StaticInt8(ranges=("minmax",), equalise=False)


def blame_of(noises: list[float], seconds: list[float] | None = None) -> list[Blame]:
    times = seconds or [1e-3] * len(noises)
    return [
        Blame(group=f"g{i}", op_type="Conv", noise=noise, seconds=time)
        for i, (noise, time) in enumerate(zip(noises, times, strict=True))
    ]


def kept(recipe: Recipe) -> frozenset[str]:
    (step,) = recipe.steps
    assert isinstance(step, StaticInt8)
    return step.keep_float


def play(search: MixedSearch, threshold: int, evaluations: int) -> list[int]:
    """Answer as if a candidate were accurate from so many groups in float on; return the numbers that were tried."""
    tried: list[int] = []
    for _ in range(evaluations):
        recipe = search.next()
        if recipe is None:
            break
        tried.append(len(kept(recipe)))
        search.tell(tried[-1] >= threshold)
    return tried


@pytest.mark.parametrize("count", [2, 3, 7, 20, 64])
def test_the_boundary_is_found_wherever_it_is(count: int) -> None:
    blame = blame_of(np.random.default_rng(count).exponential(size=count).tolist())
    for threshold in range(1, count + 1):
        for allowed in (0.001, 0.01, 0.03):
            search = MixedSearch(STEP, blame, 0.04, allowed)
            tried = play(search, threshold, 100)
            assert search.enough == threshold
            assert search.too_few == threshold - 1
            assert len(tried) <= 2 + math.ceil(math.log2(count))
            assert len(set(tried)) == len(tried)
            assert all(0 < number < count for number in tried)
            assert search.next() is None


@pytest.mark.parametrize("evaluations", [1, 2, 3])
def test_stopping_early_leaves_numbers_that_are_known_to_be_right(evaluations: int) -> None:
    for threshold in range(1, 31):
        search = MixedSearch(STEP, blame_of([1.0] * 30), 0.04, 0.01)
        tried = play(search, threshold, evaluations)
        assert search.too_few < threshold <= search.enough
        assert search.enough in (*tried, 30)


def test_candidates_are_nested_along_the_blame_order() -> None:
    search = MixedSearch(STEP, blame_of([1, 9, 3, 7, 5, 2, 8, 6, 4]), 0.04, 0.01)
    order = [item.group for item in search.order]
    assert order == ["g1", "g6", "g3", "g7", "g4", "g8", "g2", "g5", "g0"]
    for answer in (False, True, False):
        recipe = search.next()
        if recipe is None:
            break
        assert kept(recipe) == frozenset(order[: len(kept(recipe))])
        assert recipe.name == f"int8-float{len(kept(recipe))}"
        assert recipe.steps == (STEP.model_copy(update={"keep_float": kept(recipe)}),)
        search.tell(answer)


def test_noise_is_weighed_against_the_time_that_float_costs() -> None:
    search = MixedSearch(STEP, blame_of([4.0, 3.0, 0.1], [1e-2, 1e-4, 1e-3]), 0.04, 0.01)
    assert [item.group for item in search.order] == ["g1", "g0", "g2"]


def test_the_first_guess_takes_the_drop_to_grow_with_the_amplitude_of_the_noise() -> None:
    # 16 groups of equal noise: a quarter of the drop needs a sixteenth of the noise, so 15 go back to float
    assert play(MixedSearch(STEP, blame_of([1.0] * 16), 0.04, 0.01), 99, 1) == [15]
    # half of the drop: a quarter of the noise stays, 12 go back
    assert play(MixedSearch(STEP, blame_of([1.0] * 16), 0.04, 0.02), 99, 1) == [12]
    # one group makes nearly all of the noise
    assert play(MixedSearch(STEP, blame_of([0.01] * 9 + [100.0]), 0.04, 0.01), 99, 1) == [1]


@pytest.mark.parametrize("drop", [-0.01, 0.0, math.nan, math.inf, 0.5])
@pytest.mark.parametrize("allowed", [-0.1, 0.0, 0.01])
def test_odd_drops_still_lead_to_the_boundary(drop: float, allowed: float) -> None:
    search = MixedSearch(STEP, blame_of([1.0] * 12), drop, allowed)
    play(search, 5, 50)
    assert search.enough == 5


def test_a_single_group_leaves_nothing_to_search() -> None:
    assert MixedSearch(STEP, blame_of([1.0]), 0.04, 0.01).next() is None
    assert MixedSearch(STEP, [], 0.04, 0.01).next() is None


# Which recipes, which candidate ---------------------------------------------------------------------------------------


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
