from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy.stats import norm

from narrowcast.transforms.ranges import METHODS, Quantizer, TensorStatistics, quantizer_of

RNG = np.random.default_rng(0)
methods = pytest.mark.parametrize("method", sorted(METHODS))


def statistics(*batches: NDArray[Any]) -> TensorStatistics:
    found = TensorStatistics()
    for batch in batches:
        found.update(batch.astype(np.float32))
    return found


def error(values: NDArray[Any], low: float, high: float) -> float:
    values = values.astype(np.float32)
    return float(((quantizer_of(low, high, False, "x").apply(values) - values) ** 2).mean())


# Quantizer ------------------------------------------------------------------------------------------------------------

magnitudes = st.floats(2.0**-60, 1e6, width=32)
ends = st.just(0.0) | magnitudes | magnitudes.map(lambda value: -value)
floats32 = hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-1e7, 1e7, width=32))


@st.composite
def quantizers(draw: st.DrawFn) -> Quantizer:
    low, high = sorted((draw(ends), draw(ends)))
    return quantizer_of(low, high, draw(st.booleans()), "test")


@given(quantizers(), floats32)
def test_applying_a_quantizer_twice_changes_nothing_more(quantizer: Quantizer, values: NDArray[Any]) -> None:
    once = quantizer.apply(values)
    np.testing.assert_array_equal(quantizer.apply(once), once)
    assert once.dtype == np.float32


@given(quantizers())
def test_zero_is_exact(quantizer: Quantizer) -> None:
    assert quantizer.apply(np.zeros(1, np.float32))[0] == 0.0
    assert quantizer.lowest <= quantizer.zero_point <= quantizer.lowest + 255


@given(quantizers(), st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_the_error_inside_the_range_is_at_most_half_a_step(quantizer: Quantizer, shares: list[float]) -> None:
    values = (quantizer.low + np.array(shares) * (quantizer.high - quantizer.low)).astype(np.float32)
    worst = np.abs(quantizer.apply(values).astype(np.float64) - values).max()
    assert worst <= quantizer.scale * 0.5 * (1 + 1e-3)


@given(quantizers(), floats32)
def test_values_outside_saturate_at_the_ends(quantizer: Quantizer, values: NDArray[Any]) -> None:
    seen = quantizer.apply(values).astype(np.float64)
    slack = 1e-5 * max(abs(quantizer.low), abs(quantizer.high))
    assert seen.min() >= quantizer.low - slack
    assert seen.max() <= quantizer.high + slack


@given(low=ends, high=ends, signed=st.booleans())
def test_a_quantizer_covers_its_range_to_within_half_a_step(low: float, high: float, signed: bool) -> None:
    low, high = sorted((low, high))
    quantizer = quantizer_of(low, high, signed, "test")
    assert quantizer.low <= min(low, 0) + 0.5001 * quantizer.scale
    assert quantizer.high >= max(high, 0) - 0.5001 * quantizer.scale
    assert quantizer.dtype == (np.int8 if signed else np.uint8)
    assert np.float32(quantizer.scale) == quantizer.scale


@given(quantizers(), floats32)
def test_a_quantizer_says_what_onnx_says(quantizer: Quantizer, values: NDArray[Any]) -> None:
    """QuantizeLinear divides by the scale and saturates (ONNX operator specification, opset 13)."""
    scale = np.float32(quantizer.scale)
    codes = np.clip(np.rint(values / scale) + quantizer.zero_point, quantizer.lowest, quantizer.lowest + 255)
    expected = (codes - quantizer.zero_point) * np.float64(scale)
    actual = quantizer.apply(values)
    # one multiplication by the reciprocal may fall on the other side of a tie
    assert np.abs(actual - expected).max() <= scale * 1.001
    assert np.mean(np.abs(actual - expected) > scale * 1e-3) <= 1 / 2


def test_signed_and_unsigned_codes_stand_for_the_same_values() -> None:
    values = RNG.normal(size=1000).astype(np.float32)
    one, other = (quantizer_of(-3, 4, signed, "x") for signed in (False, True))
    np.testing.assert_array_equal(one.apply(values), other.apply(values))


@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-42, 1e30])
def test_a_tensor_of_one_value_can_be_quantised(value: float) -> None:
    values = np.full((2, 3), value, np.float32)
    stats = statistics(values)
    for method, find in METHODS.items():
        seen = quantizer_of(*find(stats), False, method).apply(values)
        np.testing.assert_allclose(seen, values, rtol=0.01, atol=1e-30)


# Statistics -----------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10_000), count=st.integers(2, 8))
def test_statistics_do_not_depend_on_the_order_of_the_batches(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    # values on a grid, so that which bin they belong to is no question of rounding
    batches = [np.round(rng.normal(size=200) * 2.0 ** rng.integers(0, 9) * 8) / 8 + 1 / 16 for _ in range(count)]
    first = statistics(*batches)
    for order in (rng.permutation(count), np.arange(count)[::-1]):
        other = statistics(*(batches[i] for i in order))
        assert (other.low, other.high, other.reach) == (first.low, first.high, first.reach)
        np.testing.assert_array_equal(other.counts, first.counts)


def test_a_largest_value_at_the_very_end_of_the_histogram_does_not_depend_on_the_order_either() -> None:
    one, other = np.full(10, 4.0), np.full(10, 100.0)
    np.testing.assert_array_equal(statistics(one, other).counts, statistics(other, one).counts)


def test_order_moves_hardly_any_value_to_another_bin() -> None:
    batches = [RNG.normal(size=5000) * scale for scale in (0.01, 1, 30, 900)]
    one, other = statistics(*batches), statistics(*batches[::-1])
    assert np.abs(one.counts - other.counts).sum() <= 0.002 * one.counts.sum()
    for method in METHODS.values():
        np.testing.assert_allclose(method(one), method(other), rtol=0.02)


def test_every_value_is_counted_and_memory_does_not_grow() -> None:
    stats = statistics(*(RNG.normal(size=(4, 50)) * scale for scale in (1, 100, 0.1, 10_000)))
    assert stats.counts.sum() == 4 * 200
    assert len(stats.counts) == len(statistics(np.ones(1)).counts)
    assert stats.reach >= max(abs(stats.low), abs(stats.high))


def test_a_histogram_is_numpys_histogram() -> None:
    values = RNG.normal(size=4000).astype(np.float32)
    stats = statistics(values[:100], values[100:])
    expected, _ = np.histogram(values, len(stats.counts), (-stats.reach, stats.reach))
    assert np.abs(stats.counts - expected).sum() <= 4


@pytest.mark.parametrize(("shape", "axis"), [((6, 5, 3, 4), 1), ((6, 7, 5), -1), ((6, 5), -1), ((6, 5, 7), 1)])
def test_channel_extremes_are_those_of_each_channel(shape: tuple[int, ...], axis: int) -> None:
    batches = [RNG.normal(size=shape).astype(np.float32) for _ in range(3)]
    stats = TensorStatistics()
    for batch in batches:
        stats.update(batch, channel_axis=axis)
    together = np.moveaxis(np.concatenate(batches), axis, 0).reshape(shape[axis], -1)
    np.testing.assert_array_equal(stats.channel_low, together.min(1))
    np.testing.assert_array_equal(stats.channel_high, together.max(1))
    assert stats.low == together.min()
    assert stats.high == together.max()


def test_a_batch_without_values_changes_nothing() -> None:
    stats = statistics(np.array([1.0, 2.0]), np.zeros((0, 3)))
    assert (stats.low, stats.high, stats.counts.sum()) == (1.0, 2.0, 2)


# Methods --------------------------------------------------------------------------------------------------------------


def test_minmax_is_exact() -> None:
    values = RNG.normal(size=1000).astype(np.float32)
    assert METHODS["minmax"](statistics(values)) == (values.min(), values.max())


@methods
def test_a_uniform_distribution_keeps_nearly_all_of_its_range(method: str) -> None:
    low, high = METHODS[method](statistics(RNG.uniform(-1, 1, 100_000)))
    assert -1 <= low <= -0.93
    assert 0.93 <= high <= 1


def test_percentile_finds_the_quantiles_of_a_normal_distribution() -> None:
    low, high = METHODS["percentile"](statistics(*np.split(RNG.normal(size=1_000_000), 5)))
    wanted = norm.ppf(1 - 0.5e-4)
    assert high == pytest.approx(wanted, rel=0.05)
    assert low == pytest.approx(-wanted, rel=0.05)


@methods
def test_no_method_leaves_the_extremes(method: str) -> None:
    for values in (RNG.normal(size=5000), RNG.exponential(size=5000), -RNG.exponential(size=5000), np.ones(9)):
        low, high = METHODS[method](statistics(values))
        values = values.astype(np.float32)
        assert min(low, 0) >= min(values.min(), 0) - 1e-6
        assert max(high, 0) <= max(values.max(), 0) + 1e-6
        assert high - low >= -1e-3 * abs(high)


@methods
def test_what_a_relu_let_through_starts_at_zero(method: str) -> None:
    low, high = METHODS[method](statistics(np.maximum(RNG.normal(size=50_000), 0)))
    assert quantizer_of(low, high, False, method).low == 0.0
    assert high > 1.5


@methods
def test_one_outlier_is_cut_by_every_method_but_minmax(method: str) -> None:
    values = np.append(RNG.normal(size=200_000), 60.0)
    _, high = METHODS[method](statistics(values))
    # least squared error gives up some of the outlier, the others all of it
    assert (high == 60.0) if method == "minmax" else (high < {"mse": 55}.get(method, 40))


@pytest.mark.parametrize("name", ["normal", "laplace", "exponential", "outliers"])
def test_mse_has_the_least_squared_error_of_all_methods(name: str) -> None:
    draws = {
        "normal": RNG.normal(size=100_000),
        "laplace": RNG.laplace(size=100_000),
        "exponential": RNG.exponential(size=100_000),
        "outliers": np.append(RNG.normal(size=100_000), [80.0, -50.0]),
    }
    values = draws[name]
    stats = statistics(values)
    errors = {method: error(values, *find(stats)) for method, find in METHODS.items()}
    assert errors["mse"] <= 1.02 * min(errors.values())
    if name != "normal":
        assert errors["mse"] < 0.9 * errors["minmax"]


def test_entropy_cuts_a_long_thin_tail_and_keeps_the_body() -> None:
    values = np.concatenate([RNG.normal(size=300_000), RNG.uniform(10, 40, 30)])
    low, high = METHODS["entropy"](statistics(values))
    assert high < 30
    assert high > 2.5
    assert low < -2.5


def test_extremes_of_other_samples_are_covered_without_touching_what_was_counted() -> None:
    values = RNG.normal(size=(4, 3, 5, 5)).astype(np.float32)
    seen = TensorStatistics()
    seen.update(values, channel_axis=1)
    centres = seen.centres()
    mean = float(seen.counts @ centres / seen.counts.sum())
    low, high = np.array([-9.0, -1.0, -2.0]), np.array([1.0, 40.0, 3.0])
    seen.cover(low, high)
    assert METHODS["minmax"](seen) == (-9.0, 40.0)
    assert seen.reach > 40
    assert seen.counts.sum() == values.size
    assert float(seen.counts @ seen.centres() / seen.counts.sum()) == pytest.approx(mean, abs=2 * seen.reach / 8192)
