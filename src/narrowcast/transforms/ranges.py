"""Ranges of activation tensors from streamed statistics, by four methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["METHODS", "Quantizer", "TensorStatistics", "quantizer_of"]

Array = NDArray[Any]
Floats = NDArray[np.float64]

#: Bins of a histogram over [-A, A], A a power of two.
BINS = 8192
#: Values of a tensor that one batch adds to its histogram at the most (minimum and maximum see all values).
HISTOGRAM_SAMPLES = 1 << 18
#: Share of the values that the percentile method leaves outside, both ends together.
OUTSIDE = 1e-4


@dataclass(frozen=True)
class Quantizer:
    """An affine map between real values and 8-bit codes: ``real = scale * (code - zero_point)``.

    Attributes:
        scale: Step, FP32.
        zero_point: Code of zero.
        signed: Whether codes run from -128 to 127 (else 0 to 255).
        method: How the range was found.
    """

    scale: float
    zero_point: int
    signed: bool
    method: str

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -128 if self.signed else 0

    @property
    def dtype(self) -> np.dtype[Any]:
        """The element type of the codes."""
        return np.dtype(np.int8 if self.signed else np.uint8)

    @property
    def low(self) -> float:
        """The real value of the smallest code."""
        return self.scale * (self.lowest - self.zero_point)

    @property
    def high(self) -> float:
        """The real value of the largest code."""
        return self.scale * (self.lowest + 255 - self.zero_point)

    def apply(self, values: Array) -> Array:
        """Return the values as they come back from the codes (rounded half to even, saturated), FP32."""
        scale = np.float32(self.scale)
        low, high = self.lowest - self.zero_point, self.lowest + 255 - self.zero_point
        codes = values * (np.float32(1) / scale)
        np.rint(codes, out=codes)
        np.clip(codes, low, high, out=codes)
        codes *= scale
        return codes


def quantizer_of(low: float, high: float, signed: bool, method: str) -> Quantizer:
    """Return the quantizer of a range; the range is widened to hold zero, which gets a code of its own.

    Source: B. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", 2018, section 2.1 (zero must be exact, because padding writes it).
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32((high - low) / 255)) if high > low else 1.0
    scale = scale if scale > np.finfo(np.float32).tiny else 1.0
    code = int(np.clip(np.rint(-low / scale), 0, 255))
    return Quantizer(scale, code - 128 if signed else code, signed, method)


class TensorStatistics:
    """What calibration keeps of one tensor: extremes, a histogram, and extremes per channel.

    The histogram covers [-A, A] where A is the smallest power of two that holds all values seen so far; when A grows,
    neighbouring bins are merged. So the result does not depend on the order of the batches, and the memory not on
    their number.
    """

    def __init__(self) -> None:
        self.low = np.inf
        self.high = -np.inf
        self.reach = 0.0
        self.counts: Floats = np.zeros(BINS)
        self.channel_low: Array | None = None
        self.channel_high: Array | None = None

    def update(self, values: Array, channel_axis: int | None = None) -> None:
        """Add one batch of values, of any shape."""
        if values.size == 0:
            return
        if channel_axis is not None:
            low, high = (
                _per_channel(reduce, values, channel_axis % values.ndim) for reduce in (np.minimum, np.maximum)
            )
            self.channel_low = low if self.channel_low is None else np.minimum(self.channel_low, low)
            self.channel_high = high if self.channel_high is None else np.maximum(self.channel_high, high)
            self.low, self.high = min(self.low, float(low.min())), max(self.high, float(high.max()))
        else:
            self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        self._widen(max(abs(self.low), abs(self.high)))
        flat = values.reshape(-1)
        if flat.size > HISTOGRAM_SAMPLES:
            flat = flat[:: -(-flat.size // HISTOGRAM_SAMPLES)]
        places = ((flat + np.float32(self.reach)) * np.float32(BINS / (2 * self.reach))).astype(np.int32)
        np.clip(places, 0, BINS - 1, out=places)
        self.counts += np.bincount(places, minlength=BINS)

    def cover(self, channel_low: Array, channel_high: Array) -> None:
        """Take over the extremes of each channel that other samples, which the histogram does not know, have reached."""
        self.channel_low, self.channel_high = channel_low, channel_high
        self.low, self.high = float(channel_low.min()), float(channel_high.max())
        self._widen(max(abs(self.low), abs(self.high)))

    def _widen(self, reach: float) -> None:
        if self.reach == 0.0:
            self.reach = float(2.0 ** np.ceil(np.log2(max(reach, 1e-30))))
        while self.reach <= reach:  # a value at the very end would fall out of the last bin
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.zeros(BINS)
            self.counts[BINS // 4 : BINS // 4 * 3] = merged
            self.reach *= 2

    def centres(self) -> Array:
        """Return the real value in the middle of each bin."""
        return (np.arange(BINS) + 0.5) * (2 * self.reach / BINS) - self.reach


def _per_channel(reduce: np.ufunc, values: Array, axis: int) -> Array:
    """Reduce over all axes but one; in two steps, each over contiguous memory, which NumPy is fast at."""
    channels = values.shape[axis]
    inner = reduce.reduce(values.reshape(*values.shape[: axis + 1], -1), axis=-1)
    return reduce.reduce(inner.reshape(-1, channels), axis=0)


def _minmax(stats: TensorStatistics) -> tuple[float, float]:
    return stats.low, stats.high


def _percentile(stats: TensorStatistics) -> tuple[float, float]:
    total = np.cumsum(stats.counts)
    centres, wanted = stats.centres(), np.array([OUTSIDE / 2, 1 - OUTSIDE / 2]) * total[-1]
    first, last = np.searchsorted(total, wanted)
    low, high = float(centres[first]), float(centres[min(last, BINS - 1)])
    # A pile of values at one end (the zeros after a ReLU) has no tail there to cut.
    return max(low, stats.low), min(high, stats.high)


def _shrunk(stats: TensorStatistics, steps: int) -> list[tuple[float, float]]:
    """Return ranges that shrink from the extremes towards zero, each end on its own and both together."""
    shares = np.linspace(1.0, 0.3, steps)
    both = [(stats.low * s, stats.high * s) for s in shares]
    if stats.low >= 0 or stats.high <= 0:
        return both
    return both + [(stats.low * s, stats.high) for s in shares[1:]] + [(stats.low, stats.high * s) for s in shares[1:]]


def _mse(stats: TensorStatistics) -> tuple[float, float]:
    filled = stats.counts > 0
    centres, weights = stats.centres()[filled], stats.counts[filled]
    best, best_error = (stats.low, stats.high), np.inf
    for low, high in _shrunk(stats, 36):
        quantizer = quantizer_of(low, high, False, "mse")
        codes = np.clip(np.rint(centres / quantizer.scale) + quantizer.zero_point, 0, 255)
        error = float(weights @ (centres - (codes - quantizer.zero_point) * quantizer.scale) ** 2)
        if error < best_error * (1 - 1e-3):
            best, best_error = (low, high), error
    return best


def _entropy(stats: TensorStatistics) -> tuple[float, float]:
    """Return the range whose 256 levels keep the distribution best in the sense of Kullback and Leibler.

    Source: S. Migacz, "8-bit inference with TensorRT", 2017, with ranges that need not be symmetric.
    """
    centres, counts = stats.centres(), stats.counts.copy()
    counts[np.argmin(np.abs(centres))] = 0  # exact zeros cost nothing and would drown the rest
    if counts.sum() == 0:
        return stats.low, stats.high
    best, best_divergence = (stats.low, stats.high), np.inf
    for low, high in _shrunk(stats, 24):
        inside = (centres >= low) & (centres <= high)
        if not inside.any() or counts[inside].sum() == 0:
            continue
        reference = counts[inside].copy()
        reference[0] += counts[centres < low].sum()
        reference[-1] += counts[centres > high].sum()
        width = max(high - low, 1e-30)
        levels = np.clip(((centres[inside] - low) / width * 256).astype(np.int64), 0, 255)
        filled = counts[inside] > 0
        mass = np.bincount(levels, counts[inside], 256)
        bins = np.bincount(levels[filled], minlength=256)
        spread = np.where(filled, mass[levels] / np.maximum(bins[levels], 1), 0.0)
        p, q = reference / reference.sum(), spread / max(spread.sum(), 1e-30)
        divergence = float(np.sum(p[p > 0] * np.log(p[p > 0] / np.maximum(q[p > 0], 1e-12))))
        if divergence < best_divergence:
            best, best_divergence = (low, high), divergence
    return best


METHODS: dict[str, Callable[[TensorStatistics], tuple[float, float]]] = {
    "minmax": _minmax,
    "percentile": _percentile,
    "entropy": _entropy,
    "mse": _mse,
}
