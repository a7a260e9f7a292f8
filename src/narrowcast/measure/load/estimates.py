"""Estimates from latencies of one server, which are not independent: a request that waits makes the next one wait.

Source: batch means, A. M. Law, "Simulation Modeling and Analysis", 5th ed., section 9.5.3: a series is cut into blocks that
are long beside the time over which neighbours resemble each other; how much the blocks' means differ says what the whole
series is worth.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from narrowcast.measure.statistics import CONFIDENCE, Estimate, percentile

__all__ = ["BLOCKS", "block_means", "inflation", "mean", "quantile", "share", "worth"]

Floats = NDArray[np.float64]

#: Blocks that a series is cut into; with so many, Student's t is near the normal distribution.
BLOCKS = 30
#: Values of a block at the least.
_SHORTEST = 10


def block_means(values: Floats, blocks: int = BLOCKS) -> Floats:
    """Return the means of equally long blocks of a series; fewer than asked for where it is short.

    Args:
        values: In the order of time, shape [n].
        blocks: How many at most.
    """
    count = min(blocks, len(values) // _SHORTEST)
    length = len(values) // count if count else 0
    return values[: count * length].reshape(count, length).mean(axis=1) if count else np.empty(0)


def inflation(values: Floats) -> float:
    """Return by what factor the variance of a series' mean exceeds that of independent values; 1 at the least."""
    means = block_means(values)
    variance = float(values.var())
    if len(means) < 2 or variance == 0:
        return 1.0
    return max(1.0, float(means.var(ddof=1)) * (len(values) // len(means)) / variance)


def mean(values: Floats) -> Estimate | None:
    """Return the mean of a series with its interval from batch means; None where there are fewer than two blocks."""
    means = block_means(values)
    if len(means) < 2:
        return None
    middle = float(values.mean())
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(means) - 1) * means.std(ddof=1)) / math.sqrt(len(means))
    return Estimate(middle, middle - half, middle + half, len(values))


def share(values: Floats) -> Estimate:
    """Return the share of ones in a series of ones and zeros, with its interval; of an empty series nothing is known.

    The interval is that of Clopper and Pearson for as many independent values as the series is worth, so that a series without
    a one does not claim that there are none.
    """
    if not len(values):
        return Estimate(0.0, 0.0, 1.0, 0)
    found = float(values.mean())
    count = len(values) / inflation(values)
    ones, tail = found * count, (1 - CONFIDENCE) / 2
    low = float(stats.beta.ppf(tail, ones, count - ones + 1)) if ones else 0.0
    high = float(stats.beta.ppf(1 - tail, ones + 1, count - ones)) if found < 1 else 1.0
    return Estimate(found, low, high, len(values))


def quantile(values: Floats, q: float) -> Estimate | None:
    """Return a percentile of a series with its interval, or None where the series does not support one.

    The interval is that of order statistics for as many independent values as the series is worth.

    Args:
        values: In the order of time, shape [n].
        q: Between 0 and 100.
    """
    return percentile(values, q, worth=worth(values, q)) if len(values) else None


def worth(values: Floats, q: float) -> float:
    """Return how many independent values a series is worth for one of its percentiles.

    Args:
        values: In the order of time, shape [n], at least one.
        q: Between 0 and 100.
    """
    level = np.quantile(values, q / 100)
    below = ((values < level).astype(np.float64) + (values <= level)) / 2  # where many are equal, in the middle of them
    return len(values) / inflation(below)
