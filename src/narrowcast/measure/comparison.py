"""The result of comparing a model's weights in several formats, and how it adds up over the tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from narrowcast.formats import ErrorReport
from narrowcast.measure.treatments import Treatment
from narrowcast.models.stored import Weights

__all__ = ["BINS", "Comparison", "FormatTotals", "InFormat", "LeftOut", "TensorErrors", "added_up"]

#: Bins of a tensor's histogram, from its smallest number to its largest.
BINS = 120


@dataclass(frozen=True)
class InFormat:
    """One tensor in one format.

    Attributes:
        nbytes: What it takes: codes, padding, scales, zero points.
        bits_per_element: Stored bits over elements.
        signal: Sum of the squares of its finite numbers.
        noise: Sum of their squared errors.
        error: Error and what became of the numbers at the edges; None if the format could not hold the tensor.
        largest_scale: Largest of its scales; None for a cast.
        typical_scale: Geometric mean of its scales that are not zero; None for a cast, or without any.
        failure: Why the format could not hold it.
    """

    nbytes: int
    bits_per_element: float
    signal: float
    noise: float
    error: ErrorReport | None
    largest_scale: float | None = None
    typical_scale: float | None = None
    failure: str = ""

    @property
    def damage(self) -> float:
        """Noise over signal; infinite if the format could not hold the tensor."""
        if self.error is None or not math.isfinite(self.noise):
            return math.inf
        return self.noise / self.signal if self.signal else math.inf if self.noise else 0.0


@dataclass(frozen=True)
class TensorErrors:
    """A tensor that was compared.

    Attributes:
        name: Its name in the model.
        shape: Its shape there.
        dtype: Its own number format.
        nbytes: What it takes there.
        count: Number of elements.
        not_finite: Elements that are NaN or infinite; the rest was judged.
        low: Its smallest finite number.
        high: Its largest finite number.
        counts: Elements in each of ``BINS`` bins from ``low`` to ``high``.
        formats: What became of it, by format.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    count: int
    not_finite: int
    low: float
    high: float
    counts: tuple[int, ...] = field(repr=False)
    formats: dict[str, InFormat]


@dataclass(frozen=True)
class LeftOut:
    """A tensor that stays as it is, and why."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    reason: str


@dataclass(frozen=True)
class FormatTotals:
    """The whole model with its weights in one format.

    Attributes:
        name: The format.
        words: What was done to a weight.
        nbytes: Size of all tensors, those that stay as they are included.
        ratio: How many times smaller than the model as it is stored.
        ratio_fp32: How many times smaller than with every floating-point number in FP32.
        bits_per_element: Stored bits of the compared tensors over their elements.
        sqnr_db: Signal over noise, each summed over the compared tensors, in decibels.
        overflowed: Share of their elements beyond the largest number.
        underflowed: Share that was not zero and became zero.
        worst: The tensor with the most noise for its signal.
        failed: Tensors that the format could not hold; they count with their own size and without error.
    """

    name: str
    words: str
    nbytes: int
    ratio: float
    ratio_fp32: float
    bits_per_element: float
    sqnr_db: float
    overflowed: float
    underflowed: float
    worst: str
    failed: int


@dataclass(frozen=True)
class Comparison:
    """A model's weights in several formats.

    Attributes:
        source: The model.
        random: Whether nobody trained the weights.
        range: How scales were chosen.
        sort: The format whose damage orders the tensors.
        nbytes: Size of all tensors as they are stored.
        elements: Elements of the tensors that were compared.
        formats: The whole model in each format, in the order asked.
        tensors: The tensors that were compared, the most damaged first.
        left_out: The tensors that stay as they are.
    """

    source: str
    random: bool
    range: str
    sort: str
    nbytes: int
    elements: int
    formats: tuple[FormatTotals, ...]
    tensors: tuple[TensorErrors, ...]
    left_out: tuple[LeftOut, ...]


def added_up(
    treatment: Treatment, tensors: Sequence[TensorErrors], left_out: Sequence[LeftOut], weights: Weights
) -> FormatTotals:
    """Return the whole model in one format.

    Args:
        treatment: The format.
        tensors: The tensors that were compared, at least one.
        left_out: Those that stay as they are.
        weights: All of them.
    """
    results = [tensor.formats[treatment.name] for tensor in tensors]
    judged = [item.error for item in results if item.error is not None]
    kept = sum(item.nbytes for item in left_out)
    nbytes = kept + sum(item.nbytes for item in results)
    own = sum(weight.nbytes for weight in weights.weights)
    fp32 = sum(weight.nbytes if weight.unreadable else 4 * weight.count for weight in weights.weights)
    signal, noise = math.fsum(item.signal for item in results), math.fsum(item.noise for item in results)
    elements = max(sum(error.count for error in judged), 1)
    worst = max(tensors, key=lambda tensor: tensor.formats[treatment.name].damage)
    return FormatTotals(
        treatment.name,
        treatment.words,
        nbytes,
        own / max(nbytes, 1),
        fp32 / max(nbytes, 1),
        8 * (nbytes - kept) / max(sum(tensor.count for tensor in tensors), 1),
        _decibels(signal, noise),
        sum(error.overflowed * error.count for error in judged) / elements,
        sum(error.underflowed * error.count for error in judged) / elements,
        worst.name,
        sum(item.error is None for item in results),
    )


def _decibels(signal: float, noise: float) -> float:
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal and math.isfinite(noise) else -math.inf
