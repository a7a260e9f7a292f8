"""Histograms over time, in main memory, and what they advise. NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from narrowcast.formats.kinds import Format
from narrowcast.training.doctor import whatif
from narrowcast.training.doctor.buckets import BUCKETS, COLUMNS, INFINITE, PER_OCTAVE, fold, largest_edge
from narrowcast.training.doctor.values import FormatAdvice, Part, ScaleAdvice, Series

__all__ = ["Histories", "Sample", "format_advice", "scale_advice", "shifted"]

_TIMES = 64  # samples that a series keeps; when there are more, every other one goes
_MARGIN = 8.0  # room above the largest gradient seen
_HIGHEST = 2.0**24  # a loss scale beyond it gains nothing: FP32's own products end soon after
_LOST = 1e-3  # share of the numbers that a format may turn to zero and still be advised


class Sample(NamedTuple):
    """A layer's numbers at one step.

    Attributes:
        step: Updates done before.
        scale: The loss scale at that time.
        counts: Shape [BUCKETS].
        largest: The largest finite magnitude.
        numbers: How many numbers the tensors hold, which may be more than were counted.
    """

    step: int
    scale: float
    counts: np.ndarray
    largest: float
    numbers: int


@dataclass
class _History:
    steps: list[int] = field(default_factory=list[int])
    scales: list[float] = field(default_factory=list[float])
    columns: list[np.ndarray] = field(default_factory=list[np.ndarray])
    largest: list[float] = field(default_factory=list[float])
    total: np.ndarray = field(default_factory=lambda: np.zeros(BUCKETS, np.int64))
    numbers: int = 0
    stride: int = 1
    seen: int = 0

    def add(self, sample: Sample) -> None:
        self.total += sample.counts
        self.numbers += sample.numbers
        if self.seen % self.stride == 0:
            self.steps.append(sample.step)
            self.scales.append(sample.scale)
            self.columns.append(fold(sample.counts))
            self.largest.append(sample.largest)
        else:
            self.largest[-1] = max(self.largest[-1], sample.largest)
        self.seen += 1
        if len(self.steps) > _TIMES:
            self.stride *= 2
            self.largest = [max(pair) for pair in zip_longest(self.largest[::2], self.largest[1::2], fillvalue=0.0)]
            for values in (self.steps, self.scales, self.columns):
                del values[1::2]

    def series(self, layer: str, part: Part) -> Series:
        return Series(
            layer,
            part,
            np.array(self.steps, np.int64),
            np.array(self.scales),
            np.stack(self.columns) if self.columns else np.zeros((0, COLUMNS), np.int64),
            np.array(self.largest),
            self.total.copy(),
            self.numbers,
            self.seen,
        )


class Histories:
    """The histograms of all layers and parts."""

    def __init__(self) -> None:
        self._all: dict[tuple[str, Part], _History] = {}

    def add(self, layer: str, part: Part, sample: Sample) -> None:
        """Add what was counted at a step."""
        if (layer, part) not in self._all:
            self._all[layer, part] = _History()
        self._all[layer, part].add(sample)

    def take_up(self, series: Series, step: int) -> None:
        """Go on with a series that was written before, as far as it goes back behind a step.

        Its total stays whole: which of its counts came later is not known.
        """
        kept = int((series.steps < step).sum())
        seen = max(series.seen, kept) if kept == len(series.steps) else kept
        stride = 1
        while seen > stride * _TIMES:
            stride *= 2
        self._all[series.layer, series.part] = _History(
            steps=series.steps[:kept].tolist(),
            scales=series.scales[:kept].tolist(),
            columns=list(series.columns[:kept]),
            largest=series.largest[:kept].tolist(),
            total=series.total.copy(),
            numbers=series.numbers,
            stride=stride,
            seen=seen,
        )

    def series(self, layers: Sequence[str]) -> tuple[Series, ...]:
        """Return all series, in the order of the layers."""
        order = {name: number for number, name in enumerate(layers)}
        keys = sorted(self._all, key=lambda key: (order.get(key[0], len(order)), list(Part).index(key[1])))
        return tuple(self._all[key].series(*key) for key in keys)


def shifted(counts: np.ndarray, octaves: float) -> np.ndarray:
    """Return a histogram of the same numbers times ``2**octaves``, to the nearest bucket; the ends gather what leaves."""
    places = round(octaves * PER_OCTAVE)
    if not places:
        return counts
    moved = counts.copy()
    moved[1:INFINITE] = 0
    targets = np.clip(np.arange(1, INFINITE) + places, 1, INFINITE - 1)
    np.add.at(moved, targets, counts[1:INFINITE])
    return moved


def scale_advice(series: Sequence[Series], format: str = "fp16") -> ScaleAdvice | None:
    """Return the loss scale that the gradients seen ask for; None if none was seen.

    Args:
        series: Any; gradients of activations count where there are some, since they are what FP16 holds, else those of
            parameters.
        format: What gradients are computed in.
    """
    chosen = [one for one in series if one.part is Part.BACKWARD] or [
        one for one in series if one.part is Part.GRADIENT
    ]
    largest = max((float(one.largest.max()) for one in chosen if one.largest.size), default=0.0)
    if not largest:
        return None
    total = np.sum([one.total for one in chosen], axis=0)
    found = whatif.element(format)
    exponent = math.floor(math.log2(found.max / _MARGIN / largest))
    scale = min(2.0**exponent, _HIGHEST)
    before = whatif.shares(total, format).zero.high
    after = whatif.shares(total, format, scale=scale).zero.high
    numbers = sum(one.numbers for one in chosen)
    counted = int(total.sum())
    share = "the share" if counted == numbers else f"of a sample of {counted:,} the share"
    margin = found.max / (largest * scale)
    return ScaleAdvice(
        scale=scale,
        format=found.name,
        margin=margin,
        lost=before,
        lost_scaled=after,
        evidence=(
            f"the largest of {numbers:,} gradients is {largest:.3g}, so times {scale:g} it stays {margin:.3g} times below "
            f"{found.name}'s largest number; {share} that becomes zero falls from {before:.3%} to {after:.3%}"
        ),
    )


def format_advice(series: Sequence[Series], formats: Sequence[str]) -> tuple[FormatAdvice, ...]:
    """Return the narrowest format for each layer's activations and their gradients, with a power of two as its scale.

    Args:
        series: Any; forward and backward ones count.
        formats: Floating-point formats to choose from; FP32 stands for none of them.
    """
    known = [one for one in map(whatif.element, formats) if isinstance(one, Format)]
    ordered = sorted(known, key=lambda one: (one.bits, -one.mantissa_bits))
    return tuple(
        _advice(one, ordered) for one in series if one.part in (Part.FORWARD, Part.BACKWARD) and one.total.any()
    )


def _advice(series: Series, formats: Sequence[Format]) -> FormatAdvice:
    largest = largest_edge(series.total)
    counted = f" of a sample of {int(series.total.sum()):,} numbers" if series.sampled else ""
    tried: list[str] = []
    for format in formats:
        scale = 2.0 ** math.floor(math.log2(format.max / 2 / largest)) if largest else 1.0
        shares = whatif.shares(series.total, format, scale=scale)
        seen = (
            f"{format.name} times {scale:g}: {shares.zero.high:.3%}{counted} would be zero, {shares.subnormal.high:.3%} "
            "subnormal"
        )
        if shares.zero.high <= _LOST and not shares.overflow.high:
            return FormatAdvice(
                layer=series.layer,
                part=series.part,
                format=format.name,
                scale=scale,
                evidence="; ".join([*tried, f"{seen}, none would overflow"]),
            )
        tried.append(seen)
    return FormatAdvice(layer=series.layer, part=series.part, format="fp32", scale=1.0, evidence="; ".join(tried))
