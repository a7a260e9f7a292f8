"""Codes of a codebook: the nearest of a few values, or the neighbour that another rounding asks for."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

import numpy as np

from narrowcast.formats import bits
from narrowcast.formats.engine import engine
from narrowcast.formats.kinds import Codebook
from narrowcast.formats.rules import Rounding, Rules

__all__ = ["codebook_codes", "codebook_edges", "few"]


def few(format: Codebook) -> bool:
    """Return whether counting the edges below a number is the quick way to its code."""
    return len(format.values) <= 32


@lru_cache(maxsize=64)
def codebook_edges(format: Codebook, dtype: str) -> np.ndarray:
    """Return the numbers above which a code is the next one: midpoints, rounded down to ``dtype``, shape [n - 1].

    A number of that dtype is above the midpoint exactly if it is above the midpoint rounded down.
    """
    exact = _midpoints(format)
    with np.errstate(over="ignore"):
        edges = np.array([float(middle) for middle in exact]).astype(dtype)
    above = [float(edge) > middle for edge, middle in zip(edges, exact, strict=True)]
    return np.where(above, np.nextafter(edges, edges.dtype.type(-np.inf)), edges)


def _midpoints(format: Codebook) -> list[Fraction]:
    values = [Fraction(value) for value in format.values]
    return [(low + high) / 2 for low, high in pairwise(values)]


@lru_cache(maxsize=64)
def _codebook_ties(format: Codebook) -> np.ndarray:
    """Return the midpoints that are float64 numbers, NaN in the place of the others: shape [n - 1]."""
    return np.array([float(middle) if Fraction(float(middle)) == middle else math.nan for middle in _midpoints(format)])


def codebook_codes(x: np.ndarray, format: Codebook, rules: Rules, start: int, seed: int) -> np.ndarray:
    """Return the codes of numbers: shape [n]."""
    if x.dtype == np.float16:  # which compiled loops do not compute with
        x = x.astype(np.float32)
    if rules.rounding is Rounding.NEAREST_EVEN and few(format):
        codes = np.empty(x.shape, np.uint8)
        engine().codes_above(x, codebook_edges(format, x.dtype.name), codes)
        return codes
    values = np.array(format.values)
    x = x.astype(np.float64, copy=False)
    lower = np.clip(np.searchsorted(values, x, side="right") - 1, 0, len(values) - 2)
    between = x > values[lower]  # numbers are compared, never their differences, which would be rounded
    match rules.rounding:
        case Rounding.NEAREST_EVEN:
            up = x > codebook_edges(format, "float64")[lower]
        case Rounding.NEAREST_AWAY:
            up = (x > codebook_edges(format, "float64")[lower]) | ((x == _codebook_ties(format)[lower]) & (x > 0))
        case Rounding.TOWARD_ZERO:
            up = between & (np.abs(values[lower + 1]) < np.abs(values[lower]))
        case Rounding.UP:
            up = between
        case Rounding.DOWN:
            up = np.zeros_like(between)
        case Rounding.TO_ODD:
            up = between & (lower % 2 == 0)
        case Rounding.STOCHASTIC:
            draw, _ = bits.random_words(np.arange(start, start + x.size), seed)
            gap = values[lower + 1] - values[lower]
            up = np.clip(x, values[0], values[-1]) - values[lower] > draw * 2.0**-62 * gap
    return lower + (up | (x >= values[lower + 1]))
