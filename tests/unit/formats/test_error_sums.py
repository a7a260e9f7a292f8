"""The sums that an error report is made of: NumPy's loops, compiled ones, and the definition written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from format_engines import running_on

import narrowcast.formats as nf
from narrowcast.formats import compiled, portable

SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 1e-30, 3e38, -3e38, 0.5, -7.0]


def written_out(x: np.ndarray, y: np.ndarray, low: np.ndarray, high: np.ndarray, smallest: np.ndarray) -> list[float]:
    sums = [0, 0, 0.0, 0.0, 0.0, 0, 0, 0, 0]
    for row in range(x.shape[0]):
        for number, became in zip(x[row].tolist(), y[row].tolist(), strict=True):
            if not math.isfinite(number):
                sums[1] += 1
                continue
            error = number - became
            sums[0] += 1
            sums[2] += number * number
            sums[3] += error * error
            sums[4] = max(sums[4], abs(error))
            sums[5] += number < low[row] or number > high[row]
            sums[6] += became == 0
            sums[7] += became == 0 and number != 0
            sums[8] += 0 < abs(became) < smallest[row]
    return sums


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 999), (40, 16), (7, 65), (300, 1), (3, 0), (0, 0)])
@pytest.mark.parametrize("broken", [False, True])
def test_sums_are_those_of_the_definition(dtype: str, shape: tuple[int, int], broken: bool) -> None:
    rng = np.random.default_rng(7)
    x = rng.standard_normal(shape).astype(dtype)
    if broken and x.size:
        x.flat[rng.integers(0, x.size, 20)] = rng.choice(np.array(SPECIAL, dtype), 20)
    with np.errstate(over="ignore", invalid="ignore"):
        y = np.round(x * 4) / 4
    low, high, smallest = -rng.uniform(1, 3, shape[0]), rng.uniform(1, 3, shape[0]), rng.uniform(0, 1, shape[0])
    wanted = written_out(x, y, low, high, smallest)
    for loops in (portable, compiled):
        found = loops.errors(x, y, low, high, smallest)
        assert list(found[:2]) == wanted[:2]
        assert found[2:5] == pytest.approx(wanted[2:5], rel=1e-12)
        assert list(found[4:]) == wanted[4:]


def test_squares_beyond_float64_and_numbers_that_became_nan() -> None:
    limits = np.array([-1.0]), np.array([1.0]), np.array([0.0])
    for loops in (portable, compiled):
        huge = loops.errors(np.array([[1e200, 2.0]]), np.array([[1e200, np.inf]]), *limits)
        assert (huge.finite, huge.signal, huge.noise, huge.largest) == (2, math.inf, math.inf, math.inf)
        lost = loops.errors(np.array([[1.0, 2.0]]), np.array([[np.nan, 2.0]]), *limits)
        assert math.isnan(lost.noise)
        assert lost.overflowed == 1
    for engine in ("portable", "compiled"):
        with running_on(engine):
            assert nf.error([1.0, 2.0], [np.nan, 2.0]).max_abs == math.inf


@pytest.mark.parametrize(("bits", "dtype"), [(4, "uint8"), (8, "uint8"), (12, "uint16"), (16, "uint16")])
@pytest.mark.parametrize("size", [0, 1, 6, 1001])
def test_codes_are_counted(bits: int, dtype: str, size: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, size).astype(dtype)
    codes[: size // 2] = (1 << bits) - 1
    for loops in (portable, compiled):
        found = loops.counted(codes, 1 << bits)
        assert found.shape == (1 << bits,)
        assert found.sum() == size
        assert all(found[code] == count for code, count in zip(*np.unique(codes, return_counts=True), strict=True))


@pytest.mark.parametrize("name", ["nf4", "nvfp4", "mxfp8_e4m3", "int8", "int4"])
@pytest.mark.parametrize("axis", [0, -1])
def test_reports_do_not_depend_on_the_loops(name: str, axis: int) -> None:
    x = np.random.default_rng(1).standard_t(3, (48, 50)).astype(np.float32)
    x[3, 4] = 1e-30
    q = nf.quantize(x, name, block=16, axis=axis, pad=True)
    reports = []
    for engine in ("portable", "compiled"):
        with running_on(engine):
            reports.append(nf.error(x, q))
    first, second = reports
    assert (first.mse, first.sqnr_db) == pytest.approx((second.mse, second.sqnr_db), rel=1e-12)
    for field in ("count", "overflowed", "underflowed", "subnormal", "zero", "code_entropy", "max_abs"):
        assert getattr(first, field) == getattr(second, field), field
