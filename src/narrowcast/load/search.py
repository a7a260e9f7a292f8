"""The largest rate at which a bound on latency holds, sought among measurements that are noisy.

A rate is tried until the interval of the share of missed requests lies on one side of what the bound allows, or the tries for
one rate are used up. Rates double until the bound is missed, then the gap is halved on a log scale until it is narrow, and the
answer is tried again with other arrivals before it is given. All tries together, each weighed by its requests, then make a
curve of missed share against rate that may only rise (isotonic regression); where it crosses what is allowed is the estimate,
and resampling the stretches of each try gives its interval.

Sources: R. E. Barlow, D. J. Bartholomew, J. M. Bremner, H. D. Brunk, "Statistical Inference under Order Restrictions", 1972,
chapter 1; B. Efron, R. J. Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 8 (blocks).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from narrowcast.measure.load.estimates import share
from narrowcast.measure.load.values import Probe
from narrowcast.measure.statistics import CONFIDENCE, Estimate

__all__ = ["Found", "Rules", "Trial", "crossing", "find_largest", "verdict"]

Floats = NDArray[np.float64]

_RESAMPLES = 1000
#: Doublings or halvings from the first rate at most.
_STEPS = 14


@dataclass(frozen=True)
class Trial:
    """One run at one rate.

    Attributes:
        missed: For each request that was due, in order, 1 if it missed the bound, else 0.
        void: Whether the client failed, so that the run says nothing of the server.
        ended: Whether it was ended early because it had missed the bound for certain.
    """

    missed: Floats
    void: bool
    ended: bool = False


@dataclass(frozen=True)
class Rules:
    """How the search decides.

    Attributes:
        allowed: Share of requests that may miss the bound.
        tolerance: The search ends when the rates that hold and miss are this near, as a share.
        tries: Runs at one rate at most, before chance decides.
        confirmations: Runs that are added at the rate that is found.
    """

    allowed: float
    tolerance: float = 0.05
    tries: int = 3
    confirmations: int = 2


@dataclass(frozen=True)
class Found:
    """What the search found.

    Attributes:
        probes: All tries in their order.
        largest: Where missed requests cross what is allowed; None if the bound was missed, or held, at every rate.
        confirmed: The largest rate at which it was confirmed that the bound holds.
        limit: Rate at which the client failed, which ended the search upwards; None if it never did.
    """

    probes: tuple[Probe, ...]
    largest: Estimate | None
    confirmed: float | None
    limit: float | None


def find_largest(
    run: Callable[[float, int], Trial], first: float, rules: Rules, seed: int = 0, probes: list[Probe] | None = None
) -> Found:
    """Return the largest rate that holds the bound.

    Args:
        run: From requests per second and a seed to what became of them.
        first: Rate to begin with.
        rules: How to decide.
        seed: Seeds of runs count from here.
        probes: Tries are added here as they are made, so that they are there when the search is interrupted.
    """
    search = _Search(run, rules, seed, probes=[] if probes is None else probes)
    low, high = search.bracket(first)
    while low is not None:
        while high is not None and high / low > 1 + rules.tolerance:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if search.holds(middle) else (low, middle)
        if search.confirmed(low):
            break
        low, high = search.below(low), low
    return Found(tuple(search.probes), search.crossing(), low, search.limit)


@dataclass
class _Search:
    """The tries so far.

    Attributes:
        run: From a rate and a seed to a trial.
        rules: How to decide.
        seed: Of the next run.
        trials: What was seen of each rate, void runs left out.
        probes: All tries in their order.
        limit: The smallest rate at which the client failed.
    """

    run: Callable[[float, int], Trial]
    rules: Rules
    seed: int
    trials: dict[float, list[Trial]] = field(default_factory=dict[float, list[Trial]])
    probes: list[Probe] = field(default_factory=list[Probe])
    limit: float | None = None

    def bracket(self, first: float) -> tuple[float | None, float | None]:
        """Return a rate that holds the bound and a larger one that does not; None for what is not found."""
        low: float | None = None
        high: float | None = None
        rate = first
        for _ in range(_STEPS):
            if self.holds(rate):
                low = rate
            else:
                high = rate
            if low is not None and high is not None:
                break
            rate = rate / 2 if low is None else rate * 2
        return low, high

    def holds(self, rate: float) -> bool:
        """Try a rate until it is clear whether the bound holds, or the tries are used up."""
        for _ in range(self.rules.tries):
            if not self._try(rate, confirming=False):
                self.limit = min(rate, self.limit or math.inf)
                return False
            held, clear = self.decide(rate)
            if clear:
                return held
        return self.decide(rate)[0]

    def confirmed(self, rate: float) -> bool:
        """Try a rate again, and say whether the bound holds over all its tries."""
        for _ in range(self.rules.confirmations):
            if not self._try(rate, confirming=True):
                return False
            held, clear = self.decide(rate)
            if clear and not held:
                return False
        return self.decide(rate)[0]

    def below(self, rate: float) -> float | None:
        """Return the next lower rate at which the bound holds, as far as was tried; None where it holds nowhere."""
        known = [lower for lower in self.trials if lower < rate and self.decide(lower)[0]]
        if known:
            return max(known)
        for _ in range(_STEPS):
            rate /= 1 + self.rules.tolerance
            if self.holds(rate):
                return rate
        return None

    def decide(self, rate: float) -> tuple[bool, bool]:
        """Return whether the bound holds over all tries of a rate, and whether that is clear."""
        trials = self.trials[rate]
        if any(trial.ended for trial in trials):
            return False, True
        found = share(np.concatenate([trial.missed for trial in trials]))
        held = found.value <= self.rules.allowed
        return held, found.high <= self.rules.allowed or found.low > self.rules.allowed

    def _try(self, rate: float, *, confirming: bool) -> bool:
        """Run once, and once more where the client failed; return whether it did not fail."""
        for _ in range(2):
            trial = self.run(rate, self.seed)
            self.seed += 1
            if not len(trial.missed):  # nothing that counts came to an end
                trial = replace(trial, missed=np.ones(1))
            found = share(trial.missed)
            self.probes.append(
                Probe(
                    rate=rate,
                    requests=len(trial.missed),
                    missed=found,
                    verdict="void" if trial.void else verdict(found, self.rules.allowed, ended=trial.ended),
                    confirming=confirming,
                )
            )
            if not trial.void:
                self.trials.setdefault(rate, []).append(trial)
                return True
        return False

    def crossing(self) -> Estimate | None:
        """Return the rate at which the missed share crosses what is allowed, with its interval."""
        rates = np.array(sorted(self.trials))
        if len(rates) < 2:
            return None
        series = [np.concatenate([trial.missed for trial in self.trials[rate]]) for rate in rates]
        blocks = [_blocks(values) for values in series]
        weights = np.array([len(values) for values in series], np.float64)
        middle = crossing(rates, np.array([values.mean() for values in series]), weights, self.rules.allowed)
        if not 0 < middle < math.inf:
            return None
        rng = np.random.default_rng(0)
        drawn = [
            crossing(
                rates, np.array([rng.choice(part, len(part)).mean() for part in blocks]), weights, self.rules.allowed
            )
            for _ in range(_RESAMPLES)
        ]
        tail = 100 * (1 - CONFIDENCE) / 2
        # A curve that does not cross within the rates crosses beyond one of their ends: that end is as far as they know.
        low, high = np.percentile(np.clip(drawn, rates[0], rates[-1]), (tail, 100 - tail))
        return Estimate(middle, min(float(low), middle), max(float(high), middle), int(weights.sum()))


def _blocks(values: Floats) -> Floats:
    """Return the means of stretches of a series."""
    return np.array([part.mean() for part in np.array_split(values, max(1, min(30, len(values) // 10)))])


def verdict(missed: Estimate, allowed: float, *, ended: bool) -> Literal["held", "missed", "unclear"]:
    """Return whether a bound held in one try.

    Args:
        missed: Share of the requests that missed it.
        allowed: Share that may.
        ended: Whether the try was ended early, because it had missed the bound for certain.
    """
    if ended or missed.low > allowed:
        return "missed"
    return "held" if missed.high <= allowed else "unclear"


def crossing(rates: Floats, missed: Floats, weights: Floats, allowed: float) -> float:
    """Return where a curve that may only rise crosses a level, on a log scale of rates.

    Above the level everywhere it crosses at 0, below it everywhere at infinity.
    """
    rising: Any = optimize.isotonic_regression(missed, weights=weights)
    curve: Floats = rising.x
    above = np.flatnonzero(curve > allowed)
    if not len(above):
        return math.inf
    if above[0] == 0:
        return 0.0
    right = int(above[0])
    step = float(curve[right] - curve[right - 1])
    way = (allowed - float(curve[right - 1])) / step
    low, high = math.log(rates[right - 1]), math.log(rates[right])
    return math.exp(low + way * (high - low))
