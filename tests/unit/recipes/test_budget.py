from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.errors import BudgetError
from narrowcast.recipes.budget import Budget, Drop


@pytest.mark.parametrize(
    ("text", "amount", "relative"),
    [
        ("0.5%", 0.005, True),
        ("0.5pt", 0.005, False),
        ("2pts", 0.02, False),
        ("0.005", 0.005, False),
        ("1e-3", 0.001, False),
        (" 10 % ", 0.1, True),
        ("0", 0.0, False),
        ("0%", 0.0, True),
        (".5%", 0.005, True),
    ],
)
def test_a_drop_is_relative_with_percent_and_absolute_otherwise(text: str, amount: float, relative: bool) -> None:
    found = Drop.parse(text)
    assert found.amount == pytest.approx(amount)
    assert found.relative is relative


@pytest.mark.parametrize(
    "text", ["", "a lot", "-1%", "-0.5pt", "nan", "nan%", "inf", "1e999", "1-2", "5 percent", "1%%"]
)
def test_a_text_that_is_no_drop_is_refused_with_examples(text: str) -> None:
    with pytest.raises(BudgetError, match="max drop") as caught:
        Budget.parse(max_drop=text)
    assert repr(text) in caught.value.what
    assert "0.5%" in caught.value.allowed
    assert "0.5pt" in caught.value.allowed


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5ms", 0.005), ("0.005s", 0.005), ("800us", 0.0008), ("5", 0.005), ("1.5 MS", 0.0015), (".5ms", 0.0005)],
)
def test_latency_is_read_in_its_unit_and_in_milliseconds_without_one(text: str, seconds: float) -> None:
    assert Budget.parse(latency=text).latency == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4MB", 4e6),
        ("3.8MiB", 3.8 * 2**20),
        ("4000000", 4e6),
        ("12kB", 12e3),
        ("1KiB", 1024),
        ("2 GB", 2e9),
        ("1GiB", 2**30),
        ("7b", 7),
        ("1e6", 1e6),
    ],
)
def test_bytes_are_decimal_or_binary_as_their_unit_says(text: str, number: float) -> None:
    assert Budget.parse(size=text).size == pytest.approx(number)
    assert Budget.parse(memory=text).memory == pytest.approx(number)


@pytest.mark.parametrize(("text", "factor"), [("2x", 2.0), ("1.5", 1.5), ("3.4X", 3.4)])
def test_factors_are_read_with_or_without_x(text: str, factor: float) -> None:
    assert Budget.parse(speedup=text).speedup == factor
    assert Budget.parse(ratio=text).ratio == factor


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("latency", "5 minutes"),
        ("latency", "fast"),
        ("latency", "-5ms"),
        ("latency", "0ms"),
        ("latency", "5MB"),
        ("latency", ""),
        ("speedup", "2ms"),
        ("speedup", "0x"),
        ("size", "4 megs"),
        ("size", "0"),
        ("size", "5ms"),
        ("ratio", "half"),
        ("memory", "-1GB"),
        ("size", "1e999MB"),
        ("size", "0.0MB"),
    ],
)
def test_a_quantity_that_cannot_be_read_is_named_with_its_value(name: str, text: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse(**{name: text})
    assert name in caught.value.what
    assert text in caught.value.what or "inf" in caught.value.what
    assert caught.value.allowed
    assert f"--{name} " in caught.value.next_step


@pytest.mark.parametrize(("first", "second"), [("latency", "speedup"), ("size", "ratio"), ("max_drop", "at_least")])
def test_two_limits_on_one_measure_contradict_each_other(first: str, second: str) -> None:
    texts = {
        "latency": "5ms",
        "speedup": "2x",
        "size": "4MB",
        "ratio": "3x",
        "max_drop": "0.5%",
        "at_least": 0.9,
    }
    shown = texts | {"latency": "0.005 s", "size": "4e+06 bytes", "max_drop": "0.5% of the original"}
    with pytest.raises(BudgetError) as caught:
        Budget.parse(**{first: texts[first], second: texts[second]})
    assert f"both {first} {shown[first]} and {second} {shown[second]}" in caught.value.what
    assert f"--{first.replace('_', '-')}" in caught.value.next_step


def test_an_unknown_objective_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BudgetError, match="'speed' is unknown") as caught:
        Budget.parse(minimise="speed")
    assert caught.value.allowed == "latency, size, memory"


@pytest.mark.parametrize("name", ["latency", "speedup", "size", "ratio", "memory"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_limits_built_in_python_are_checked_too(name: str, value: float) -> None:
    with pytest.raises(BudgetError, match=name):
        Budget(**{name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bound_on_the_metric_must_be_finite(value: float) -> None:
    with pytest.raises(BudgetError, match=r"at_least|at least"):
        Budget(at_least=value)


def test_a_relative_drop_is_a_share_of_the_original_and_an_absolute_one_is_not() -> None:
    def bound(text: str) -> float:
        budget = Budget.parse(max_drop=text)
        (limit,) = budget.limits(metric="top1", higher_is_better=True, accuracy=0.8, size=100)
        assert limit.measure == "accuracy"
        assert limit.at_least
        return limit.bound

    assert bound("1%") == pytest.approx(0.792)
    assert bound("1pt") == pytest.approx(0.79)
    assert bound("0.01") == pytest.approx(0.79)


def test_a_drop_of_an_error_bounds_it_from_above() -> None:
    budget = Budget.parse(max_drop="10%")
    (limit,) = budget.limits(metric="mse", higher_is_better=False, accuracy=2.0, size=100)
    assert limit.bound == pytest.approx(2.2)
    assert limit.holds(2.2)
    assert not limit.holds(2.3)


@pytest.mark.parametrize("accuracy", [math.inf, 0.0])
def test_a_relative_drop_of_nothing_is_refused_with_the_way_out(accuracy: float) -> None:
    budget = Budget.parse(max_drop="1%")
    with pytest.raises(BudgetError, match="sqnr") as caught:
        budget.limits(metric="sqnr", higher_is_better=True, accuracy=accuracy, size=100)
    assert "--at-least" in caught.value.next_step


def test_an_error_that_the_original_has_none_of_is_bounded_from_above() -> None:
    with pytest.raises(BudgetError, match="mse, which is 0") as caught:
        Budget.parse(max_drop="1%").limits(metric="mse", higher_is_better=False, accuracy=0.0, size=100)
    assert "the largest mse that may be" in caught.value.next_step
    assert "SQNR" not in caught.value.next_step


def test_an_absolute_drop_of_an_infinite_metric_is_refused() -> None:
    """SQNR of the original with itself is infinite, so every artifact would break (or keep) any such limit."""
    budget = Budget.parse(max_drop="3")
    with pytest.raises(BudgetError, match="sqnr"):
        budget.limits(metric="sqnr", higher_is_better=True, accuracy=math.inf, size=100)


def test_each_limit_bounds_its_measure_in_the_unit_that_is_measured() -> None:
    budget = Budget.parse(at_least=30, latency="5ms", ratio="4x", memory="300MB")
    limits = {
        limit.measure: limit
        for limit in budget.limits(metric="sqnr", higher_is_better=True, accuracy=math.inf, size=1000)
    }
    assert limits.keys() == {"accuracy", "latency", "size", "memory"}
    assert limits["accuracy"].holds(30)
    assert not limits["accuracy"].holds(29.9)
    assert limits["latency"].holds(0.005)
    assert not limits["latency"].holds(0.0051)
    assert limits["size"].bound == 250
    assert limits["memory"].holds(3e8)
    (limit,) = Budget.parse(speedup="2x").limits(metric="top1", higher_is_better=True, accuracy=1, size=1)
    assert (limit.measure, limit.bound, limit.at_least) == ("speedup", 2.0, True)


def test_a_value_that_could_not_be_measured_keeps_no_limit() -> None:
    for limit in Budget.parse(at_least=0.5, latency="5ms").limits(
        metric="top1", higher_is_better=True, accuracy=1.0, size=1
    ):
        assert not limit.holds(math.nan)


def test_a_budget_without_limits_bounds_nothing() -> None:
    assert Budget().limits(metric="top1", higher_is_better=True, accuracy=0.9, size=100) == ()
    assert Budget().minimise == "latency"


@given(amount=st.floats(0, 50), relative=st.booleans(), accuracy=st.floats(0.01, 1), higher_is_better=st.booleans())
def test_the_original_always_keeps_a_limit_on_its_own_drop(
    amount: float, relative: bool, accuracy: float, higher_is_better: bool
) -> None:
    budget = Budget(max_drop=Drop(amount=amount / 100, relative=relative))
    (limit,) = budget.limits(metric="m", higher_is_better=higher_is_better, accuracy=accuracy, size=1)
    assert limit.holds(accuracy)


@given(value=st.floats(1e-3, 1e6, allow_nan=False))
def test_a_budget_survives_json(value: float) -> None:
    budget = Budget(latency=value, ratio=value, max_drop=Drop(amount=value, relative=True), minimise="size")
    assert Budget.model_validate_json(budget.model_dump_json()) == budget
