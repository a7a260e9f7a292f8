"""What a format did to a tensor: how large the error is, and what became of the numbers at the edges."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from narrowcast.errors import FormatError
from narrowcast.formats import fast
from narrowcast.formats.arrays import on_device, opened
from narrowcast.formats.engine import engine
from narrowcast.formats.kinds import Codebook, ElementFormat, Format, Integer
from narrowcast.formats.portable import ErrorSums
from narrowcast.formats.rules import Rules
from narrowcast.formats.table import ELEMENTS, element
from narrowcast.formats.tensor import QuantizedTensor, host, pieces

__all__ = ["ErrorReport", "ErrorTotals", "add_error", "error"]


@dataclass(frozen=True)
class ErrorReport:
    """The error of a tensor in a format. Shares are of the finite elements of the original.

    Args:
        count: Elements of the original that are finite: those that are judged.
        not_finite: Elements of the original that are NaN or infinite.
        sqnr_db: Signal over quantisation noise, ``10 log10(sum x^2 / sum (x - y)^2)``; infinite without any error.
        mse: Mean squared error; infinite if a finite number became infinite or NaN.
        max_abs: Largest absolute error.
        relative: Root of the squared error over the root of the signal, ``|x - y| / |x|`` in the 2-norm.
        overflowed: Share beyond the largest number (with its scale) by more than half a step: what rounding to the
            nearest cannot excuse.
        underflowed: Share that was not zero and became zero.
        subnormal: Share that became a subnormal number; None where the format has none or is not known.
        zero: Share that is zero afterwards.
        code_entropy: Entropy of the codes in bits, of ``bits`` possible; None where the codes are not known or too many.
        bits: Width of a code; None where the format is not known.
    """

    count: int
    not_finite: int
    sqnr_db: float
    mse: float
    max_abs: float
    relative: float
    overflowed: float
    underflowed: float
    subnormal: float | None
    zero: float
    code_entropy: float | None
    bits: int | None


@dataclass
class ErrorTotals:
    """Sums from which an :class:`ErrorReport` follows, so that a tensor can be judged piece by piece."""

    bits: int | None = None
    count: int = 0
    not_finite: int = 0
    signal: float = 0.0
    noise: float = 0.0
    max_abs: float = 0.0
    overflowed: int = 0
    underflowed: int = 0
    subnormal: int | None = None
    zero: int = 0
    codes: np.ndarray | None = field(default=None, repr=False)

    def add(
        self,
        x: np.ndarray,
        y: np.ndarray,
        codes: np.ndarray | None,
        reach: tuple[np.ndarray, np.ndarray],
        below_normal: np.ndarray | None,
    ) -> None:
        """Count one piece: as many rows as there are limits, one after the other.

        Args:
            x: The original numbers, shape [n], float32 or float64.
            y: What they became, shape [n], of the same dtype.
            codes: Their codes, shape [n]; None if not known.
            reach: Lowest and highest number that rounding takes into the range, of each row: shape [rows], float64.
            below_normal: Smallest normal magnitude, of each row; None without subnormals.
        """
        low, high = reach
        smallest = np.zeros_like(low) if below_normal is None else below_normal
        shape = (low.size, x.size // max(low.size, 1))
        originals, became = x.reshape(shape), y.reshape(shape)
        lost = 0
        for rows, columns, _ in pieces(shape, aligned=False):
            limits = low[rows], high[rows], smallest[rows]
            sums = engine().errors(originals[rows, columns], became[rows, columns], *limits)
            self._add(sums, below_normal is not None)
            lost += sums.not_finite
        if codes is not None and self.bits is not None:
            used = engine().counted(codes[np.isfinite(x)] if lost else codes, 1 << self.bits)
            self.codes = used if self.codes is None else self.codes + used

    def _add(self, sums: ErrorSums, with_subnormals: bool) -> None:
        self.count += sums.finite
        self.not_finite += sums.not_finite
        self.signal += sums.signal
        self.noise += math.inf if math.isnan(sums.noise) else sums.noise  # a finite number became NaN
        self.max_abs = math.inf if math.isnan(sums.noise) else max(self.max_abs, sums.largest)
        self.overflowed += sums.overflowed
        self.zero += sums.zero
        self.underflowed += sums.underflowed
        if with_subnormals:
            self.subnormal = (self.subnormal or 0) + sums.subnormal

    def report(self) -> ErrorReport:
        """Return what the sums say so far; an empty tensor has no error."""
        n = max(self.count, 1)
        noiseless = self.noise == 0
        ratio = math.inf if noiseless else self.signal / self.noise
        return ErrorReport(
            count=self.count,
            not_finite=self.not_finite,
            sqnr_db=math.inf if noiseless else 10 * math.log10(ratio) if ratio > 0 else -math.inf,
            mse=self.noise / n,
            max_abs=self.max_abs,
            relative=0.0 if noiseless else math.sqrt(1 / ratio) if ratio > 0 else math.inf,
            overflowed=self.overflowed / n,
            underflowed=self.underflowed / n,
            subnormal=None if self.subnormal is None else self.subnormal / n,
            zero=self.zero / n,
            code_entropy=None if self.codes is None else _entropy(self.codes),
            bits=self.bits,
        )


def error(x: Any, y: Any, format: str | ElementFormat | None = None) -> ErrorReport:
    """Return the error of ``y`` against the original ``x``.

    Args:
        x: The original: a NumPy array, a torch tensor or Python numbers.
        y: What it became: a :class:`QuantizedTensor`, or an array that :func:`cast` gave.
        format: For a cast: the format, without which subnormals, codes and the reach are not known.

    Raises:
        FormatError: Different shapes.
    """
    totals = ErrorTotals()
    add_error(totals, x, y, format)
    return totals.report()


def add_error(totals: ErrorTotals, x: Any, y: Any, format: str | ElementFormat | None = None) -> None:
    """Add one piece of a tensor to the totals; takes what :func:`error` takes."""
    original = _floats(x)
    if isinstance(y, QuantizedTensor):
        _same_shape(original.shape, y.shape)
        _add_quantized(totals, original.reshape(-1), y)
        return
    became = _floats(y)
    _same_shape(original.shape, became.shape)
    _add_cast(totals, original.reshape(-1), became.reshape(-1), None if format is None else element(format))


def _add_cast(totals: ErrorTotals, x: np.ndarray, y: np.ndarray, format: ElementFormat | None) -> None:
    if x.dtype != y.dtype:
        x, y = x.astype(np.float64), y.astype(np.float64)
    if format is None:
        totals.add(x, y, None, (np.array([-math.inf]), np.array([math.inf])), None)
        return
    totals.bits = format.bits
    codes = None
    if format.bits <= 16 and not np.isnan(y).any():
        source = opened(y)
        codes = fast.encode(source, fast.Encoding.of(format, Rules.of(format)), 0)
    below = None
    if isinstance(format, Format) and format.has_subnormals:
        below = np.array([format.smallest_normal])
    low, high = _reach(format)
    totals.add(x, y, codes, (np.array([low]), np.array([high])), below)


def _add_quantized(totals: ErrorTotals, x: np.ndarray, q: QuantizedTensor) -> None:
    rows, form = q.rows, q.scheme.element
    totals.bits = form.bits
    y = _floats(q.dequantize(x.dtype.name)).reshape(-1)
    codes = rows.without_padding(host(q.codes)).reshape(-1)
    scales = rows.scales_apart(host(q.scales)).astype(np.float64)
    zeros = 0.0 if q.zero_points is None else rows.scales_apart(host(q.zero_points)).astype(np.float64)
    low, high = ((end - zeros) * scales for end in _reach(form))
    below = None
    if isinstance(form, Format) and form.has_subnormals:
        below = form.smallest_normal * scales
    if not (rows.in_order and rows.stored_shape == rows.shape):  # then each element is a row
        low, high = _spread(q, low), _spread(q, high)
        below = None if below is None else _spread(q, below)
    totals.add(x, y, codes, (low, high), below)


def _reach(format: ElementFormat) -> tuple[float, float]:
    """Return the lowest and highest number that rounding to the nearest takes into the range."""
    match format:
        case Format():
            step = math.ldexp(1.0, format.maximum_exponent - format.mantissa_bits)
            return format.min - step / 2 * format.signed, format.max + step / 2
        case Integer():
            return format.min - format.step / 2, format.max + format.step / 2
        case Codebook():
            values = format.values
            return values[0] - (values[1] - values[0]) / 2, values[-1] + (values[-1] - values[-2]) / 2


def _spread(q: QuantizedTensor, values: np.ndarray) -> np.ndarray:
    """Return one value per row as one per element."""
    rows = q.rows
    spread = np.repeat(values, rows.length).reshape(rows.count, rows.length)
    return rows.without_padding(rows.together(spread)).reshape(-1)


def _entropy(used: np.ndarray) -> float:
    share = used[used > 0] / used.sum()
    return max(0.0, float(-(share * np.log2(share)).sum()))


def _floats(x: Any) -> np.ndarray:
    source = opened(_tohost(x))
    if source.coded is not None:
        return fast.decode(source.array, ELEMENTS[source.coded], "float32")
    return np.ascontiguousarray(source.array, np.float32 if source.array.dtype == np.float16 else None)


def _tohost(x: Any) -> Any:
    return x.cpu() if on_device(x) else x


def _same_shape(expected: tuple[int, ...], given: tuple[int, ...]) -> None:
    if tuple(expected) != tuple(given):
        raise FormatError(
            f"an original of shape {list(expected)} and a result of shape {list(given)}", allowed="equal shapes"
        )
