"""What Triton kernels must know of formats and schemes, as constants that they are compiled for. No kernel is here."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from narrowcast.formats import fast
from narrowcast.formats.arrays import code_dtype
from narrowcast.formats.kinds import Codebook, ElementFormat, Format, Integer, Nan
from narrowcast.formats.rows import Rows
from narrowcast.formats.rules import NanInput, Overflow, Rules
from narrowcast.formats.scales import element_max
from narrowcast.formats.scheme import Scheme
from narrowcast.formats.table import ELEMENTS

__all__ = [
    "LONGEST_BLOCK",
    "Elements",
    "Guess",
    "Scales",
    "Steps",
    "Values",
    "edge_words",
    "fits",
    "has_steps",
    "has_values",
    "scale_kind",
]

LONGEST_BLOCK = 1024  # longer rows are many programs' work
_SHORTEST_BLOCK = 16  # what a thread works on


def has_steps(format: ElementFormat) -> bool:
    """Return whether the format's steps can be counted by adding powers of two in float32."""
    return (
        isinstance(format, Format)
        and format.bits <= 16
        and format.signed
        and format.has_zero
        and format.exponent_bits <= 7
        and format.minimum_exponent >= -126
        and format.maximum_exponent + 2 + 23 - format.mantissa_bits <= 127
    )


def has_values(format: ElementFormat) -> bool:
    """Return whether arithmetic in float32 turns the format's codes into its values."""
    return (
        has_steps(format) and isinstance(format, Format) and 0 <= format.bias <= 127 and fast.exact_in_float32(format)
    )


@dataclass(frozen=True)
class Steps:
    """How numbers become codes of a floating-point format, rounded to nearest even.

    Args:
        dropped: Digits of float32 that the format lacks.
        lowest: The smallest normal number, as the bits of float32.
        limit: A number too large for every rule, as the bits of float32.
        max_code: Code of the largest number.
        too_large: Code of finite numbers beyond it.
        infinite: Code of infinity.
        nan: Code of NaN.
        payload: Whether a NaN keeps what fits of its payload.
        sign: The sign bit.
        sign_shift: From float32's sign to the format's.
        one_zero: Whether there is no negative zero.
        signed_nan: Whether a NaN keeps its sign.
    """

    dropped: int
    lowest: int
    limit: int
    max_code: int
    too_large: int
    infinite: int
    nan: int
    payload: bool
    sign: int
    sign_shift: int
    one_zero: bool
    signed_nan: bool

    @staticmethod
    @lru_cache(maxsize=64)
    def of(format: Format, rules: Rules) -> Steps:
        """Return the steps of a format; the CPU's codec says what becomes of the extremes."""
        lost = rules.nan is NanInput.ERROR and not format.has_nan
        codes = np.empty(3, code_dtype(format.bits))
        fast.encode_part(np.array([1.7e308, np.inf, 0.0 if lost else np.nan]), format, rules, codes, 0, 0)
        return Steps(
            dropped=23 - format.mantissa_bits,
            lowest=(format.minimum_exponent + 127) << 23,
            limit=(format.maximum_exponent + 2 + 127) << 23,
            max_code=format.max_code,
            too_large=int(codes[0]),
            infinite=int(codes[1]),
            nan=int(codes[2]),
            payload=format.nan is Nan.IEEE,
            sign=format.sign_bit,
            sign_shift=32 - format.bits,
            one_zero=format.nan is Nan.NEGATIVE_ZERO,
            signed_nan=format.has_nan,
        )


@dataclass(frozen=True)
class Values:
    """How codes of a floating-point format become float32 numbers.

    Args:
        shift: From the format's significand to float32's.
        rescale: Two to the power of float32's bias less the format's.
        max_code: Code of the largest number.
        mask: Exponent and significand.
        sign: The sign bit.
        sign_shift: From the format's sign to float32's.
        ieee: Whether codes above the largest number's are infinity and NaN with payloads.
        all_ones: Whether codes above the largest number's are NaN.
        one_zero: Whether negative zero's code is NaN.
    """

    shift: int
    rescale: float
    max_code: int
    mask: int
    sign: int
    sign_shift: int
    ieee: bool
    all_ones: bool
    one_zero: bool

    @staticmethod
    @lru_cache(maxsize=64)
    def of(format: Format) -> Values:
        """Return the values of a format that :func:`has_values`."""
        return Values(
            shift=23 - format.mantissa_bits,
            rescale=2.0 ** (127 - format.bias),
            max_code=format.max_code,
            mask=format.magnitude_mask,
            sign=format.sign_bit,
            sign_shift=32 - format.bits,
            ieee=format.nan is Nan.IEEE,
            all_ones=format.nan is Nan.ALL_ONES,
            one_zero=format.nan is Nan.NEGATIVE_ZERO,
        )


@dataclass(frozen=True)
class Guess:
    """A curve that gives a number's code in a codebook, or the code before it: ``start + 1/2 + u (slope + bend |u|)``.

    One look at the edge above that code decides. So fifteen edges cost a parabola, a look and a comparison.

    Args:
        shift: ``u`` is the number plus this.
        slope: In codes per unit.
        bend: In codes per square unit.
        start: A whole number of codes.
    """

    shift: float
    slope: float
    bend: float
    start: int

    @staticmethod
    @lru_cache(maxsize=64)
    def of(element: Codebook) -> Guess | None:
        """Return a curve for a codebook of up to 16 values; None where no parabola comes near enough."""
        edges = fast.codebook_edges(element, "float64")
        limit = max(abs(element.min), abs(element.max))
        x = np.concatenate([np.linspace(-limit, limit, 2001), edges, np.nextafter(edges, np.inf)])
        codes = np.searchsorted(edges, x)
        best, margin = None, 0.02  # in codes: far more than float32 rounds
        for shift, start in itertools.product(np.linspace(-0.25, 0.25, 51) * limit, range(len(edges) + 1)):
            curve = _through_middles(edges, float(shift), start)
            away = curve(x) - codes
            room = min(float((1 - np.abs(away)).min()), float(curve(x).min()), float(len(edges) + 1 - curve(x).max()))
            if room > margin:
                best, margin = curve, room
        return best if len(edges) <= 15 else None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return the curve at some numbers: its whole part is the code, or the one before."""
        u = x + self.shift
        return self.start + 0.5 + u * (self.slope + self.bend * np.abs(u))


def _through_middles(edges: np.ndarray, shift: float, start: int) -> Guess:
    """Return the curve that comes nearest to half-way between two codes at the edge between them."""
    u = edges + shift
    slope, bend = np.linalg.lstsq(np.stack([u, u * np.abs(u)], axis=1), np.arange(len(edges)) - start, rcond=None)[0]
    return Guess(shift, float(slope), float(bend), start)


@lru_cache(maxsize=64)
def edge_words(element: Codebook) -> np.ndarray:
    """Return, for each of 16 codes, the edge to the next: shape [16], int64, two float32 numbers in each.

    A number over its scale, rounded, lies above an edge if it lies, not rounded, above the middle between the edge and
    the float32 number after it. Low half: the edge; high half: from there to that middle; both times 2**100, so that
    what a number exceeds it by is at least 1. After the last code infinity and nothing.
    """
    edges = fast.codebook_edges(element, "float32").astype(np.float32)
    halves = (np.nextafter(edges, np.float32(np.inf)).astype(np.float64) - edges) / 2
    words = np.zeros((16, 2), np.float32)
    words[:, 0] = np.inf
    words[: len(edges)] = np.stack([edges * 2.0**100, halves * 2.0**100], axis=1)
    return words.view(np.int64)[:, 0]


@dataclass(frozen=True)
class Elements:
    """How scaled numbers become codes.

    Args:
        kind: ``float``, ``integer`` or ``codebook``.
        width: Bits that a code takes in memory: 4 or 8.
        steps: Of a float.
        factor: Steps of an integer per unit.
        low: An integer's lowest step.
        high: An integer's highest step.
        mask: Of an integer's code.
        edges: Fifteen numbers above which a codebook's code is the next one; infinity after the last.
        guess: A codebook's curve, where what numbers exceed its edges by can be multiplied by 2**100: to at least 1,
            without overflow.
    """

    kind: str
    width: int
    steps: Steps | None = None
    factor: float = 1.0
    low: float = 0.0
    high: float = 0.0
    mask: int = 0
    edges: tuple[float, ...] = ()
    guess: Guess | None = None

    @staticmethod
    @lru_cache(maxsize=64)
    def of(element: ElementFormat, *, fused: bool) -> Elements | None:
        """Return how the elements of a scheme are encoded; None where a kernel does not know how."""
        width = 4 if element.bits == 4 else 8
        if element.bits > 8:
            return None
        match element:
            case Format():
                known = has_steps(element) and element.maximum_exponent >= 0
                return Elements("float", width, Steps.of(element, Rules(overflow=Overflow.CLAMP))) if known else None
            case Integer():
                low, high = element.min / element.step, element.max / element.step
                mask, known = (1 << element.bits) - 1, element.signed and element.max >= 1
                return Elements("integer", width, None, 1 / element.step, low, high, mask) if known else None
            case Codebook():
                if len(element.values) > 16:
                    return None
                edges = [float(edge) for edge in fast.codebook_edges(element, "float32")]
                within = fused and all(2.0**-60 < abs(edge) < 2.0**20 for edge in edges)
                edges += [math.inf] * (15 - len(edges))
                return Elements("codebook", width, edges=tuple(edges), guess=Guess.of(element) if within else None)


@dataclass(frozen=True)
class Scales:
    """How a row's scale follows from its largest magnitude.

    Args:
        kind: ``fp32``, ``e8m0`` or ``e4m3fn``.
        largest: What the largest magnitude is scaled to.
        exponent: Its exponent.
        carry: What, added to the bits of a magnitude, carries into the exponent where a power of two is rounded up.
        tensor_max: The largest magnitude over the tensor's scale; 0 without one.
        steps: Of the scale's format, if it is a float of 8 bits.
        fused: Whether products are added without rounding (not where Triton interprets its kernels).
    """

    kind: str
    largest: float
    exponent: int
    carry: int
    tensor_max: float
    steps: Steps | None
    fused: bool

    @staticmethod
    @lru_cache(maxsize=64)
    def of(scheme: Scheme, *, fused: bool) -> Scales:
        """Return how scales of a scheme with a :func:`scale_kind` are found."""
        kind, largest, element = scale_kind(scheme), float(element_max(scheme)), scheme.element
        assert kind is not None
        word = int(np.float32(largest).view(np.int32))
        tensor_max = largest * scheme.scale.max if scheme.tensor_scale else 0.0
        steps = Steps.of(scheme.scale, Rules(overflow=Overflow.SATURATE)) if kind == "e4m3fn" else None
        digits = element.mantissa_bits if isinstance(element, Format) else element.bits - 2
        rules = {"floor": 0, "ceil": 0x7FFFFF, "even": 1 << (22 - digits), "round_up": 0x7FFFFF - (word & 0x7FFFFF)}
        return Scales(kind, largest, (word >> 23) - 127, rules[scheme.scale_rule], tensor_max, steps, fused)


@lru_cache(maxsize=64)
def scale_kind(scheme: Scheme) -> str | None:
    """Return the name of the scales' format, if kernels know it."""
    kind = scheme.scale.name
    if kind not in ("fp32", "e8m0", "e4m3fn") or scheme.scale != ELEMENTS[kind]:
        return None
    return None if scheme.tensor_scale and kind != "e4m3fn" else kind


def fits(layout: Rows, scheme: Scheme) -> bool:
    """Return whether a tensor's rows lie in memory one after the other, as long as kernels like them."""
    length, count, axis = layout.length, layout.count, layout.axis
    if axis is not None:
        at_end = axis == (len(layout.shape) - 1 if layout.last else 0)
        if not at_end or layout.padded != layout.shape[axis]:
            return False
    if not count or not length or (scheme.element.bits == 4 and length % 2):
        return False
    return length > LONGEST_BLOCK or (length >= _SHORTEST_BLOCK and length & (length - 1) == 0)
