"""Which range of numbers the codes cover: the whole of it, nearly all of it, or what costs the least squared error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from narrowcast.formats import fast
from narrowcast.formats.arrays import code_dtype
from narrowcast.formats.codebooks import codebook_edges, few
from narrowcast.formats.engine import engine
from narrowcast.formats.kinds import Codebook, Format, Integer
from narrowcast.formats.rules import NanInput, Overflow, Rounding, Rules
from narrowcast.formats.scales import absmax, rounded_scales, safe
from narrowcast.formats.scheme import Scheme
from narrowcast.formats.table import ELEMENTS
from narrowcast.formats.tables import by_table, encoding_table

__all__ = ["Chosen", "choose", "element_codes", "element_values", "has_zero_points"]

_SHRINKS = np.linspace(1.15, 0.25, 73)  # how much of the largest magnitude is covered
_EXPONENTS = (-2, -1, 0, 1)  # neighbours of a power of two
_NEIGHBOURS = range(-6, 7)  # neighbours of a narrow scale, in its own codes
_BATCH = 1 << 19  # elements judged at a time


class Chosen(NamedTuple):
    """A scale for each row, and a zero point where the scheme has one."""

    scales: np.ndarray  # [rows], float32
    zero_points: np.ndarray | None  # [rows], int32


def choose(rows: np.ndarray, scheme: Scheme, weights: np.ndarray | None, tensor_scale: float) -> Chosen:
    """Return the scales (and zero points) of rows.

    Args:
        rows: Numbers, shape [rows, length].
        scheme: How they are chosen.
        weights: Importance of each element, shape [rows, length]; read by ``mse`` alone.
        tensor_scale: The tensor's own scale; 1 without one.
    """
    low, high = _bounds(rows, scheme)
    first = _covering(low, high, scheme, tensor_scale)
    if scheme.range != "mse" or not rows.shape[1]:
        return first
    best, best_error = first, _errors(rows, first, scheme, weights, tensor_scale)
    for candidate in _candidates(low, high, first, scheme, tensor_scale):
        error = _errors(rows, candidate, scheme, weights, tensor_scale)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        zero_points = best.zero_points
        if zero_points is not None and candidate.zero_points is not None:
            zero_points = np.where(better, candidate.zero_points, zero_points)
        best = Chosen(np.where(better, candidate.scales, best.scales), zero_points)
    return best


def has_zero_points(scheme: Scheme) -> bool:
    """Return whether rows have a zero point: asymmetric integers, and unsigned ones, whose zero is in their middle."""
    return isinstance(scheme.element, Integer) and not (scheme.symmetric and scheme.element.signed)


def _bounds(rows: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and highest number to cover in each row; zero is always covered."""
    zero = rows.dtype.type(0)
    if not rows.shape[1]:
        nothing = np.zeros(rows.shape[0], rows.dtype)
        return nothing, nothing
    if scheme.range == "percentile":
        outside = (100 - scheme.percentile) / 2
        low, high = np.percentile(rows, [outside, 100 - outside], axis=1).astype(rows.dtype)
        if scheme.symmetric:
            high = np.percentile(np.abs(rows), scheme.percentile, axis=1).astype(rows.dtype)
            low = -high
        return np.minimum(low, zero), np.maximum(high, zero)
    if scheme.symmetric:
        # Long rows are not copied for their magnitudes; adding zero makes a negative one positive.
        short = rows.shape[1] <= 1024
        high = absmax(rows) if short else np.maximum(rows.max(axis=1), -rows.min(axis=1)) + zero
        return -high, high
    return np.minimum(rows.min(axis=1), zero), np.maximum(rows.max(axis=1), zero)


def _covering(low: np.ndarray, high: np.ndarray, scheme: Scheme, tensor_scale: float) -> Chosen:
    if not has_zero_points(scheme):
        return Chosen(rounded_scales(high, scheme, tensor_scale), None)
    element = scheme.element
    assert isinstance(element, Integer)
    lowest, highest = round(element.min), round(element.max)
    if scheme.symmetric:
        scales = rounded_scales(high, scheme, tensor_scale)
        return Chosen(scales, np.full(scales.shape, 1 << (element.bits - 1), np.int32))
    with np.errstate(invalid="ignore", over="ignore"):
        scales = rounded_scales(high.astype(np.float64) - low, scheme, tensor_scale)
        zero = lowest - np.rint(low / safe(scales))
        zero_points = np.clip(np.nan_to_num(zero), lowest, highest).astype(np.int32)
    return Chosen(scales, zero_points)


def _candidates(
    low: np.ndarray, high: np.ndarray, first: Chosen, scheme: Scheme, tensor_scale: float
) -> Iterator[Chosen]:
    if not scheme.symmetric:  # zero points move with the scales
        for shrink in _SHRINKS.astype(high.dtype):
            yield _covering(low * shrink, high * shrink, scheme, tensor_scale)
            yield _covering(low * shrink, high, scheme, tensor_scale)
            yield _covering(low, high * shrink, scheme, tensor_scale)
    elif scheme.scale == ELEMENTS["e8m0"]:
        for exponent in _EXPONENTS:
            moved = np.clip(first.scales.astype(np.float64) * 2.0**exponent, 2.0**-127, 2.0**127)
            yield first._replace(scales=moved.astype(np.float32))
    elif scheme.scale.bits == 8:
        yield from (first._replace(scales=scales) for scales in _neighbouring(first.scales, scheme.scale))
    else:
        for shrink in _SHRINKS.astype(high.dtype):
            yield _covering(low * shrink, high * shrink, scheme, tensor_scale)


def _neighbouring(scales: np.ndarray, format: Format) -> Iterator[np.ndarray]:
    codes = np.empty(scales.shape, np.uint8)
    fast.encode_part(scales.astype(np.float64), format, Rules(overflow=Overflow.SATURATE), codes, 0, 0)
    for step in _NEIGHBOURS:
        moved = np.clip(codes.astype(np.int64) + step, 1, format.max_code).astype(codes.dtype)
        yield np.where(scales > 0, fast.decode(moved, format, "float32"), scales)


def _errors(
    rows: np.ndarray, chosen: Chosen, scheme: Scheme, weights: np.ndarray | None, tensor_scale: float
) -> np.ndarray:
    """Return the (weighted) squared error of each row under these scales: shape [rows], float64."""
    total = np.zeros(rows.shape[0])
    scales = chosen.scales * np.float32(tensor_scale)
    step = max(_BATCH // rows.shape[0], 1)
    for start in range(0, rows.shape[1], step):
        part = np.ascontiguousarray(rows[:, start : start + step])
        codes = element_codes(part, scales, chosen.zero_points, scheme, 0, 0)
        difference = element_values(codes, scales, chosen.zero_points, scheme, part.dtype.name) - part
        square = np.square(difference, dtype=np.float64)
        if weights is not None:
            square *= weights[:, start : start + step]
        total += square.sum(axis=1)
    return total


def element_codes(
    part: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None, scheme: Scheme, start: int, seed: int
) -> np.ndarray:
    """Return the codes of elements under their rows' full scales.

    Args:
        part: Numbers, shape [rows, length]; float32 or float64, in which they are divided by the scale.
        scales: Shape [rows], float32; a NaN scale makes all codes of its row zero's.
        zero_points: Shape [rows], or None.
        scheme: The elements' format and rounding.
        start: Position of the first number, for stochastic rounding.
        seed: Of stochastic rounding.
    """
    codes = np.empty(part.shape, code_dtype(scheme.element.bits))
    divisors = safe(scales)
    rules = Rules(Rounding.parse(scheme.rounding), Overflow.CLAMP, NanInput.ZERO)
    if not _fused(part, divisors, zero_points, scheme, rules, codes):
        with np.errstate(over="ignore"):  # infinity is clamped like any other number
            scaled = part / divisors.astype(part.dtype)[:, None]
        if zero_points is None:
            fast.encode_part(scaled.reshape(-1), scheme.element, rules, codes.reshape(-1), start, seed)
        else:
            steps = np.clip(np.rint(scaled) + zero_points[:, None], scheme.element.min, scheme.element.max)
            codes[...] = steps.astype(np.int32) & ((1 << scheme.element.bits) - 1)
    broken = np.isnan(scales)
    if broken.any():
        codes[broken] = 0
    return codes


def _fused(
    part: np.ndarray,
    divisors: np.ndarray,
    zero_points: np.ndarray | None,
    scheme: Scheme,
    rules: Rules,
    codes: np.ndarray,
) -> bool:
    """Write the codes with one loop that divides and rounds, if there is one for the scheme; return whether."""
    if part.dtype != np.float32:
        return False
    element = scheme.element
    nearest = rules.rounding is Rounding.NEAREST_EVEN
    if isinstance(element, Codebook):
        if nearest and few(element):
            engine().codes_above_scaled(part, divisors, codebook_edges(element, "float32"), codes)
        return nearest and few(element)
    if zero_points is None and by_table(element, rules):
        engine().codes_of_scaled(part, divisors, encoding_table(element, rules), codes)
        return True
    if isinstance(element, Integer) and nearest and not element.fraction_bits:
        zeros = np.zeros(part.shape[0], np.int32) if zero_points is None else zero_points
        lowest, highest = round(element.min), round(element.max)
        engine().rounded_steps(part, divisors, zeros, lowest, highest, (1 << element.bits) - 1, codes)
        return True
    return False


def element_values(
    codes: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None, scheme: Scheme, dtype: str
) -> np.ndarray:
    """Return what codes stand for under their rows' full scales: shape [rows, length], ``dtype``."""
    values = fast.decode(codes, scheme.element, dtype)
    if zero_points is not None:
        values -= zero_points[:, None].astype(dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        values *= scales.astype(dtype)[:, None]
    return values
