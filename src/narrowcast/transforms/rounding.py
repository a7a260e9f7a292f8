"""Weights to 8-bit codes: symmetric, a scale per output channel, rounded so that the operator's output error is least.

All functions see a weight as ``[G, O, K]``: G independent groups of O output channels over K inputs. A convolution's K
are the values under its kernel; a depthwise one has G channels with O = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from narrowcast.models.graph import attribute

__all__ = ["Moments", "WeightLayout", "channel_scales", "patches", "quantise_weight", "reconstruct"]

Array = NDArray[Any]
Floats = NDArray[np.float32]

#: Largest magnitude of a weight code; -128 stays unused so that the range is symmetric.
LARGEST = 127
#: Output positions that the second moments are taken over: this many per input of the operator, within bounds.
ROWS_PER_INPUT, FEWEST_ROWS, MOST_ROWS = 60, 4000, 16384
#: Values that all groups of an operator see at those positions together, at the most.
MOST_VALUES = 24_000_000
#: Positions per input below which the least-squares shift of weights is trusted less in proportion.
ENOUGH_ROWS = 16
#: Up to this many inputs per group, many scales are tried and codes are settled by coordinate descent.
SMALL_K, SWEEPS = 49, 4
#: Inputs between two matrix products while errors are passed on.
BLOCK = 64
#: Above this many inputs per group the second moments would not fit the time or the memory.
LARGEST_K = 4608


@dataclass(frozen=True)
class WeightLayout:
    """Where the output channels of a weight are, and how to see it as ``[G, O, K]`` and back.

    Attributes:
        op_type: Conv, Gemm or MatMul.
        shape: The weight's own shape.
        groups: Groups of a convolution (1 otherwise).
        transposed: Whether a Gemm's weight is stored as ``[O, K]``.
    """

    op_type: str
    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    @classmethod
    def of(cls, node: onnx.NodeProto, weight: Array) -> WeightLayout:
        """Return the layout of a linear operator's weight."""
        transposed = bool(attribute(node, "transB", 0))
        return cls(node.op_type, weight.shape, attribute(node, "group", 1), transposed)

    @property
    def axis(self) -> int:
        """The axis of the output channels."""
        return 0 if self.op_type == "Conv" or self.transposed else 1

    def to_matrix(self, weight: Array) -> Array:
        """Return a weight as ``[G, O, K]``."""
        if self.op_type == "Conv":
            return weight.reshape(self.groups, self.shape[0] // self.groups, -1)
        return (weight if self.transposed else weight.T)[None]

    def from_matrix(self, matrix: Array) -> Array:
        """Return the weight in its own shape."""
        if self.op_type == "Conv":
            return np.ascontiguousarray(matrix.reshape(self.shape))
        return np.ascontiguousarray(matrix[0] if self.transposed else matrix[0].T)


def patches(node: onnx.NodeProto, layout: WeightLayout, x: Array) -> Floats:
    """Return what output positions of a linear operator see, ``[G, P, K]``: evenly spread ones, the same in each sample."""
    if layout.op_type != "Conv":
        rows = x.reshape(-1, x.shape[-1])
        return rows[:: max(1, -(-len(rows) // _rows(x.shape[-1], 1)))][None]
    rank = x.ndim - 2
    kernel = layout.shape[2:]
    strides = list(attribute(node, "strides", [1] * rank))
    dilations = list(attribute(node, "dilations", [1] * rank))
    pads = _pads(node, x.shape[2:], kernel, strides, dilations)
    if any(before or after for before, after in pads):
        x = np.pad(x, [(0, 0), (0, 0), *pads])
    sizes = zip(x.shape[2:], kernel, strides, dilations, strict=True)
    out = [(n - (k - 1) * d - 1) // s + 1 for n, k, s, d in sizes]
    positions = np.arange(int(np.prod(out)))
    wanted = -(-_rows(layout.shape[1] * int(np.prod(kernel)), layout.groups) // len(x))
    positions = positions[:: max(1, -(-len(positions) // wanted))]
    corners = [axis * s for axis, s in zip(np.unravel_index(positions, out), strides, strict=True)]
    samples, channels, g, count = x.shape[0], x.shape[1], layout.groups, len(positions)
    flat, area = x.reshape(samples, channels, -1), x.shape[2:]
    seen = np.empty((int(np.prod(kernel)), samples, channels, count), np.float32)
    for number, tap in enumerate(np.ndindex(*kernel)):
        places = tuple(corner + t * d for corner, t, d in zip(corners, tap, dilations, strict=True))
        np.take(flat, np.ravel_multi_index(places, area), axis=2, out=seen[number], mode="clip")
    # [taps, N, G, C / G, P] to [G, N, P, C / G, taps]
    seen = seen.reshape(-1, samples, g, channels // g, count).transpose(2, 1, 4, 3, 0)
    return np.ascontiguousarray(seen).reshape(g, samples * count, -1)


def _rows(inputs: int, groups: int) -> int:
    return min(max(ROWS_PER_INPUT * inputs, FEWEST_ROWS), MOST_ROWS, max(1, MOST_VALUES // (inputs * groups)))


def _pads(
    node: onnx.NodeProto, size: tuple[int, ...], kernel: tuple[int, ...], strides: list[int], dilations: list[int]
) -> list[tuple[int, int]]:
    rank = len(kernel)
    mode = attribute(node, "auto_pad", b"NOTSET").decode()
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        pairs: list[tuple[int, int]] = []
        for n, k, s, d in zip(size, kernel, strides, dilations, strict=True):
            total = max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
            small, large = total // 2, total - total // 2
            pairs.append((small, large) if mode == "SAME_UPPER" else (large, small))
        return pairs
    pads = [0] * 2 * rank if mode == "VALID" else list(attribute(node, "pads", [0] * 2 * rank))
    return list(zip(pads[:rank], pads[rank:], strict=True))


@dataclass
class Moments:
    """Means and second moments of an operator's inputs, exact and as the quantised graph sees them.

    Attributes:
        covariance: Covariance of the quantised inputs, ``[G, K, K]``.
        shift: Covariance of (exact minus quantised) with quantised, ``[G, K, K]``.
        count: Positions that were seen.
    """

    covariance: Array
    shift: Array
    count: int

    @classmethod
    def of(cls, exact: Floats, quantised: Floats) -> Moments:
        """Return the moments of patches ``[G, P, K]``."""
        centred = quantised - quantised.mean(1, keepdims=True)
        gap = exact - quantised
        gap = gap - gap.mean(1, keepdims=True)
        count = quantised.shape[1]
        transposed = centred.transpose(0, 2, 1)
        return cls(transposed @ centred / count, gap.transpose(0, 2, 1) @ centred / count, count)


def channel_scales(matrix: Array, importance: Array | None = None) -> Array:
    """Return a scale for each output channel, ``[G, O, 1]``: the clipping with the least (weighted) squared error.

    Args:
        matrix: Weights ``[G, O, K]``.
        importance: Mean square of each input, ``[G, K]``; None weighs all alike.
    """
    largest = np.abs(matrix).max(-1, keepdims=True)
    largest = np.where(largest > 0, largest, 1.0)
    weights = 1.0 if importance is None else importance[:, None]
    best, best_error = largest / LARGEST, np.full(largest.shape, np.inf)
    for share in (1.0, 0.97, 0.94, 0.9, 0.86, 0.82, 0.78):
        scale = largest * share / LARGEST
        codes = np.clip(np.rint(matrix / scale), -LARGEST, LARGEST)
        error = (weights * (matrix - codes * scale) ** 2).sum(-1, keepdims=True)
        best, best_error = np.where(error < best_error, scale, best), np.minimum(error, best_error)
    return best.astype(np.float32)


def quantise_weight(matrix: Array, scale: Array) -> NDArray[np.int8]:
    """Return the nearest codes of weights ``[G, O, K]``."""
    return np.clip(np.rint(matrix / scale), -LARGEST, LARGEST).astype(np.int8)


def reconstruct(
    matrix: Array, moments: Moments, *, damping: float = 0.03, ridge: float = 2.0
) -> tuple[NDArray[np.int8], Array]:
    """Return codes ``[G, O, K]`` and scales ``[G, O, 1]`` that keep an operator's output close, not its weights.

    First the weights move to the least-squares answer for the inputs as they arrive quantised. Then, for each of several
    scales, codes are set input by input, the error of each made up for by the inputs that are still open, and settled by
    coordinate descent; each output channel takes the scale with the least output error.

    Args:
        matrix: Weights ``[G, O, K]``.
        moments: Moments of the inputs.
        damping: Share of the mean variance that is added to every variance when errors are passed on.
        ridge: The same when the weights are moved; larger values trust the calibration samples less.

    Source: E. Frantar et al., "GPTQ", 2023, algorithm 1, with inputs in order of falling variance; the shift follows
    Y. Li et al., "GPTAQ", 2025, section 3 (asymmetric calibration), as one ridge regression.
    """
    size = moments.covariance.shape[-1]
    covariance = moments.covariance.astype(np.float64 if size <= SMALL_K else np.float32)
    identity = np.eye(size, dtype=covariance.dtype)
    power = np.trace(covariance, axis1=1, axis2=2)[:, None, None] / size
    power = np.where(power > 0, power, 1.0)
    ridge *= max(1.0, ENOUGH_ROWS * size / moments.count)  # few positions say little about many inputs
    target = matrix.astype(covariance.dtype)
    target = target + target @ moments.shift @ np.linalg.inv(covariance + ridge * power * identity)
    damped = covariance + damping * power * identity
    spread = np.diagonal(damped, axis1=1, axis2=2)
    order = np.argsort(-spread, axis=1, kind="stable")  # [G, K]
    rows = np.arange(len(matrix))[:, None, None]
    damped = damped[rows, order[:, :, None], order[:, None, :]]
    target = np.take_along_axis(target, order[:, None, :], 2)
    # inverse = U^T U with U upper triangular: row i of U holds how the error of input i spreads over later inputs
    upper = np.linalg.cholesky(np.linalg.inv(damped)).transpose(0, 2, 1)
    codes, scale = _best_of_scales(target, damped, upper)
    placed = np.empty_like(codes)
    np.put_along_axis(placed, np.broadcast_to(order[:, None, :], codes.shape), codes, 2)
    return placed, scale


def _best_of_scales(target: Array, covariance: Array, upper: Array) -> tuple[NDArray[np.int8], Array]:
    """Return codes and scales with the least output error, each output channel on its own."""
    largest = np.abs(target).max(-1, keepdims=True)
    largest = np.where(largest > 0, largest, 1.0)
    best_scale = largest / LARGEST
    best_codes, best_error = np.zeros(target.shape, target.dtype), np.full(largest.shape, np.inf)
    for share in np.linspace(1.0, *((0.6, 25) if target.shape[-1] <= SMALL_K else (0.94, 2))):
        scale = (largest * share / LARGEST).astype(np.float32).astype(target.dtype)
        codes = _pass_errors_on(target, upper, scale)
        codes = _descend(target, covariance, scale, codes)
        gap = target - codes * scale
        error = ((gap @ covariance) * gap).sum(-1, keepdims=True)
        better = error < best_error
        best_codes = np.where(better, codes, best_codes)
        best_scale, best_error = np.where(better, scale, best_scale), np.minimum(error, best_error)
    return best_codes.astype(np.int8), best_scale.astype(np.float32)


def _round(values: Array) -> Array:
    return np.clip(np.rint(values), -LARGEST, LARGEST)


def _pass_errors_on(target: Array, upper: Array, scale: Array) -> Array:
    """Return codes set input by input, in blocks so that most of the work is matrix products."""
    size = target.shape[-1]
    remaining, codes = target.copy(), np.empty(target.shape, target.dtype)
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        errors = np.empty((*target.shape[:2], stop - start), target.dtype)
        for i in range(start, stop):
            column = remaining[:, :, i]
            codes[:, :, i] = _round(column / scale[:, :, 0])
            error = (column - codes[:, :, i] * scale[:, :, 0]) / upper[:, i, i][:, None]
            errors[:, :, i - start] = error
            remaining[:, :, i:stop] -= error[:, :, None] * upper[:, None, i, i:stop]
        remaining[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    return codes


def _descend(target: Array, covariance: Array, scale: Array, codes: Array) -> Array:
    """Return codes that no change of a single one improves any more (or after SWEEPS sweeps)."""
    codes = codes.copy()
    size = target.shape[-1]
    for _ in range(SWEEPS if size <= SMALL_K else 0):
        pull = (target - codes * scale) @ covariance  # [G, O, K]: how the output error pulls at each input's weight
        changed = False
        for i in range(size):
            step = pull[:, :, i] / covariance[:, i, i][:, None] / scale[:, :, 0]
            moved = _round(codes[:, :, i] + step)
            delta = moved - codes[:, :, i]
            if delta.any():
                changed = True
                codes[:, :, i] = moved
                pull -= (delta * scale[:, :, 0])[:, :, None] * covariance[:, None, i, :]
        if not changed:
            break
    return codes
