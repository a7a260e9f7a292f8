"""Intervals under dependence, against queues whose distribution is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from narrowcast.measure.load.estimates import inflation, mean, quantile, share
from narrowcast.measure.statistics import percentile

Floats = NDArray[np.float64]


def queue(load: float, size: int, rng: np.random.Generator) -> Floats:
    """Return the sojourn times of M/M/1 in its steady state, by Lindley's recursion; the mean service takes 1."""
    gaps, services = rng.exponential(1 / load, size).tolist(), rng.exponential(1.0, size).tolist()
    waiting = float(rng.exponential(1 / (1 - load))) if rng.random() < load else 0.0
    times: list[float] = []
    for gap, service in zip(gaps, services, strict=True):
        times.append(waiting + service)
        waiting = max(0.0, waiting + service - gap)
    return np.array(times)


def test_intervals_hold_the_truth_as_often_as_they_say_though_requests_wait_for_each_other() -> None:
    load, runs = 0.7, 60
    truth = -math.log(0.5) / (1 - load), 1 / (1 - load)  # sojourn times are exponential with rate 1 - load
    hits = np.zeros(3)
    rng = np.random.default_rng(0)
    for _ in range(runs):
        times = queue(load, 6000, rng)
        median, middle, naive = quantile(times, 50), mean(times), percentile(times, 50)
        assert median is not None
        assert middle is not None
        assert naive is not None
        hits += [
            median.low <= truth[0] <= median.high,
            middle.low <= truth[1] <= middle.high,
            naive.low <= truth[0] <= naive.high,
        ]
    # 60 runs at 95 % give at least 52 hits with a probability of 99 %.
    assert hits[0] >= 51
    assert hits[1] >= 49  # the mean of a skewed sample converges more slowly
    assert hits[2] < 45  # intervals for independent values are far too narrow


def test_independent_values_are_worth_what_they_are() -> None:
    values = np.random.default_rng(1).exponential(1.0, 20_000)
    assert inflation(values) < 2
    assert inflation(np.repeat(values[:2000], 10)) > 4
    assert inflation(np.ones(100)) == 1


def test_a_percentile_that_the_sample_does_not_support_is_none() -> None:
    rng = np.random.default_rng(2)
    assert quantile(rng.exponential(1.0, 300), 99) is None
    assert quantile(rng.exponential(1.0, 3000), 99) is not None
    assert quantile(np.empty(0), 50) is None
    slow = np.repeat(rng.exponential(1.0, 60), 50)  # 3,000 values, but worth about 60
    assert quantile(slow, 99) is None


@pytest.mark.parametrize(("ones", "size"), [(0, 100), (3, 100), (100, 100), (0, 1)])
def test_a_share_has_an_interval_even_where_all_are_alike(ones: int, size: int) -> None:
    values = np.zeros(size)
    values[np.linspace(0, size - 1, ones).astype(int)] = 1
    found = share(values)
    assert found.value == pytest.approx(ones / size)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.high - found.low > 0.02


def test_nothing_is_known_of_nothing() -> None:
    assert (share(np.empty(0)).low, share(np.empty(0)).high) == (0.0, 1.0)
    assert mean(np.ones(12)) is None
