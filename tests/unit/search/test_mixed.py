from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from narrowcast.recipes.recipe import Recipe, StaticInt8
from narrowcast.search.blame import Source
from narrowcast.search.costs import Costs
from narrowcast.search.mixed import FloatStep, MixedSearch, fastest, float_path, float_recipe

STEP = StaticInt8(ranges=("minmax",), equalise=False)


def names(count: int) -> list[str]:
    return [f"g{number}" for number in range(count)]


def path_of(noises: Sequence[float]) -> list[FloatStep]:
    """A path that puts one more group back at each step; the noises are what is left."""
    return [
        FloatStep(keep=tuple(names(number)), noise=noise, seconds=1.0 + number) for number, noise in enumerate(noises)
    ]


def evenly(count: int) -> list[FloatStep]:
    """A path along which the noise falls from 1 to 0 in equal steps."""
    return path_of(np.linspace(1.0, 0.0, count + 1).tolist())


def kept(recipe: Recipe) -> frozenset[str]:
    (step,) = recipe.steps
    assert isinstance(step, StaticInt8)
    return step.keep_float


# The path -------------------------------------------------------------------------------------------------------------


def chain(seed: int, count: int, conversion: float) -> tuple[list[str], list[Source], Costs]:
    """Random groups in a row, each with a weight and a tensor that the next one or two read."""
    rng, groups = np.random.default_rng(seed), names(count)
    sources = [Source(rng.exponential(), None, (groups[0],), 40)]
    for number, name in enumerate(groups):
        sources.append(Source(rng.exponential(), name))
        reach = int(rng.integers(1, 3))
        sources.append(Source(rng.exponential(), name, tuple(groups[number + 1 : number + 1 + reach]), 60))
    fp32, int8 = ({name: float(rng.uniform(1, 3)) * factor for name in groups} for factor in (1.5, 1.0))
    return groups, sources, Costs(fp32, int8, conversion)


def evaluated(keep: set[str], groups: list[str], sources: list[Source], costs: Costs) -> tuple[float, float]:
    """Noise and time with some groups in FP32, the plain way."""
    noise, seconds = 0.0, sum((costs.fp32 if name in keep else costs.int8)[name] for name in groups)
    for source in sources:
        made = source.writer is not None and source.writer not in keep
        readers = {name in keep for name in source.readers}
        if made or False in readers:
            noise += source.noise
        if (made and True in readers) or (not made and False in readers):
            seconds += costs.conversion * source.elements
    return noise, seconds


chains = pytest.mark.parametrize("conversion", [0.0, 0.003, 0.1])
seeds = pytest.mark.parametrize("seed", range(8))


@chains
@seeds
def test_each_step_promises_what_a_plain_evaluation_says(seed: int, conversion: float) -> None:
    groups, sources, costs = chain(seed, 2 + seed % 5, conversion)
    path = float_path(groups, sources, costs)
    for item in path:
        noise, seconds = evaluated(set(item.keep), groups, sources, costs)
        assert item.noise == pytest.approx(noise, abs=1e-9)
        assert item.seconds == pytest.approx(seconds)


@chains
@seeds
def test_each_step_takes_the_run_of_groups_with_the_most_noise_for_its_time(seed: int, conversion: float) -> None:
    groups, sources, costs = chain(seed, 2 + seed % 5, conversion)
    path = float_path(groups, sources, costs)
    for before, after in itertools.pairwise(path):
        ranks: dict[frozenset[str], tuple[bool, float]] = {}
        start = evaluated(set(before.keep), groups, sources, costs)
        for first in range(len(groups)):
            for last in range(first, min(first + max(1, len(groups) // 2), len(groups))):
                keep = frozenset(before.keep) | set(groups[first : last + 1])
                noise, seconds = evaluated(set(keep), groups, sources, costs)
                more = seconds - start[1]
                if keep != frozenset(before.keep):
                    ranks[keep] = (True, -more) if more <= 0 else (False, (start[0] - noise) / more)
        chosen, best = ranks[frozenset(after.keep)], max(ranks.values())
        assert chosen[0] == best[0]
        assert chosen[1] == pytest.approx(best[1])


@chains
@seeds
def test_the_path_goes_from_no_group_to_all_of_them_and_never_takes_one_back(seed: int, conversion: float) -> None:
    groups, sources, costs = chain(seed, 20, conversion)
    path = float_path(groups, sources, costs)
    assert path[0].keep == ()
    assert path[-1].keep == tuple(groups)
    for before, after in itertools.pairwise(path):
        assert set(before.keep) < set(after.keep)
        assert after.noise <= before.noise
        assert list(after.keep) == [name for name in groups if name in after.keep]  # in the order of the graph
    assert path[-1].noise == pytest.approx(0.0, abs=1e-9)
    assert path[-1].seconds == pytest.approx(sum(costs.fp32.values()))


def test_neighbours_go_together_where_a_conversion_costs_more_than_a_group() -> None:
    groups = names(8)
    sources = [Source(1.0, name, tuple(groups[number + 1 : number + 2]), 100) for number, name in enumerate(groups)]
    fp32, int8 = dict.fromkeys(groups, 1.1), dict.fromkeys(groups, 1.0)

    def runs(conversion: float) -> list[int]:
        """How many separate runs of groups each step keeps in FP32."""
        path = float_path(groups, sources, Costs(fp32, int8, conversion))
        places = [[int(name[1:]) for name in item.keep] for item in path]
        return [sum(number - 1 not in place for number in place) for place in places]

    assert max(runs(0.1)) == 1
    loud = [Source(9.0 if number % 2 else 1.0, name) for number, name in enumerate(groups)]
    assert [len(item.keep) for item in float_path(groups, loud, Costs(fp32, int8))[:5]] == [0, 1, 2, 3, 4]
    assert float_path(groups, loud, Costs(fp32, int8))[4].keep == ("g1", "g3", "g5", "g7")


def test_groups_that_are_no_slower_in_fp32_come_first_however_little_noise_they_make() -> None:
    groups = names(4)
    sources = [Source(noise, name) for name, noise in zip(groups, (5.0, 0.1, 9.0, 0.2), strict=True)]
    fp32 = {"g0": 3.0, "g1": 1.0, "g2": 3.0, "g3": 0.5}
    path = float_path(groups, sources, Costs(fp32, {"g0": 1.0, "g1": 2.0, "g2": 1.0, "g3": 1.0}))
    assert [item.keep for item in path] == [(), ("g1",), ("g1", "g3"), ("g1", "g2", "g3"), ("g0", "g1", "g2", "g3")]
    assert [item.seconds for item in path] == pytest.approx([5.0, 4.0, 3.5, 5.5, 7.5])
    assert [item.noise for item in path] == pytest.approx([14.3, 14.2, 14.0, 5.0, 0.0])


def test_noise_is_weighed_against_the_time_that_float_costs() -> None:
    sources = [Source(noise, name) for name, noise in zip(names(3), (4.0, 3.0, 0.1), strict=True)]
    costs = Costs({"g0": 1e-2, "g1": 1e-4, "g2": 1e-3}, dict.fromkeys(names(3), 0.0))
    assert [item.keep for item in float_path(names(3), sources, costs)][1] == ("g1",)
    assert [item.keep for item in float_path(names(3), sources, costs)][2] == ("g0", "g1")


def test_a_rounding_stays_until_its_writer_and_all_readers_are_in_float() -> None:
    groups = names(3)
    costs = Costs({"g0": 2.0, "g1": 3.0, "g2": 4.0}, dict.fromkeys(groups, 1.0))
    path = float_path(groups, [Source(1.0, "g0", ("g1", "g2"), 10)], costs)
    assert [(len(item.keep), item.noise) for item in path] == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 0.0)]


def test_there_are_candidates_between_none_and_all_even_where_integers_never_pay() -> None:
    groups = names(4)
    path = float_path(groups, [], Costs(dict.fromkeys(groups, 1.0), dict.fromkeys(groups, 9.0), 1.0))
    assert [len(item.keep) for item in path] == [0, 2, 4]


@pytest.mark.parametrize("costs", [Costs(), Costs(conversion=1e-6)])
def test_a_graph_whose_times_are_not_known_still_gets_a_whole_path(costs: Costs) -> None:
    groups, sources, _ = chain(3, 15, 0.0)
    path = float_path(groups, sources, costs)
    assert (path[0].keep, path[-1].keep) == ((), tuple(groups))


def test_a_graph_without_groups_has_a_path_of_one_step() -> None:
    assert float_path([], [], Costs()) == [FloatStep(keep=(), noise=0.0, seconds=0.0)]


# The candidate for speed ----------------------------------------------------------------------------------------------


def timed(*seconds: float) -> list[FloatStep]:
    return [FloatStep(keep=tuple(names(number)), noise=1.0, seconds=value) for number, value in enumerate(seconds)]


def test_the_fastest_candidate_is_the_one_with_the_least_time() -> None:
    path = timed(10.0, 9.0, 7.0, 8.0, 20.0)
    assert fastest(path) == path[2]


@pytest.mark.parametrize("seconds", [(10.0, 9.9, 9.8), (10.0, 11.0), (10.0,), (0.0, 0.0)])
def test_no_candidate_is_worth_a_try_where_float_promises_too_little(seconds: tuple[float, ...]) -> None:
    assert fastest(timed(*seconds)) is None


def test_the_recipe_of_a_step_keeps_its_groups_and_is_named_after_their_number() -> None:
    recipe = float_recipe(STEP, FloatStep(keep=("a", "c", "b"), noise=0.1, seconds=1.0))
    assert recipe.name == "int8-float3"
    assert recipe.steps == (STEP.model_copy(update={"keep_float": frozenset({"a", "b", "c"})}),)
    assert STEP.keep_float == frozenset()


# The search along the path --------------------------------------------------------------------------------------------


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
    noises = np.random.default_rng(count).exponential(size=count)
    path = path_of([*np.cumsum(np.sort(noises))[::-1].tolist(), 0.0])
    for threshold in range(1, count + 1):
        for allowed in (0.001, 0.01, 0.03):
            search = MixedSearch(STEP, path, 0.04, allowed)
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
        search = MixedSearch(STEP, evenly(30), 0.04, 0.01)
        tried = play(search, threshold, evaluations)
        assert search.too_few < threshold <= search.enough
        assert search.enough in (*tried, 30)


def test_candidates_are_steps_of_the_path() -> None:
    groups, sources, costs = chain(5, 20, 0.003)
    path = float_path(groups, sources, costs)
    assert len(path) > 4
    search = MixedSearch(STEP, path, 0.04, 0.01)
    recipes = [float_recipe(STEP, item) for item in path[1:-1]]
    tried: list[Recipe] = []
    while (recipe := search.next()) is not None:
        tried.append(recipe)
        search.tell(len(kept(recipe)) > 10)
    assert len(tried) > 1
    assert all(recipe in recipes for recipe in tried)


def test_the_first_guess_takes_the_drop_to_grow_with_the_amplitude_of_the_noise() -> None:
    # 16 equal steps: a quarter of the drop needs a sixteenth of the noise, so 15 groups go back to float
    assert play(MixedSearch(STEP, evenly(16), 0.04, 0.01), 99, 1) == [15]
    # half of the drop: a quarter of the noise stays, 12 go back
    assert play(MixedSearch(STEP, evenly(16), 0.04, 0.02), 99, 1) == [12]
    # one group makes nearly all of the noise
    assert play(MixedSearch(STEP, path_of([100.0, *[0.01] * 9, 0.0]), 0.04, 0.01), 99, 1) == [1]


@pytest.mark.parametrize("drop", [-0.01, 0.0, math.nan, math.inf, 0.5])
@pytest.mark.parametrize("allowed", [-0.1, 0.0, 0.01])
def test_odd_drops_still_lead_to_the_boundary(drop: float, allowed: float) -> None:
    search = MixedSearch(STEP, evenly(12), drop, allowed)
    play(search, 5, 50)
    assert search.enough == 5


def test_a_path_with_nothing_between_its_ends_leaves_nothing_to_search() -> None:
    assert MixedSearch(STEP, evenly(1), 0.04, 0.01).next() is None
    assert MixedSearch(STEP, path_of([0.0]), 0.04, 0.01).next() is None
