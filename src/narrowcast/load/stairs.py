"""The largest rates at which several servers hold a bound, sought in rounds, so that the machine's moods meet all alike.

Each server has a rate of its own. In a round each is tried at it once; a rate that held the bound is raised, one that missed
it is lowered, by a factor that shrinks with every turn (an up-and-down design). Around the end, tries hold as often as they
miss, and that rate is the answer: where an isotonic fit of "held" against rate crosses one half. Whether a try holds is one
bit, so that a moment in which the machine stood still costs one try and not the answer. Ratios are taken between rates found
from the same rounds, and their intervals come from drawing rounds.

Sources: W. J. Dixon, A. M. Mood, "A Method for Obtaining and Analyzing Sensitivity Data", JASA 43 (1948); G. B. Wetherill,
H. Levitt, "Sequential estimation of points on a psychometric function", Brit. J. Math. Stat. Psychol. 18 (1965) (shrinking
steps); isotonic fit and bootstrap as in `narrowcast.load.search`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from narrowcast.load.search import crossing
from narrowcast.measure.statistics import CONFIDENCE, Estimate

__all__ = ["Compared", "Stair", "Step", "compare_steps"]

Floats = NDArray[np.float64]

#: Factor of the first steps and of the smallest.
_FIRST, _LAST = 2.0, 1.06
_RESAMPLES = 2000


@dataclass(frozen=True)
class Step:
    """One try: its round, requests per second, and whether the bound held."""

    round: int
    rate: float
    held: bool


class Stair:
    """The rate of one server on its way.

    Args:
        rate: To begin with, in requests per second.

    Attributes:
        rate: To try next.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._factor = _FIRST
        self._last: bool | None = None

    def take(self, held: bool) -> None:
        """Take note of how the try at this rate went."""
        if self._last is not None and held != self._last:
            self._factor = max(_LAST, math.sqrt(self._factor))
        self._last = held
        self.rate *= self._factor if held else 1 / self._factor


@dataclass(frozen=True)
class Compared:
    """What rounds say.

    Attributes:
        rates: The largest rate that held the bound, of each server, with its interval.
        ratios: How many times that of each other server the first one's is, with its interval.
    """

    rates: dict[str, Estimate]
    ratios: dict[str, Estimate]


def compare_steps(steps: Mapping[str, Sequence[Step]], seed: int = 0) -> Compared | None:
    """Return the largest rates that held the bound, and their ratios; None where one held it in no try.

    Args:
        steps: Tries by server, the first of which is compared with the others.
        seed: Of the bootstrap.
    """
    if not all(any(step.held for step in mine) for mine in steps.values()):
        return None
    rounds = 1 + max(step.round for mine in steps.values() for step in mine)
    middle = {name: _largest(mine, np.ones(rounds)) for name, mine in steps.items()}
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(_RESAMPLES):
        weights = np.bincount(rng.integers(rounds, size=rounds), minlength=rounds).astype(np.float64)
        for name, mine in steps.items():
            drawn[name].append(_largest(mine, weights))
    first, *others = steps
    curves = {name: np.array(values) for name, values in drawn.items()}
    return Compared(
        {name: _estimate(middle[name], values, len(steps[name])) for name, values in curves.items()},
        {name: _estimate(middle[first] / middle[name], curves[first] / curves[name], rounds) for name in others},
    )


def _largest(steps: Sequence[Step], weights: Floats) -> float:
    """Return the rate at which a try holds as often as not, rounds weighed; one end of the rates where it lies beyond."""
    mine = sorted((step for step in steps if weights[step.round]), key=lambda step: step.rate)
    if not mine:  # no try in any round that was drawn: as if all had been
        mine, weights = sorted(steps, key=lambda step: step.rate), np.ones_like(weights)
    rates = np.array([step.rate for step in mine])
    missed = np.array([float(not step.held) for step in mine])
    found = crossing(rates, missed, np.array([weights[step.round] for step in mine]), 0.5)
    return min(max(found, float(rates[0])), float(rates[-1]))


def _estimate(middle: float, drawn: Floats, samples: int) -> Estimate:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(drawn, (tail, 100 - tail))
    return Estimate(middle, min(float(low), middle), max(float(high), middle), samples)
