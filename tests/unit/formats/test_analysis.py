"""The error report against sums written out, and against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

import narrowcast.formats as nf
from narrowcast.errors import FormatError
from narrowcast.formats.analysis import ErrorTotals, add_error


def test_the_sums_are_what_they_say() -> None:
    x = np.array([1.0, -2.0, 3.0, 0.001, 0.0])
    y = np.array([1.5, -2.0, 2.0, 0.0, 0.0])
    report = nf.error(x, y)
    noise = 0.25 + 1 + 1e-6
    signal = 14 + 1e-6
    assert report.mse == pytest.approx(noise / 5)
    assert report.max_abs == 1
    assert report.relative == pytest.approx(math.sqrt(noise / signal))
    assert report.sqnr_db == pytest.approx(10 * math.log10(signal / noise))
    assert (report.zero, report.underflowed, report.count) == (0.4, 0.2, 5)
    assert (report.subnormal, report.code_entropy, report.bits) == (None, None, None)


def test_shares_of_a_cast() -> None:
    x = np.array([1.0, 2.0**-7, 2.0**-11, -0.0, 500.0, -1e9, 448.0, 460.0])
    report = nf.error(x, nf.cast(x, "e4m3fn"), "e4m3fn")
    assert report.overflowed == 2 / 8  # 460 is rounded to 448 without any clamping
    assert report.subnormal == 1 / 8
    assert (report.underflowed, report.zero) == (1 / 8, 2 / 8)
    infinite = nf.error(x, nf.cast(x, "e5m2"), "e5m2")
    assert infinite.overflowed == 1 / 8
    assert (infinite.mse, infinite.sqnr_db) == (math.inf, -math.inf)


def test_a_uniform_quantiser_errs_by_a_twelfth_of_its_squared_step() -> None:
    x = np.random.default_rng(0).uniform(-1, 1, 400_000)
    quantized = nf.quantize(x, "int8")
    step = float(quantized.scales)
    assert nf.error(x, quantized).mse == pytest.approx(step**2 / 12, rel=0.01)


def test_the_entropy_of_the_codes() -> None:
    x = np.repeat([-1.0, 0.0, 0.5, 1.0], 25)
    assert nf.error(x, nf.quantize(x, "int8")).code_entropy == pytest.approx(2.0)
    assert nf.error(x, nf.cast(x, "e2m1"), "e2m1").code_entropy == pytest.approx(2.0)
    assert nf.error(np.zeros(64), nf.quantize(np.zeros(64), "nf4")).code_entropy == 0
    gaussian = np.random.default_rng(0).standard_normal(1 << 18)
    found = nf.error(gaussian, nf.cast(gaussian, "int4"), "int4").code_entropy
    edges = np.concatenate([[-np.inf], np.arange(-7.5, 7), [np.inf]])
    share = np.diff(stats.norm.cdf(edges))
    assert found == pytest.approx(stats.entropy(share, base=2), abs=0.01)


def test_what_is_not_finite_is_counted_apart() -> None:
    x = np.array([1.0, np.nan, np.inf, 2.0])
    report = nf.error(x, nf.cast(x, "bf16"), "bf16")
    assert (report.count, report.not_finite, report.mse) == (2, 2, 0)


@pytest.mark.parametrize("name", ["nf4", "int8", "mxfp4", "nvfp4", "e4m3fn", "uint4"])
def test_pieces_add_up_to_the_whole(name: str) -> None:
    x = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    quantized = nf.quantize(x, name, block=16 if name == "nvfp4" else 32)
    whole = nf.error(x, quantized.dequantize())
    totals = ErrorTotals()
    for part in np.array_split(np.arange(64), 5):
        add_error(totals, x[part], quantized.dequantize()[part])
    pieces = totals.report()
    assert pieces.count == whole.count
    assert pieces.mse == pytest.approx(whole.mse, rel=1e-12)
    assert (pieces.max_abs, pieces.zero) == (whole.max_abs, whole.zero)
    assert nf.error(x, quantized).mse == pytest.approx(whole.mse, rel=1e-12)


def test_torch_tensors_are_judged_too() -> None:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        tensor = x.to(dtype)
        report = nf.error(tensor, nf.quantize(tensor, "nf4"))
        assert 19 < report.sqnr_db < 22
        assert report.count == x.numel()


def test_padding_and_other_axes_do_not_count() -> None:
    x = np.random.default_rng(0).standard_normal((7, 50)).astype(np.float32)
    report = nf.error(x, nf.quantize(x, "mxfp4", axis=0, pad=True))
    assert report.count == 350
    assert report.zero == (nf.quantize(x, "mxfp4", axis=0, pad=True).dequantize() == 0).mean()


def test_different_shapes_are_refused() -> None:
    with pytest.raises(FormatError, match=r"\[3\] and a result of shape \[2\]"):
        nf.error([1.0, 2.0, 3.0], [1.0, 2.0])


def test_nothing_has_no_error() -> None:
    report = nf.error(np.zeros((0, 4)), np.zeros((0, 4)))
    assert (report.count, report.mse, report.sqnr_db) == (0, 0, math.inf)
