"""Scales of rows: from the largest magnitude, by the rule of the scale's format, or by the least squared error.

Rows are arrays of shape [rows, length] of float32 or float64 numbers; scales have shape [rows].
"""

from __future__ import annotations

import numpy as np

from narrowcast.formats import fast, portable
from narrowcast.formats.arrays import code_dtype
from narrowcast.formats.engine import engine
from narrowcast.formats.kinds import Codebook, Format, Integer
from narrowcast.formats.rules import Overflow, Rules
from narrowcast.formats.scheme import Scheme
from narrowcast.formats.table import ELEMENTS

__all__ = ["absmax", "element_max", "power_of_two", "rounded_scales", "safe"]

_SATURATING = Rules(overflow=Overflow.SATURATE)


def absmax(rows: np.ndarray) -> np.ndarray:
    """Return the largest magnitude of each row; NaN if the row holds one."""
    if not rows.shape[1]:
        return np.zeros(rows.shape[0], rows.dtype)
    return (engine() if rows.dtype == np.float32 else portable).absmax(rows)


def element_max(scheme: Scheme) -> float:
    """Return what a row's largest magnitude is scaled to; with zero points, what its whole range is."""
    match scheme.element:
        case Codebook():
            return max(abs(scheme.element.min), scheme.element.max)
        case Integer():
            bits = scheme.element.bits - scheme.symmetric
            return ((1 << bits) - 1) * scheme.element.step
        case Format():
            return scheme.element.max


def rounded_scales(largest: np.ndarray, scheme: Scheme, tensor_scale: float) -> np.ndarray:
    """Return each row's scale, as it will be stored (and read back), for rows of these largest magnitudes, or ranges.

    A row of zeros gets the smallest scale that its format has (0 in FP32). NaN or infinity in a row gives a NaN scale.
    """
    if scheme.scale == ELEMENTS["e8m0"]:
        return power_of_two(largest, scheme)
    with np.errstate(invalid="ignore"):
        wanted = largest / (element_max(scheme) * tensor_scale)
    if scheme.scale.bits == 32:
        return wanted.astype(np.float32)
    lost = wanted > scheme.scale.max if scheme.scale.bits > 8 else np.isinf(wanted)
    wanted = np.where(lost, np.nan, wanted)
    # A block that is not all zeros keeps the smallest scale rather than none.
    wanted = np.where(largest > 0, np.maximum(wanted, scheme.scale.smallest_subnormal), wanted)
    return _stored(wanted, scheme.scale)


def _stored(values: np.ndarray, format: Format) -> np.ndarray:
    codes = np.empty(values.shape, code_dtype(format.bits))
    fast.encode_part(np.ascontiguousarray(values), format, _SATURATING, codes, 0, 0)
    return fast.decode(codes, format, "float32")


def power_of_two(largest: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Return the shared power of two of each row, by the scheme's rule (OCP MX 1.0, section 6.3, gives ``floor``).

    ``floor``: the largest magnitude's exponent less the element's largest exponent: the largest may saturate.
    ``ceil``: the exponent rounded up. ``even``: the magnitude is first rounded to the element's significand, so that
    one that would round over the edge takes the next exponent. ``round_up``: the smallest power of two with which
    nothing saturates (NVIDIA's choice).
    """
    magnitude = largest.astype(np.float64)
    usable = np.isfinite(magnitude) & (magnitude > 0)
    magnitude = np.where(usable, magnitude, 1.0)
    largest_exponent = _element_exponent(scheme)
    match scheme.scale_rule:
        case "floor":
            exponent = _floor_log2(magnitude) - largest_exponent
        case "ceil":
            exponent = -_floor_log2_of_inverse(magnitude) - largest_exponent
        case "even":
            exponent = _floor_log2(_rounded_significand(magnitude, scheme)) - largest_exponent
        case _:
            exponent = -_floor_log2_of_inverse(magnitude / element_max(scheme))
    scale = np.ldexp(1.0, np.clip(exponent, -127, 127))
    scale = np.where(largest == 0, 2.0**-127, scale)
    return np.where(np.isfinite(largest), scale, np.nan).astype(np.float32)


def _element_exponent(scheme: Scheme) -> int:
    if isinstance(scheme.element, Format):
        return scheme.element.maximum_exponent
    return int(np.frexp(element_max(scheme))[1]) - 1


def _floor_log2(x: np.ndarray) -> np.ndarray:
    return np.frexp(x)[1] - 1


def _floor_log2_of_inverse(x: np.ndarray) -> np.ndarray:
    """Return minus the smallest integer that is not below ``log2(x)``."""
    significand, exponent = np.frexp(x)
    return -(exponent - (significand == 0.5))


def _rounded_significand(x: np.ndarray, scheme: Scheme) -> np.ndarray:
    digits = scheme.element.mantissa_bits if isinstance(scheme.element, Format) else scheme.element.bits - 2
    significand, exponent = np.frexp(x)
    steps = np.rint(significand * 2.0 ** (digits + 1))
    return np.ldexp(steps, exponent - (digits + 1))


def safe(scales: np.ndarray) -> np.ndarray:
    """Return scales to divide by: 1 in place of 0, whose rows hold nothing but zeros."""
    return np.where(scales == 0, scales.dtype.type(1), scales)
