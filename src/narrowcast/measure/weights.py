"""What number formats cost a model's weights: error and size of every tensor, and of the whole, read piece by piece."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from narrowcast.errors import FormatError, ModelError, choices
from narrowcast.formats import QuantizedTensor
from narrowcast.formats.analysis import ErrorTotals, add_error
from narrowcast.formats.tensor import host
from narrowcast.measure.comparison import BINS, Comparison, InFormat, LeftOut, TensorErrors, added_up
from narrowcast.measure.treatments import Treatment
from narrowcast.models.stored import Weight, Weights

__all__ = ["Tell", "compare_weights"]

_PIECE = 1 << 20  # elements worked on at a time: whole rows, at least one
_LONG = 4 << 20  # elements of one row from which on formats take turns, so that memory holds the work of one


class Tell(Protocol):
    """Told how far the work is."""

    def stage(self, name: str, share: float = 0.0) -> None:
        """Work goes on with this; so much of all of it is done (0 to 1)."""
        ...


def compare_weights(
    weights: Weights,
    treatments: Sequence[Treatment],
    *,
    range: str = "minmax",
    sort: str | None = None,
    vectors: bool = False,
    tell: Tell | None = None,
) -> Comparison:
    """Return error and size of a model's weights in several formats.

    A tensor is read and worked on in pieces of whole rows, so memory is bounded by the piece (or by the longest row), not
    by the model.

    Args:
        weights: The model's tensors.
        treatments: The formats, and how they are applied.
        range: How the treatments choose scales; noted in the result.
        sort: Format whose damage orders the tensors; unless given, the one of the fewest bits per element.
        vectors: Whether tensors with one axis are compared too, instead of staying as they are.
        tell: Told how far the work is.

    Raises:
        FormatError: ``sort`` names none of the formats.
        ModelError: Nothing is there to compare.
    """
    names = [treatment.name for treatment in treatments]
    if sort is not None and sort not in names:
        raise FormatError(f"sort = {sort!r}, which is not compared", allowed=choices(sort, names))
    chosen: list[Weight] = []
    left_out: list[LeftOut] = []
    for weight in weights.weights:
        reason = _reason(weight, vectors)
        if reason:
            left_out.append(LeftOut(weight.name, weight.shape, weight.dtype, weight.nbytes, reason))
        else:
            chosen.append(weight)
    tensors: list[TensorErrors] = []
    done, work = 0, sum(weight.count for weight in chosen)
    with ThreadPoolExecutor(_threads(len(treatments))) as pool:
        for weight in chosen:
            judged = _judged(weight, treatments, pool, _Share(tell, weight.name, done, work))
            if judged.not_finite < weight.count:
                tensors.append(judged)
            else:
                left_out.append(
                    LeftOut(weight.name, weight.shape, weight.dtype, weight.nbytes, "NaN and infinity alone")
                )
            done += weight.count
    if not tensors:
        raise ModelError(
            f"{weights.source} holds no weights to compare: {_counted(left_out)}",
            allowed="a model with floating-point tensors of two axes or more",
            next_step="give --all to compare vectors too" if _has_vectors(weights) else "name another model",
        )
    totals = tuple(added_up(item, tensors, left_out, weights) for item in treatments)
    sort = sort or min(totals, key=lambda item: item.bits_per_element).name
    tensors.sort(key=lambda tensor: -tensor.formats[sort].damage)
    return Comparison(
        weights.source,
        weights.random,
        range,
        sort,
        sum(weight.nbytes for weight in weights.weights),
        sum(tensor.count for tensor in tensors),
        totals,
        tuple(tensors),
        tuple(left_out),
    )


# Choosing -------------------------------------------------------------------------------------------------------------


def _reason(weight: Weight, vectors: bool) -> str:
    if weight.unreadable:
        return weight.unreadable
    if not weight.shape:
        return "a single number"
    return "a vector" if weight.is_vector and not vectors else ""


def _has_vectors(weights: Weights) -> bool:
    return any(weight.shape and weight.is_vector and not weight.unreadable for weight in weights.weights)


def _counted(left_out: Sequence[LeftOut]) -> str:
    if not left_out:
        return "it has no tensors"
    reasons = [item.reason for item in left_out]
    return "; ".join(f"{reasons.count(reason)} × {reason}" for reason in dict.fromkeys(reasons))


def _threads(formats: int) -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(formats, usable))


# One tensor -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Share:
    """How far the work on one tensor takes the whole."""

    tell: Tell | None
    name: str
    before: int
    work: int

    def come(self, elements: int) -> None:
        if self.tell is not None:
            self.tell.stage(self.name, (self.before + elements) / self.work)


@dataclass
class _Range:
    """What the first walk through a tensor finds."""

    low: float = math.inf
    high: float = -math.inf
    not_finite: int = 0

    def add(self, numbers: np.ndarray) -> None:
        low, high = float(numbers.min()), float(numbers.max())
        if not math.isfinite(low) or not math.isfinite(high):
            numbers, whole = numbers[np.isfinite(numbers)], numbers.size
            self.not_finite += whole - numbers.size
            low, high = float(numbers.min(initial=math.inf)), float(numbers.max(initial=-math.inf))
        self.low, self.high = min(self.low, low), max(self.high, high)

    @property
    def largest(self) -> float:
        return max(self.high, -self.low, 0.0)


class _Tally:
    """Sums over the pieces of one tensor in one format."""

    def __init__(self, treatment: Treatment) -> None:
        self.treatment = treatment
        self.totals = ErrorTotals()
        self.largest = 0.0
        self.logarithms = 0.0
        self.scales = 0
        self.failure = ""

    def add(self, numbers: np.ndarray, finite: np.ndarray, tensor_max: float) -> None:
        """Judge one piece.

        Args:
            numbers: As they are stored: shape [rows, length].
            finite: The same with 0 in place of NaN and infinity, which have no place in most formats.
            tensor_max: Largest finite magnitude of the whole tensor.
        """
        if self.failure:
            return
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # sums of squares may leave float64, which is an answer
                self._add(numbers, self.treatment.apply(finite, tensor_max))
        except FormatError as error:
            self.failure = error.what

    def _add(self, numbers: np.ndarray, became: QuantizedTensor | np.ndarray) -> None:
        if isinstance(became, QuantizedTensor):
            add_error(self.totals, numbers, became)
            self._add_scales(host(became.scales))
        else:
            add_error(self.totals, numbers, became, self.treatment.format)

    def _add_scales(self, scales: np.ndarray) -> None:
        used = scales[scales > 0].astype(np.float64)
        if used.size:
            self.largest = max(self.largest, float(used.max()))
            self.logarithms += float(np.log(used).sum())
            self.scales += used.size

    def result(self, weight: Weight) -> InFormat:
        if self.failure:
            bits = 8 * weight.nbytes / weight.count
            return InFormat(weight.nbytes, bits, 0.0, 0.0, None, failure=self.failure)
        nbytes = self.treatment.nbytes(weight.matrix)
        scaled = self.treatment.scheme is not None
        typical = math.exp(self.logarithms / self.scales) if self.scales else None
        return InFormat(
            nbytes,
            8 * nbytes / weight.count,
            self.totals.signal,
            self.totals.noise,
            self.totals.report(),
            self.largest if scaled else None,
            typical,
        )


def _pieces(weight: Weight) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the rows of a weight in pieces, each with the number of elements up to its end."""
    count, length = weight.matrix
    step = max(_PIECE // max(length, 1), 1)
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield stop * length, weight.rows(start, stop)


def _judged(
    weight: Weight, treatments: Sequence[Treatment], pool: ThreadPoolExecutor, progress: _Share
) -> TensorErrors:
    extent = _Range()
    kept: list[tuple[int, np.ndarray]] = []  # of a tensor that is one piece, so that it is read once
    for upto, numbers in _pieces(weight):
        extent.add(numbers)
        kept = [(upto, numbers)] if numbers.size == weight.count else []
    tallies = [_Tally(treatment) for treatment in treatments]
    low, high = (extent.low, extent.high) if extent.low <= extent.high else (0.0, 0.0)
    counts = np.zeros(BINS, np.int64)
    for upto, numbers in kept or _pieces(weight):
        finite = np.where(np.isfinite(numbers), numbers, numbers.dtype.type(0)) if extent.not_finite else numbers
        counts += _histogram(numbers, low, high, extent.not_finite > 0)
        if numbers.size > _LONG:
            for tally in tallies:
                tally.add(numbers, finite, extent.largest)
        else:
            for future in [pool.submit(tally.add, numbers, finite, extent.largest) for tally in tallies]:
                future.result()
        progress.come(upto)
    return TensorErrors(
        weight.name,
        weight.shape,
        weight.dtype,
        weight.nbytes,
        weight.count,
        extent.not_finite,
        low,
        high,
        tuple(counts.tolist()),
        {tally.treatment.name: tally.result(weight) for tally in tallies},
    )


def _histogram(numbers: np.ndarray, low: float, high: float, mixed: bool) -> np.ndarray:
    """Return how many of a piece's numbers lie in each bin; ``mixed`` says that some may be NaN or infinite."""
    finite = numbers[np.isfinite(numbers)] if mixed else numbers.reshape(-1)
    width = high / BINS - low / BINS  # the difference alone may be beyond float64
    if not width > 1e-300:
        counts = np.zeros(BINS, np.int64)
        counts[BINS // 2] = finite.size
        return counts
    if not 1e-30 < width < 1e30:  # where float32 comes to its ends
        finite = finite.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        places = (finite / finite.dtype.type(width) - finite.dtype.type(low / width)).astype(np.int64)
    return np.bincount(np.clip(places, 0, BINS - 1), minlength=BINS)
