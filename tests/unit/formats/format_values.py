"""Where formats can go wrong: every value, every rounding boundary, and what lies one ulp beside them.

The values come from the scalar reference, which ``test_decode.py`` holds against independent libraries.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from narrowcast.formats import reference
from narrowcast.formats.arrays import code_dtype
from narrowcast.formats.kinds import Codebook, ElementFormat, Format, Integer
from narrowcast.formats.rules import Overflow, Rounding
from narrowcast.formats.table import BLOCKS, ELEMENTS

FLOATS = {name: item for name, item in ELEMENTS.items() if isinstance(item, Format)}
INTEGERS = {name: item for name, item in ELEMENTS.items() if isinstance(item, Integer)}
CODEBOOKS = {name: item for name, item in ELEMENTS.items() if isinstance(item, Codebook)}
# User's own: tiny ones, one without subnormal digits, unsigned ones, odd biases, one wider than a table's seven digits.
OWN = {
    item.name: item
    for item in (
        Format(2, 0, nan="none", name="own_e2m0"),
        Format(1, 2, nan="none", name="own_e1m2"),
        Format(3, 0, nan="negative_zero", name="own_e3m0fnuz"),
        Format(2, 5, nan="all_ones", name="own_e2m5fn"),
        Format(4, 4, signed=False, name="own_ue4m4"),
        Format(5, 3, signed=False, nan="none", name="own_ue5m3"),
        Format(5, 2, signed=False, nan="all_ones", has_zero=False, name="own_ue5m2_no_zero"),
        Format(6, 9, 40, name="own_e6m9b40"),
        Format(8, 3, 10, name="own_e8m3b10"),
        Format(9, 4, 300, nan="all_ones", name="own_e9m4b300"),
        Integer(5, name="own_int5"),
        Integer(12, signed=False, fraction_bits=3, name="own_uint12q3"),
        Integer(16, fraction_bits=20, name="own_int16q20"),
        Codebook("own_book", (-3.0, -1.0, -0.125, 0.0, 0.5, 4.0, 4.5)),
        Codebook("own_ramp", tuple((index - 20) * 0.75 for index in range(50))),
        BLOCKS["mxint8"].element,
    )
}
SMALL = {name: item for name, item in ELEMENTS.items() if item.bits <= 16} | OWN
ROUNDINGS = [item.value for item in Rounding if item is not Rounding.STOCHASTIC]


def overflows(format: ElementFormat) -> list[str]:
    """Return the overflow rules that the format can follow."""
    names = [Overflow.IEEE, Overflow.SATURATE, Overflow.CLAMP]
    if isinstance(format, Format) and format.has_nan:
        names.append(Overflow.NAN)
    if isinstance(format, Integer):
        names.append(Overflow.WRAP)
    return [name.value for name in names]


def all_codes(format: ElementFormat) -> np.ndarray:
    """Return every code of a format of up to 19 bits."""
    count = len(format.values) if isinstance(format, Codebook) else 1 << format.bits
    return np.arange(count, dtype=code_dtype(format.bits))


@lru_cache(maxsize=128)
def reference_values(format: ElementFormat) -> np.ndarray:
    """Return what the reference says that each code is worth, in the order of the codes."""
    return np.array([reference.decode(int(code), format) for code in all_codes(format)])


@lru_cache(maxsize=128)
def finite_values(format: ElementFormat) -> np.ndarray:
    """Return the distinct finite values in increasing order, one zero among them."""
    values = reference_values(format)
    return np.unique(values[np.isfinite(values)] + 0.0)


def boundary_values(format: ElementFormat, dtype: str = "float64", stride: int = 1) -> np.ndarray:
    """Return every value, midpoint and quarter point, the numbers beside each, and those beyond the largest.

    Args:
        format: Of up to 16 bits.
        dtype: ``float64``, ``float32`` or ``float16``: "beside" is one ulp of it.
        stride: Of the gaps between values, take one in so many; those at both ends and around zero always.
    """
    values = finite_values(format)
    gap = values[-1] - values[-2]
    reach = np.concatenate([[values[0] - (values[1] - values[0])], values, [values[-1] + gap]])
    kept = np.arange(len(reach) - 1)
    zero = np.searchsorted(values, 0.0)
    kept = kept[(kept % stride == 0) | (kept < 8) | (kept >= len(kept) - 8) | (np.abs(kept - zero) < 8)]
    low, step = reach[:-1][kept], np.diff(reach)[kept]
    points = np.concatenate([low, low + step / 4, low + step / 2, low + step / 4 * 3, reach[-1:], extremes()])
    with np.errstate(over="ignore", under="ignore"):
        points = points.astype(dtype)
        beside = [np.nextafter(points, points.dtype.type(side)) for side in (-np.inf, np.inf)]
    found = np.concatenate([points, *beside])
    found = np.concatenate([found, -found])
    return found[~np.isnan(found)]


def extremes() -> np.ndarray:
    """Return both zeros, infinities, the smallest and the largest numbers of the usual widths."""
    found = [0.0, np.inf]
    for info in (np.finfo(np.float64), np.finfo(np.float32), np.finfo(np.float16)):
        found += [float(info.smallest_subnormal), float(info.tiny), float(info.max)]
    return np.array([*found, *(-x for x in found)])


def same_bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return where two float64 arrays agree, zeros by their sign too; any NaN agrees with any NaN."""
    return ((a == b) & (np.signbit(a) == np.signbit(b))) | (np.isnan(a) & np.isnan(b))


def assert_same(found: np.ndarray, wanted: np.ndarray, x: np.ndarray, same: np.ndarray | None = None) -> None:
    """Fail with the first few inputs whose results differ."""
    wrong = ~(found == wanted if same is None else same)
    shown = [
        f"{float(x[i])!r} ({float(x[i]).hex()}): {found[i]!r}, not {wanted[i]!r}" for i in np.flatnonzero(wrong)[:5]
    ]
    assert not wrong.any(), f"{wrong.sum()} of {len(x)} differ:\n" + "\n".join(shown)
