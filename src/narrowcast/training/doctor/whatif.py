"""What a number format would do to numbers that were counted by magnitude: overflow, underflow, stagnation. NumPy alone.

Histograms of :mod:`narrowcast.training.doctor.buckets` know magnitudes up to a sixteenth of an octave, so shares come as
bounds: equal where a format's limit is an edge of a bucket, else apart by the one bucket that it falls in. Where a sample was
counted, they are its shares: those of all numbers are near them, but need not lie between the bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from narrowcast.errors import FormatError
from narrowcast.formats import table
from narrowcast.formats.blocks import BlockFormat
from narrowcast.formats.kinds import Codebook, ElementFormat, Format, Integer
from narrowcast.training.doctor.buckets import EDGES, INFINITE, NOT_A_NUMBER

__all__ = ["Bounds", "Shares", "element", "overflow_limit", "shares", "stagnant", "underflow_limit"]


class Bounds(NamedTuple):
    """The least and the greatest value that a share can have."""

    low: float
    high: float


@dataclass(frozen=True)
class Shares:
    """What a format would do to the numbers of a histogram, as shares of all of them, zeros too.

    Attributes:
        format: Name of the format.
        scale: What the numbers are multiplied by first.
        overflow: Finite numbers beyond the largest one, after rounding.
        zero: Numbers that are not zero and would become it.
        subnormal: Numbers that would be kept with fewer digits.
        zeros: Zeros already.
        infinite: Infinities already.
        nan: NaN already.
    """

    format: str
    scale: float
    overflow: Bounds
    zero: Bounds
    subnormal: Bounds
    zeros: float
    infinite: float
    nan: float


class _Limits(NamedTuple):
    """Magnitudes at which a format's behaviour changes; first the one that is certain, then the one that is possible."""

    overflow: Bounds  # beyond which some sign, every sign overflows: low is the earliest
    inclusive: bool  # whether a number just at the limit overflows
    zero: Bounds  # up to which every sign, some sign becomes zero
    normal: float  # from which a number keeps all its digits


def shares(counts: np.ndarray, format: str | ElementFormat, *, scale: float = 1.0, largest: float = np.inf) -> Shares:
    """Return what a format would do to the numbers of a histogram, rounded to nearest even.

    Args:
        counts: Shape [BUCKETS].
        format: An element format of :mod:`narrowcast.formats`, by name or itself. Of unsigned ones only the magnitude is
            judged, since histograms know no sign.
        scale: What the numbers are multiplied by first, such as a loss scale.
        largest: The largest finite magnitude, if it is known: it narrows the bounds of the bucket that it lies in.

    Raises:
        FormatError: An unknown format or a block format, whose scales depend on which numbers are neighbours.
    """
    found = element(format)
    limits = _limits(found)
    upper = np.where((EDGES[:-1] < largest) & (largest < EDGES[1:]), largest, EDGES[1:])  # of buckets 1 to 4080
    lower, upper = EDGES[:-1] * scale, upper * scale
    finite = np.asarray(counts[1:INFINITE], np.float64)
    total = float(np.sum(counts)) or 1.0

    def share(certain: np.ndarray, possible: np.ndarray) -> Bounds:
        return Bounds(float(finite[certain & possible].sum()) / total, float(finite[possible].sum()) / total)

    earliest, latest = limits.overflow
    possible_over = upper >= earliest if limits.inclusive else upper > earliest
    return Shares(
        format=found.name,
        scale=scale,
        overflow=share(lower >= latest, possible_over),
        zero=share(upper <= limits.zero.low, lower < limits.zero.high),
        subnormal=share(
            (lower >= limits.zero.high) & (upper < limits.normal),
            (upper > limits.zero.low) & (lower < limits.normal),
        ),
        zeros=float(counts[0]) / total,
        infinite=float(counts[INFINITE]) / total,
        nan=float(counts[NOT_A_NUMBER]) / total,
    )


def stagnant(ratios: np.ndarray, format: str | ElementFormat) -> Bounds:
    """Return the share of updates that a plain update in a format would lose: at most half a unit in the last place.

    Args:
        ratios: Histogram of ``|update| / 2**floor(log2(|weight|))``, shape [BUCKETS].
        format: A floating-point format.

    Returns:
        Shares of all updates that are not zero. A tie counts as lost, though it moves every other weight.

    Raises:
        FormatError: An unknown format, or none of floating point.
    """
    found = element(format)
    if not isinstance(found, Format):
        raise FormatError(f"{found.name} has no unit in the last place", allowed="a floating-point format")
    limit = found.eps / 2
    moving = np.asarray(ratios[1:INFINITE], np.float64)
    total = float(moving.sum()) or 1.0
    certain, possible = EDGES[1:] <= limit, EDGES[:-1] < limit
    return Bounds(float(moving[certain].sum()) / total, float(moving[possible].sum()) / total)


def overflow_limit(format: str | ElementFormat) -> float:
    """Return the magnitude beyond which numbers overflow: the largest number and half a unit in its last place.

    Raises:
        FormatError: An unknown format or a block format.
    """
    return _limits(element(format)).overflow.low


def underflow_limit(format: str | ElementFormat) -> float:
    """Return the magnitude up to which numbers become zero: half the smallest one.

    Raises:
        FormatError: An unknown format or a block format.
    """
    return _limits(element(format)).zero.low


def element(format: str | ElementFormat | BlockFormat) -> ElementFormat:
    """Return an element format, by name or itself.

    Raises:
        FormatError: An unknown format or a block format.
    """
    found = table.get(format)
    if isinstance(found, BlockFormat):
        raise FormatError(
            f"{found.name} scales blocks of {found.block} numbers: counts by magnitude do not say which are neighbours",
            allowed=f"an element format, such as its own {found.element.name}",
        )
    return found


def _limits(format: ElementFormat) -> _Limits:
    match format:
        case Format():
            return _of_float(format)
        case Integer():
            return _of_integer(format)
        case Codebook():
            return _of_codebook(format)


def _of_float(format: Format) -> _Limits:
    limit = format.max + 2.0 ** (format.maximum_exponent - format.mantissa_bits - 1)
    zero = format.smallest_subnormal / 2 if format.has_zero else 0.0
    normal = format.smallest_normal - format.smallest_subnormal / 2 if format.has_subnormals else 0.0
    return _Limits(Bounds(limit, limit), bool(format.max_code & 1), Bounds(zero, zero), normal)


def _of_integer(format: Integer) -> _Limits:
    half = format.step / 2
    ends = sorted([format.max + half, (-format.min if format.signed else format.max) + half])
    return _Limits(Bounds(ends[0], ends[-1]), True, Bounds(half, half), 0.0)


def _of_codebook(format: Codebook) -> _Limits:
    above = [value for value in format.values if value > 0]
    below = [-value for value in format.values if value < 0]
    ends = sorted(max(side) for side in (above, below) if side)
    halves = sorted(min(side) / 2 for side in (above, below) if side) if 0.0 in format.values else [0.0]
    return _Limits(Bounds(ends[0], ends[-1]), False, Bounds(halves[0], halves[-1]), 0.0)
