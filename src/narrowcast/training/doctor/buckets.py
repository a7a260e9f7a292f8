"""Buckets of magnitudes: sixteen in each octave, with zeros, infinities and NaN apart. NumPy alone.

Bucket 0 holds the zeros. Bucket ``k`` from 1 to 4080 holds the finite magnitudes in ``(EDGES[k - 1], EDGES[k]]``; the edges
are the float32 numbers whose significand fields begin with four free bits, so every limit of an 8-bit format is an edge.
Bucket :data:`INFINITE` and bucket :data:`NOT_A_NUMBER` hold what their names say. :mod:`narrowcast.training.doctor.histograms`
fills them on a device.

For pictures the buckets fold into *columns*, one an octave: column 0 holds the zeros, column ``c`` from 1 to 255 the
magnitudes in ``(2**(c - 128), 2**(c - 127)]`` (column 1 all down to 0), columns 256 and 257 infinities and NaN.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = [
    "BUCKETS",
    "COLUMNS",
    "EDGES",
    "INFINITE",
    "INFINITE_COLUMN",
    "NAN_COLUMN",
    "NOT_A_NUMBER",
    "PER_OCTAVE",
    "column_exponent",
    "fold",
    "largest_edge",
    "smallest_edge",
]

#: Buckets in an octave.
PER_OCTAVE = 16
_FINITE = 255 * PER_OCTAVE  # the octaves of float32, its subnormal numbers as one
INFINITE = _FINITE + 1
NOT_A_NUMBER = _FINITE + 2
#: Buckets in all.
BUCKETS = _FINITE + 3
INFINITE_COLUMN = 256
NAN_COLUMN = 257
#: Columns in all.
COLUMNS = 258
#: The first bucket of each column.
_FIRST = np.array([0, *range(1, INFINITE, PER_OCTAVE), INFINITE, NOT_A_NUMBER])


def _edges() -> np.ndarray:
    bits = np.arange(_FINITE, dtype=np.uint32) << np.uint32(19)
    edges = np.append(bits.view(np.float32).astype(np.float64), float(np.finfo(np.float32).max))
    edges.setflags(write=False)
    return edges


#: Upper ends of buckets 0 to 4080; float64, shape [4081].
EDGES = _edges()


def fold(counts: np.ndarray) -> np.ndarray:
    """Return the columns of buckets.

    Args:
        counts: Shape [..., BUCKETS].

    Returns:
        Shape [..., COLUMNS], int64.
    """
    return np.add.reduceat(np.asarray(counts, np.int64), _FIRST, axis=-1)


def column_exponent(column: int) -> int:
    """Return ``e`` of a finite column, which holds the magnitudes in ``(2**e, 2**(e + 1)]``.

    Raises:
        ValueError: The column of zeros, infinities or NaN.
    """
    if not 1 <= column < INFINITE_COLUMN:
        raise ValueError(f"column {column} holds no octave")
    return column - 128


def largest_edge(counts: np.ndarray) -> float:
    """Return what no finite number counted exceeds; 0.0 if there is none but zeros."""
    used = np.flatnonzero(counts[1:INFINITE])
    return float(EDGES[used[-1] + 1]) if used.size else 0.0


def smallest_edge(counts: np.ndarray) -> float:
    """Return what every number counted but zeros exceeds; infinity if there is none."""
    used = np.flatnonzero(counts[1:INFINITE])
    return float(EDGES[used[0]]) if used.size else math.inf
