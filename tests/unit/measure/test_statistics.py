from __future__ import annotations

import numpy as np
import pytest

from narrowcast.measure.statistics import bootstrap_median, drift, percentile

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("q", "needed"), [(50, 6), (90, 36), (99, 368)])
def test_a_percentile_is_given_only_from_as_many_values_as_support_it(q: float, needed: int) -> None:
    assert percentile(RNG.normal(size=needed - 1), q) is None
    found = percentile(RNG.normal(size=needed), q)
    assert found is not None
    assert found.samples == needed


@pytest.mark.parametrize("q", [50, 90, 99])
def test_a_percentile_lies_inside_its_interval_of_order_statistics(q: float) -> None:
    values = RNG.exponential(size=1000)
    found = percentile(values, q)
    assert found is not None
    assert found.value == pytest.approx(np.percentile(values, q))
    assert found.low < found.value < found.high
    assert {found.low, found.high} <= set(values)


@pytest.mark.parametrize(("q", "size"), [(50, 6), (50, 101), (90, 36), (90, 400), (99, 368)])
def test_percentile_intervals_cover_the_truth_as_often_as_they_say(q: float, size: int) -> None:
    rng, trials = np.random.default_rng(7), 600
    truth = -np.log(1 - q / 100)
    covered = 0
    for _ in range(trials):
        found = percentile(rng.exponential(size=size), q)
        assert found is not None
        covered += found.low <= truth <= found.high
    assert covered / trials > 0.925


def test_the_order_of_values_does_not_matter() -> None:
    values = RNG.normal(size=400)
    assert percentile(values, 99) == percentile(np.sort(values)[::-1], 99)


def test_a_median_has_an_interval_that_narrows_with_the_sample() -> None:
    few, many = (bootstrap_median(RNG.normal(5, 1, size)) for size in (20, 2000))
    for found in (few, many):
        assert found.low <= found.value <= found.high
    assert many.high - many.low < 0.3 * (few.high - few.low)
    assert many.low < 5.1
    assert many.high > 4.9


def test_the_bootstrap_is_repeatable() -> None:
    values = RNG.normal(size=50)
    assert bootstrap_median(values, seed=3) == bootstrap_median(values, seed=3)


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [2.0] * 30])
def test_values_without_spread_have_an_interval_without_width(values: list[float]) -> None:
    found = bootstrap_median(np.array(values))
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


def test_two_values_have_an_interval_from_one_to_the_other() -> None:
    found = bootstrap_median(np.array([1.0, 3.0]))
    assert (found.value, found.low, found.high) == (2.0, 1.0, 3.0)


def test_median_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng, trials = np.random.default_rng(3), 150
    estimates = [bootstrap_median(rng.lognormal(size=30)) for _ in range(trials)]
    assert np.mean([found.low <= 1.0 <= found.high for found in estimates]) > 0.89


@pytest.mark.parametrize("change", [0.3, -0.2])
def test_a_trend_is_reported_as_the_share_of_the_level_that_it_adds(change: float) -> None:
    values = 5 * (1 + np.linspace(0, change, 40)) + 0.02 * RNG.normal(size=40)
    level = np.median(values) / 5
    assert drift(values) == pytest.approx(change / level, abs=0.03)


def test_noise_is_no_trend() -> None:
    rng = np.random.default_rng(1)
    reported = [drift(5 + rng.normal(size=40)) != 0 for _ in range(300)]
    assert np.mean(reported) < 0.03


def test_one_outlier_is_no_trend() -> None:
    values = 5 + 0.01 * RNG.normal(size=30)
    values[-1] = 50
    assert abs(drift(values)) < 0.01


def test_few_values_show_no_trend() -> None:
    assert drift(np.arange(1.0, 8.0)) == 0.0
    assert drift(np.arange(1.0, 9.0)) > 0.5
