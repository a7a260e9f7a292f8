"""Percentiles that the sample supports, and intervals for what noise leaves of a difference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = ["Estimate", "bootstrap_median", "drift", "percentile"]

Floats = NDArray[np.float64]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    samples: int


def percentile(values: Floats, q: float, *, worth: float | None = None) -> Estimate | None:
    """Return a percentile with its distribution-free interval, or None where the sample is too small for one.

    The interval's ends are order statistics whose ranks come from the binomial distribution; a percentile is supported
    if both ranks lie inside the sample (6 values for the median, 36 for p90, 368 for p99).

    Args:
        values: The sample.
        q: The percentile, between 0 and 100.
        worth: How many independent values the sample is worth; as many as it has unless given.

    Source: W. J. Conover, "Practical Nonparametric Statistics", 3rd ed., section 3.2.
    """
    ordered, share = np.sort(values), q / 100
    tail = (1 - CONFIDENCE) / 2
    count = len(ordered) if worth is None else int(worth)
    if not count:
        return None
    lower = int(stats.binom.ppf(tail, count, share)) - 1
    upper = int(stats.binom.ppf(1 - tail, count, share))
    if lower < 0 or upper >= count:
        return None
    if count < len(ordered):  # the ranks of the smaller sample, in this one
        lower, upper = lower * len(ordered) // count, -(-(upper + 1) * len(ordered) // count) - 1
    return Estimate(float(np.quantile(ordered, share)), float(ordered[lower]), float(ordered[upper]), len(ordered))


def bootstrap_median(values: Floats, seed: int = 0) -> Estimate:
    """Return the median of a sample with its percentile bootstrap interval."""
    if len(values) < 3 or np.ptp(values) == 0:
        middle = float(np.median(values))
        return Estimate(middle, float(values.min()), float(values.max()), len(values))
    median: Callable[..., Any] = np.median
    found: Any = stats.bootstrap(
        (values,),
        median,
        confidence_level=CONFIDENCE,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(float(np.median(values)), float(found.low), float(found.high), len(values))


def drift(values: Floats) -> float:
    """Return the change of level over a series, as a share of its median; 0 where no trend stands out.

    A trend stands out if Kendall's rank correlation with time differs from 0 at the 1 % level; its size is Theil and
    Sen's slope times the length.
    """
    if len(values) < 8:
        return 0.0
    times = np.arange(len(values), dtype=np.float64)
    trend: Any = stats.kendalltau(times, values)
    if trend.pvalue > 0.01:
        return 0.0
    line: Any = stats.theilslopes(values, times)
    slope = float(line[0])
    return slope * len(values) / float(np.median(values))
