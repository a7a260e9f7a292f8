"""NormalFloat tables, derived as QLoRA's authors derived theirs (Dettmers et al., 2023, section 3 and appendix E).

The positive half takes one quantile more than the negative one, evenly spaced between 1/2 and an offset that keeps
the outermost quantile finite; zero is added, and everything is divided by the largest. The authors' offset averages
the two ways of cutting a 4-bit table's tails: ``1 - (1/(2*15) + 1/(2*16)) / 2``.
"""

from __future__ import annotations

import struct
from statistics import NormalDist

__all__ = ["normal_float"]


def normal_float(bits: int) -> tuple[float, ...]:
    """Return the ``2**bits`` values of NormalFloat, increasing from -1 to 1, each a float32 number.

    Args:
        bits: 2 to 8. With 4, the values are QLoRA's, bit for bit; this needs the authors' own arithmetic: an offset of
            seven digits and quantiles spaced in float32.
    """
    outer = round(1 - (1 / (2 * (2**bits - 1)) + 1 / (2 * 2**bits)) / 2, 7)
    half = 2 ** (bits - 1)
    upper = [_quantile(p) for p in _spaced(outer, half + 1)[:-1]]
    lower = [-_quantile(p) for p in _spaced(outer, half)[:-1]]
    values = sorted(_float32(value) for value in (*lower, 0.0, *upper))
    return tuple(_float32(value / values[-1]) for value in values)


def _quantile(probability: float) -> float:
    return NormalDist().inv_cdf(probability)


def _spaced(start: float, count: int) -> list[float]:
    """Return ``count`` float32 numbers from ``start`` to 1/2, each counted from the nearer end."""
    first, last = _float32(start), 0.5
    step = _float32(_float32(last - first) / (count - 1))
    near = [_float32(first + _float32(step * place)) for place in range(count // 2)]
    return near + [_float32(last - _float32(step * (count - 1 - place))) for place in range(count // 2, count)]


def _float32(value: float) -> float:
    """Return the nearest float32 number; one operation on two of them, rounded so, is float32's own."""
    return struct.unpack("f", struct.pack("f", value))[0]
