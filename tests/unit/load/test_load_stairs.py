"""The up-and-down design against servers whose largest rates are planted."""

from __future__ import annotations

import math

import numpy as np
import pytest

from narrowcast.load.stairs import Compared, Stair, Step, compare_steps


def climbed(largest: dict[str, float], rounds: int, seed: int = 0, *, stalls: frozenset[int] = frozenset()) -> Compared:
    """Return what rounds say of servers that hold up to a rate, more or less; in some rounds the machine stands still."""
    rng = np.random.default_rng(seed)
    stairs = {name: Stair(rate / 3) for name, rate in largest.items()}
    steps: dict[str, list[Step]] = {name: [] for name in largest}
    for number in range(rounds):
        mood = rng.normal(0, 0.1)  # of the machine, the same for all of a round
        for name, stair in stairs.items():
            noise = mood + rng.normal(0, 0.03)
            held = math.log(stair.rate) <= math.log(largest[name]) + noise and number not in stalls
            steps[name].append(Step(number, stair.rate, held))
            stair.take(held)
    found = compare_steps(steps)
    assert found is not None
    return found


@pytest.mark.parametrize("seed", range(5))
def test_ratios_are_found_though_the_machine_has_moods(seed: int) -> None:
    found = climbed({"dynamic": 400.0, "static": 320.0, "none": 80.0}, 12, seed)
    assert found.rates["none"].value == pytest.approx(80, rel=0.2)
    assert found.ratios["none"].value == pytest.approx(5, rel=0.2)
    assert list(found.ratios) == ["static", "none"]
    for one in (*found.rates.values(), *found.ratios.values()):
        assert one.low <= one.value <= one.high


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    hits = [
        found.low <= 5 <= found.high
        for seed in range(25)
        for found in [climbed({"dynamic": 400.0, "none": 80.0}, 12, 100 + seed).ratios["none"]]
    ]
    assert np.mean(hits) >= 0.8


def test_a_round_in_which_the_machine_stood_still_costs_that_round_alone() -> None:
    found = climbed({"dynamic": 400.0, "none": 80.0}, 12, 3, stalls=frozenset({6}))
    assert found.ratios["none"].value == pytest.approx(5, rel=0.25)


def test_a_server_that_never_holds_is_not_compared() -> None:
    held, missed = Step(0, 10.0, True), Step(0, 10.0, False)
    assert compare_steps({"dynamic": [held], "none": [missed]}) is None


def test_steps_shrink_at_each_turn() -> None:
    stair = Stair(100.0)
    rates = []
    for held in (True, False, True, False, True, False, True):
        stair.take(held)
        rates.append(stair.rate)
    changes = np.abs(np.diff(np.log([100.0, *rates])))
    assert changes[0] == pytest.approx(math.log(2))
    assert (np.diff(changes) <= 1e-9).all()
    assert changes[-1] == pytest.approx(math.log(1.06))
