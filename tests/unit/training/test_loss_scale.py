"""Loss scales: growth, back-off, hysteresis, floor and cap, against the rules one by one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.errors import FormatError
from narrowcast.training.loss_scale import DynamicScale, NoScale, ScaleState, StaticScale


def run(rule, outcomes: str) -> list[ScaleState]:
    """Return the states after steps that were good (``.``) or overflowed (``x``)."""
    states = [rule.start()]
    for outcome in outcomes:
        states.append(rule.after(states[-1], outcome == "."))
    return states[1:]


def values(rule, outcomes: str) -> list[float]:
    return [state.value for state in run(rule, outcomes)]


def test_it_grows_after_an_interval_of_good_steps_in_a_row():
    rule = DynamicScale(initial=4, interval=3)
    assert values(rule, "..." + "..." + "..x") == [4, 4, 8, 8, 8, 16, 16, 16, 8]


def test_an_overflow_starts_the_interval_again():
    assert values(DynamicScale(initial=4, interval=3), "..x" + "..." + ".") == [4, 4, 2, 2, 2, 4, 4]


def test_hysteresis_tolerates_overflows_until_it_is_used_up():
    rule = DynamicScale(initial=8, interval=100, hysteresis=3)
    assert values(rule, "x.x.x.x") == [8, 8, 8, 8, 4, 4, 2]


def test_a_whole_interval_restores_hysteresis():
    rule = DynamicScale(initial=8, interval=2, hysteresis=2)
    assert values(rule, "xx" + ".." + "x" + "x") == [8, 4, 4, 8, 8, 4]


def test_it_rests_at_its_floor_and_counts_what_it_cannot_answer():
    rule = DynamicScale(initial=4, floor=2, interval=2)
    states = run(rule, "xxx" + "." + "x")
    assert [state.value for state in states] == [2, 2, 2, 2, 2]
    assert [state.stuck for state in states] == [0, 1, 2, 0, 1]


def test_it_rests_at_its_cap():
    assert values(DynamicScale(initial=4, cap=8, interval=1), "...") == [8, 8, 8]


def test_a_static_scale_stays_and_counts_overflows_in_a_row():
    states = run(StaticScale(1024), "xx.x")
    assert {state.value for state in states} == {1024.0}
    assert [state.stuck for state in states] == [1, 2, 0, 1]


def test_no_scale_is_one_and_guards_nothing():
    assert NoScale().start().value == 1.0
    assert not NoScale().guards
    assert StaticScale(2.0).guards
    assert DynamicScale().guards


@given(st.text(alphabet=".x", max_size=200), st.integers(1, 4), st.integers(1, 3))
def test_it_never_leaves_floor_and_cap(outcomes, interval, hysteresis):
    rule = DynamicScale(initial=16, floor=0.5, cap=64, interval=interval, hysteresis=hysteresis)
    for value in values(rule, outcomes):
        assert 0.5 <= value <= 64
        assert math.log2(value).is_integer()


def test_it_answers_as_pytorchs_own_scaler_where_both_have_the_rule():
    torch = pytest.importorskip("torch")
    rule = DynamicScale(initial=2.0**10, interval=3, floor=2.0**-20)
    outcomes = "..x....xx.......x..x...." * 3
    scale, tracker = torch.tensor(2.0**10), torch.tensor(0, dtype=torch.int32)
    theirs = []
    for outcome in outcomes:
        torch._amp_update_scale_(scale, tracker, torch.tensor(float(outcome == "x")), 2.0, 0.5, 3)
        theirs.append(float(scale))
    assert values(rule, outcomes) == theirs


@pytest.mark.parametrize(
    "settings",
    [
        {"initial": 0.0},
        {"initial": math.inf},
        {"initial": 0.5},
        {"initial": 2.0**30},
        {"growth": 0.5},
        {"growth": math.nan},
        {"backoff": 1.0},
        {"backoff": 0.0},
        {"interval": 0},
        {"hysteresis": 0},
        {"patience": 0},
        {"floor": -1.0},
        {"floor": 8.0, "cap": 4.0, "initial": 8.0},
    ],
    ids=str,
)
def test_it_refuses_what_contradicts_itself(settings):
    with pytest.raises(FormatError, match="loss scale"):
        DynamicScale(**settings)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_static_scale_is_finite_and_positive(value):
    with pytest.raises(FormatError, match="loss scale"):
        StaticScale(value)
