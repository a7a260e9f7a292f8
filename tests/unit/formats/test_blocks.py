"""Block formats against the reference in fractions, gfloat, and what their specifications say of zeros and NaN."""

from __future__ import annotations

import gfloat
import numpy as np
import pytest
from format_engines import ENGINES, running_on
from gfloat import formats as gfloat_formats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import narrowcast.formats as nf
from narrowcast.errors import FormatError
from narrowcast.formats import reference_blocks
from narrowcast.formats.table import BLOCKS

RULES = ("floor", "ceil", "even", "round_up")
MX = [name for name in BLOCKS if name.startswith("mx")]
CASES = [(name, rule) for name in MX for rule in RULES] + [("nvfp4", "floor"), ("nf4", "floor"), ("nf2", "floor")]
GFLOAT = {
    "mxfp8_e4m3": gfloat_formats.format_info_mxfp8_e4m3,
    "mxfp8_e5m2": gfloat_formats.format_info_mxfp8_e5m2,
    "mxfp6_e2m3": gfloat_formats.format_info_mxfp6_e2m3,
    "mxfp6_e3m2": gfloat_formats.format_info_mxfp6_e3m2,
    "mxfp4": gfloat_formats.format_info_mxfp4_e2m1,
    "mxint8": gfloat_formats.format_info_mxint8,
}


def size_of(name: str) -> int:
    return BLOCKS[name].block if name in BLOCKS else 64


def adversarial(length: int, *, broken: bool) -> np.ndarray:
    """Blocks of every magnitude, ties, powers of two, zeros, subnormals, the largest numbers and (if asked) NaN."""
    rng = np.random.default_rng(5)
    exponents = rng.integers(-148, 125, (64, 1)).astype(np.float64)
    with np.errstate(over="ignore"):
        x = (rng.standard_normal((64, length)) * np.exp2(exponents)).astype(np.float32)
    x[0] = 0
    x[1] = 1e-45
    x[2] = np.exp2(rng.integers(-10, 10, length))
    x[3] = 448
    x[4] = np.resize([6.0, 5.0, 2.5, 1.25, 0.25, -0.0, 3.5, -1.75], length)
    x[5] = np.resize([7.999, 1.0, -7.0, 0.5], length)
    x[6] = 3.4e38
    x[7] = 0
    x[7, 1] = 2.0**-126
    x[8] = np.resize([-1.0, 1.0 - 2**-24, 0.96875], length)
    if broken:
        x[9, 3] = np.nan
        x[10, 2] = np.inf
        x[11, 0] = -np.inf
    return x


def same(found: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(((found == wanted) | (np.isnan(found) & np.isnan(wanted))).all())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "rule"), CASES)
def test_blocks_are_quantised_as_the_reference_says(name: str, rule: str, engine: str) -> None:
    x = adversarial(size_of(name), broken=name in BLOCKS)
    if name == "nvfp4":  # one scale for the tensor: blocks of one order of magnitude tell more
        x = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
        x = x * np.exp2(np.random.default_rng(2).integers(-25, 4, (x.shape[0], 1))).astype(np.float32)
        x[0], x[1], x[2, 3], x[3, 1] = 0, 1e-38, np.nan, np.inf
    with running_on(engine):
        quantized = nf.quantize(x, name, scale_rule=rule)
        codes, scales, values = quantized.codes, quantized.scales.reshape(-1), quantized.dequantize()
    for row, found_codes, scale, found in zip(x, codes, scales, values, strict=True):
        block = row.tolist()
        stored = reference_blocks.block_scale(block, quantized.scheme, quantized.tensor_scale)
        full = float(np.float32(stored) * np.float32(quantized.tensor_scale))
        assert same(np.float64(scale), np.float64(full)), (block, scale, full)
        wanted = reference_blocks.quantize_block(block, full, quantized.scheme)
        assert found_codes.tolist() == wanted, (block, full)
        decoded = reference_blocks.dequantize_block(wanted, full, quantized.scheme)
        assert same(found, np.array(decoded, np.float32)), (block, full)
        assert (np.signbit(found) == np.signbit(np.array(decoded))).all() or np.isnan(full)


@pytest.mark.parametrize("name", MX)
def test_mx_agrees_with_gfloat(name: str) -> None:
    info = GFLOAT[name]
    x = np.random.default_rng(3).standard_normal((200, 32)) * np.exp2(np.arange(-100, 100.0))[:, None]
    quantized = nf.quantize(x, name)
    for row, scale, codes in zip(x, quantized.scales.reshape(-1), quantized.codes, strict=True):
        wanted_scale = gfloat.compute_scale_amax(info.etype.emax, row)
        encoded = list(gfloat.encode_block(info, wanted_scale, (row / wanted_scale).tolist()))
        assert scale == wanted_scale
        assert codes.tolist() == encoded[1:]  # the first one is the scale's


def test_gfloat_and_the_table_mean_the_same_formats() -> None:
    for name, info in GFLOAT.items():
        assert (BLOCKS[name].block, BLOCKS[name].element.bits) == (info.k, info.etype.k)


@pytest.mark.parametrize(
    ("rule", "scale"),
    # The largest magnitude of the block, 7.5, lies between 4 (with the exponent of E2M1's 6) and 8.
    [("floor", 1.0), ("ceil", 2.0), ("even", 2.0), ("round_up", 2.0)],
)
def test_the_rules_of_the_shared_exponent(rule: str, scale: float) -> None:
    block = np.array([7.5] + [0.1] * 31)
    assert nf.quantize(block, "mxfp4", scale_rule=rule).scales == scale


@pytest.mark.parametrize(("rule", "scale"), [("floor", 1.0), ("ceil", 2.0), ("even", 1.0), ("round_up", 1.0)])
def test_the_rules_differ_where_nothing_saturates(rule: str, scale: float) -> None:
    block = np.array([5.9] + [0.1] * 31)
    assert nf.quantize(block, "mxfp4", scale_rule=rule).scales == scale


@pytest.mark.parametrize("name", [*MX, "nvfp4"])
def test_nan_and_infinity_break_their_block_alone(name: str) -> None:
    size = size_of(name)
    x = np.ones((4, size), np.float32)
    x[1, 2], x[2, 0] = np.nan, -np.inf
    values = nf.quantize(x, name).dequantize()
    assert np.isnan(values[1:3]).all()
    assert (values[[0, 3]] == 1).all()


@pytest.mark.parametrize("name", [*BLOCKS, "nf4"])
def test_zeros_stay_zeros(name: str) -> None:
    x = np.zeros((2, size_of(name)), np.float32)
    x[1, ::2] = -0.0
    values = nf.quantize(x, name).dequantize()
    assert (values == 0).all()


def test_nvfp4_uses_the_whole_range_of_its_scales() -> None:
    x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    quantized = nf.quantize(x, "nvfp4")
    largest = float(nf.decode(quantized.stored_scales, "e4m3fn").max())
    assert largest == 448
    assert quantized.tensor_scale == np.float32(np.abs(x).max() / np.float32(6 * 448))


def test_a_tiny_block_of_nvfp4_keeps_something() -> None:
    x = np.ones((2, 16), np.float32)
    x[1] = 2.0**-20  # its scale would be rounded to zero
    values = nf.quantize(x, "nvfp4").dequantize()
    assert (nf.quantize(x, "nvfp4").scales[1] > 0).all()
    assert np.abs(values[1] - x[1]).max() <= x[1].max()


BLOCK_ARRAYS = hnp.arrays(
    np.float32, (4, 64), elements=st.floats(-(2.0**99), 2.0**99, width=32, allow_nan=False, allow_subnormal=False)
)


@settings(max_examples=40, deadline=None)
@given(x=BLOCK_ARRAYS, name=st.sampled_from([*MX, "nf4", "nf3"]))
def test_blocks_are_independent(x: np.ndarray, name: str) -> None:
    whole = nf.quantize(x, name).dequantize()
    for start in range(4):
        assert (nf.quantize(x[start : start + 1], name).dequantize() == whole[start]).all()


@settings(max_examples=40, deadline=None)
@given(x=BLOCK_ARRAYS, name=st.sampled_from(MX))
def test_quantising_again_changes_nothing(x: np.ndarray, name: str) -> None:
    once = nf.quantize(x, name, scale_rule="round_up").dequantize()
    assert (nf.quantize(once, name, scale_rule="round_up").dequantize() == once).all()


@settings(max_examples=60, deadline=None)
@given(x=BLOCK_ARRAYS, name=st.sampled_from(MX))
def test_nothing_errs_by_more_than_half_the_largest_step(x: np.ndarray, name: str) -> None:
    quantized = nf.quantize(x, name, scale_rule="round_up")
    element = quantized.scheme.element
    is_float = isinstance(element, nf.Format)
    step = 2.0 ** (element.maximum_exponent - element.mantissa_bits) if is_float else element.step
    allowed = np.repeat(quantized.scales.astype(np.float64), 32, axis=1) * step / 2
    assert (np.abs(quantized.dequantize("float64") - x) <= allowed).all()


def test_a_block_must_divide_its_axis_unless_padding_is_asked_for() -> None:
    x = np.arange(70, dtype=np.float32).reshape(2, 35)
    with pytest.raises(FormatError, match="block of 32 does not divide axis 1, of length 35"):
        nf.quantize(x, "mxfp8_e4m3")
    padded = nf.quantize(x, "mxfp8_e4m3", pad=True)
    assert padded.codes.shape == (2, 64)
    assert padded.dequantize().shape == (2, 35)
    assert padded.nbytes == 2 * 64 + 4
    whole = np.pad(x, ((0, 0), (0, 29)))
    assert (nf.quantize(whole, "mxfp8_e4m3").dequantize()[:, :35] == padded.dequantize()).all()


@pytest.mark.parametrize("axis", [0, 1, 2, -2])
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "nf4"])
def test_blocks_run_along_any_axis(name: str, axis: int) -> None:
    x = np.random.default_rng(1).standard_normal((64, 128, 192)).astype(np.float32)
    found = nf.quantize(x, name, axis=axis)
    moved = nf.quantize(np.ascontiguousarray(np.moveaxis(x, axis, -1)), name)
    assert (found.dequantize() == np.moveaxis(moved.dequantize(), -1, axis)).all()
    assert (found.codes == np.moveaxis(moved.codes, -1, axis)).all()
    assert (found.scales == np.moveaxis(moved.scales, -1, axis)).all()


@pytest.mark.parametrize(
    ("name", "bits"),
    [("mxfp8_e4m3", 8.25), ("mxfp6_e2m3", 6.25), ("mxfp4", 4.25), ("mxint8", 8.25), ("nf4", 4.5)],
)
def test_bits_per_element(name: str, bits: float) -> None:
    x = np.ones((64, 64), np.float32)
    assert nf.quantize(x, name).bits_per_element == bits


def test_double_quantisation_costs_what_qlora_says() -> None:
    x = np.random.default_rng(0).standard_normal((1024, 4096)).astype(np.float32)
    quantized = nf.quantize(x, "nf4", block=64, double_quant=True)
    assert quantized.bits_per_element == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    assert round(quantized.bits_per_element, 3) == 4.127
    single = nf.error(x, nf.quantize(x, "nf4", block=64)).sqnr_db
    assert nf.error(x, quantized).sqnr_db == pytest.approx(single, abs=0.05)
