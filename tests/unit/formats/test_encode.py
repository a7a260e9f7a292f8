"""Every value, and what lies between, at and one ulp beside every rounding boundary, against reference and oracles."""

from __future__ import annotations

from fractions import Fraction

import gfloat
import numpy as np
import pytest
import torch
from format_engines import cast, decode, encode
from format_oracles import ML_DTYPES, NUMPY, ROUND_MODES, gfloat_info, in_gfloat, ml_codes
from format_values import (
    CODEBOOKS,
    FLOATS,
    INTEGERS,
    ROUNDINGS,
    SMALL,
    all_codes,
    assert_same,
    boundary_values,
    finite_values,
    overflows,
    reference_values,
    same_bits,
)

from narrowcast.formats import reference
from narrowcast.formats.kinds import ElementFormat, Format, Integer
from narrowcast.formats.rules import Rules

EVERY = pytest.mark.parametrize("format", SMALL.values(), ids=SMALL)
DTYPES = pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
FLOATING = [item for item in SMALL.values() if isinstance(item, Format)]
INTEGRAL = [item for item in SMALL.values() if isinstance(item, Integer)]


def by_reference(x: np.ndarray, format: ElementFormat, rules: Rules) -> np.ndarray:
    return np.array([reference.encode(value, format, rules) for value in x.astype(np.float64).tolist()])


def stride_of(format: ElementFormat, count: int) -> int:
    """Return a stride, never a power of two, that leaves about ``count`` gaps of a format."""
    return max(len(all_codes(format)) // count, 1) | 1


@EVERY
@DTYPES
def test_every_boundary_encodes_as_the_reference_says(format: ElementFormat, dtype: str) -> None:
    x = boundary_values(format, dtype, stride_of(format, 128))
    assert_same(encode(x, format), by_reference(x, format, Rules.of(format)), x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp16", "bf16", "int16", "uint16"])
def test_every_boundary_of_16_bits_encodes_as_the_reference_says(name: str) -> None:
    format = SMALL[name]
    values = finite_values(format)
    middle = values[:-1] + np.diff(values) / 2
    x = np.concatenate([values, middle, np.nextafter(middle, -np.inf), np.nextafter(middle, np.inf)])
    if isinstance(format, Format):
        x = x[x >= 0]  # the other half differs by the sign bit, as gfloat, NumPy and ml_dtypes confirm below
    assert_same(encode(x, format), by_reference(x, format, Rules.of(format)), x)


@EVERY
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_rounding_and_overflow_is_as_the_reference_says(format: ElementFormat, rounding: str) -> None:
    everywhere = boundary_values(format, "float32", stride_of(format, 10))
    far = everywhere[(np.abs(everywhere.astype(np.float64)) >= format.max / 2) | (everywhere == 0)]
    for overflow in overflows(format):
        x = everywhere if overflow == "saturate" else far
        rules = Rules.of(format, rounding=rounding, overflow=overflow)
        wanted = by_reference(x, format, rules)
        for numbers in (x, x.astype(np.float64)):  # by table, and exactly
            assert_same(encode(numbers, format, rounding=rounding, overflow=overflow), wanted, x)


@EVERY
@pytest.mark.parametrize("nan", ["zero", "max"])
def test_nan_becomes_what_was_asked_where_there_is_none(format: ElementFormat, nan: str) -> None:
    x = np.array([1.0, np.nan, -np.nan, -1.0])
    rules = Rules.of(format, nan=nan)
    wanted = by_reference(x, format, rules)
    for dtype in ("float64", "float32", "float16"):
        for rounding in ("nearest_even", "up", "stochastic"):
            found = encode(x.astype(dtype), format, nan=nan, rounding=rounding)
            assert found[1:3].tolist() == wanted[1:3].tolist(), (dtype, rounding)


@pytest.mark.parametrize("format", [f for f in FLOATING if not f.signed], ids=lambda item: item.name)
@pytest.mark.parametrize("below", ["nan", "magnitude", "clamp"])
@DTYPES
def test_unsigned_floats_treat_what_is_below_as_asked(format: Format, below: str, dtype: str) -> None:
    if below == "nan" and not format.has_nan:
        return  # the refusal has a test of its own
    x = boundary_values(format, dtype, stride_of(format, 100))
    assert_same(encode(x, format, below=below), by_reference(x, format, Rules.of(format, below=below)), x)


@pytest.mark.parametrize("format", [item for item in FLOATING if in_gfloat(item)], ids=lambda item: item.name)
@pytest.mark.parametrize("rounding", ROUND_MODES)
@pytest.mark.parametrize("overflow", ["ieee", "clamp"])
def test_every_boundary_rounds_as_gfloat_says(format: Format, rounding: str, overflow: str) -> None:
    x = boundary_values(format, stride=1 if overflow == "ieee" else stride_of(format, 1 << 12))
    if not format.signed:
        x = x[x >= 0]
        x = x[~np.signbit(x)]
    if not format.has_zero:  # gfloat keeps numbers below the smallest one
        x = x[x >= format.smallest_normal]
    if format.mantissa_bits == 0 and rounding == "nearest_even":  # a significand of one digit: see the test below
        x = x[(np.frexp(x)[0] != 0.75) & (np.frexp(x)[0] != -0.75)]
    clamped = overflow == "clamp" or not format.has_nan  # gfloat refuses what neither infinity nor NaN can take
    with np.errstate(all="ignore"):
        wanted = gfloat.round_ndarray(gfloat_info(format), x, ROUND_MODES[rounding], sat=clamped)
    found = reference_values(format)[encode(x, format, rounding=rounding, overflow=overflow)]
    assert_same(found, wanted, x, same_bits(found, wanted))


@pytest.mark.parametrize("name", ["e8m0", "own_e2m0", "own_e3m0fnuz"])
def test_a_tie_between_one_digit_significands_goes_to_the_larger(name: str) -> None:
    """IEEE 754-2019, section 4.3.1: there is no even digit then; gfloat (P3109) takes the even code instead."""
    assert cast(np.array([1.5, 3.0]), SMALL[name]).tolist() == [2.0, 4.0]


@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_boundary_encodes_as_ml_dtypes_does(name: str) -> None:
    # From float32: ml_dtypes rounds float64 through float32, twice. E8M0 goes wrong there below float32's normal numbers.
    x = boundary_values(FLOATS[name], "float32")
    x = x[np.abs(x) >= np.finfo(np.float32).tiny] if name == "e8m0" else x
    assert_same(encode(x, name, overflow="ieee" if FLOATS[name].has_nan else "clamp"), ml_codes(x, name), x)


@DTYPES
def test_every_boundary_of_fp16_encodes_as_numpy_does(dtype: str) -> None:
    x = boundary_values(FLOATS["fp16"], dtype)
    assert_same(encode(x, "fp16"), ml_codes(x, "fp16"), x)


def test_fp32_and_fp64_encode_as_numpy_does() -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(0, 1 << 32, 100_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([values[np.isfinite(values)], np.arange(64, dtype=np.uint32).view(np.float32)]).astype(
        np.float64
    )
    other = np.nextafter(values.astype(np.float32), np.float32(np.inf)).astype(np.float64)
    other = np.where(np.isinf(other), 2.0**128, other)
    middle = (values + other) / 2
    x = np.concatenate([values, middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)])
    assert_same(encode(x, "fp32"), ml_codes(x, "fp32"), x)
    x = boundary_values(FLOATS["bf16"])
    assert_same(encode(x, "fp64"), x.view(np.uint64), x)


def test_tf32_rounds_the_lower_13_bits_of_a_float32_away() -> None:
    rng = np.random.default_rng(2)
    upper = rng.integers(0, 1 << 19, 60_000, dtype=np.uint32)
    upper = upper[(upper >> np.uint32(10)) & np.uint32(0xFF) != 0xFF]
    low = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF], np.uint32)
    words = (upper[:, None] << np.uint32(13) | low).reshape(-1)
    wanted = (words + np.uint32(0x0FFF) + (words >> np.uint32(13) & np.uint32(1))) >> np.uint32(13)
    x = words.view(np.float32)
    assert_same(encode(x, "tf32"), wanted, x)
    assert_same(encode(x.astype(np.float64), "tf32"), wanted, x)


@pytest.mark.parametrize("format", INTEGRAL, ids=lambda item: item.name)
@pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero", "up", "down"])
@DTYPES
def test_every_boundary_of_an_integer_encodes_as_numpy_rounds(format: Integer, rounding: str, dtype: str) -> None:
    rounded = {"nearest_even": np.rint, "toward_zero": np.trunc, "up": np.ceil, "down": np.floor}[rounding]
    every = dtype == "float64" and rounding == "nearest_even"
    x = boundary_values(format, dtype, 1 if every else stride_of(format, 1 << 12))
    with np.errstate(over="ignore"):
        steps = rounded(x.astype(np.float64) / format.step)
    wanted = np.clip(steps, format.min / format.step, format.max / format.step).astype(np.int64) % (1 << format.bits)
    assert_same(encode(x, format, rounding=rounding), wanted, x)
    exact = np.abs(steps) < 2.0**53
    wrapped = steps[exact].astype(np.int64) % (1 << format.bits)
    assert_same(encode(x[exact], format, rounding=rounding, overflow="wrap"), wrapped, x[exact])


@pytest.mark.parametrize("name", CODEBOOKS)
@DTYPES
def test_every_boundary_of_a_codebook_encodes_to_the_nearest_value(name: str, dtype: str) -> None:
    values = np.array(CODEBOOKS[name].values)
    x = boundary_values(CODEBOOKS[name], dtype)
    x = x[np.isfinite(x) & (np.abs(x) < 2)]
    codes = encode(x, name)
    away = [[abs(Fraction(float(v)) - Fraction(float(value))) for value in values] for v in x]
    assert codes.tolist() == [row.index(min(row)) for row in away]  # the first of two as near: a tie goes down


@EVERY
@pytest.mark.parametrize("rounding", [*ROUNDINGS, "stochastic"])
def test_cast_is_decode_of_encode(format: ElementFormat, rounding: str) -> None:
    for dtype in ("float64", "float32"):
        x = boundary_values(format, dtype, stride_of(format, 100))
        wanted = decode(encode(x, format, rounding=rounding), format)
        with np.errstate(over="ignore"):
            wanted = wanted.astype(dtype)
        found = cast(x, format, rounding=rounding)
        assert found.dtype == dtype
        assert_same(found, wanted, x, same_bits(found, wanted))


def test_fp64_is_rounded_once_where_two_steps_go_wrong() -> None:
    x = np.array([1 + 2**-8 + 2**-40])
    assert cast(x, "bf16").tolist() == [1.0078125]
    assert cast(x.astype(np.float32), "bf16").tolist() == [1.0]  # float32 drops 2**-40; a tie is left, and goes to even
    assert torch.from_numpy(x).to(torch.bfloat16).item() == 1.0  # which is what a cast through float32 gives


@pytest.mark.parametrize("name", [name for name in (*ML_DTYPES, *NUMPY) if name not in ("fp32", "fp64", "e8m0")])
def test_to_odd_in_float32_makes_two_steps_right(name: str) -> None:
    x = boundary_values(FLOATS[name], "float64", stride_of(FLOATS[name], 1000))
    two_steps = encode(cast(x, "fp32", rounding="to_odd"), name)
    assert_same(two_steps, encode(x, name), x)


def test_signalling_nans_of_every_width_encode_without_a_warning() -> None:
    for dtype, word, bits in (("float16", np.uint16, 0x7D01), ("float32", np.uint32, 0x7F800001)):
        x = np.array([bits] * 3, word).view(dtype)
        for name in ("e5m2", "e4m3fn", "bf16", "fp16", "fp32", "fp64"):
            assert np.isnan(decode(encode(x, name), name)).all(), (dtype, name)
            assert np.isnan(cast(x, name)).all(), (dtype, name)


SPECIAL = {
    # name: codes of inf, -inf, 0, -0, nan, -nan, the largest number, and twice that
    "fp16": (0x7C00, 0xFC00, 0, 0x8000, 0x7E00, 0xFE00, 0x7BFF, 0x7C00),
    "bf16": (0x7F80, 0xFF80, 0, 0x8000, 0x7FC0, 0xFFC0, 0x7F7F, 0x7F80),
    "e5m2": (0x7C, 0xFC, 0, 0x80, 0x7E, 0xFE, 0x7B, 0x7C),
    "e4m3": (0x78, 0xF8, 0, 0x80, 0x7C, 0xFC, 0x77, 0x78),
    "e3m4": (0x70, 0xF0, 0, 0x80, 0x78, 0xF8, 0x6F, 0x70),
    "e4m3fn": (0x7F, 0xFF, 0, 0x80, 0x7F, 0xFF, 0x7E, 0x7E),
    "e4m3fnuz": (0x80, 0x80, 0, 0, 0x80, 0x80, 0x7F, 0x7F),
    "e5m2fnuz": (0x80, 0x80, 0, 0, 0x80, 0x80, 0x7F, 0x7F),
    "e4m3b11fnuz": (0x80, 0x80, 0, 0, 0x80, 0x80, 0x7F, 0x7F),
    "e3m2": (0x1F, 0x3F, 0, 0x20, None, None, 0x1F, 0x1F),
    "e2m3": (0x1F, 0x3F, 0, 0x20, None, None, 0x1F, 0x1F),
    "e2m1": (0x7, 0xF, 0, 0x8, None, None, 0x7, 0x7),
    "e8m0": (0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFE, 0xFE),
}


@pytest.mark.parametrize("name", SPECIAL)
@DTYPES
def test_special_numbers_by_the_formats_definitions(name: str, dtype: str) -> None:
    infinity, minus_infinity, zero, minus_zero, nan, minus_nan, largest, beyond = SPECIAL[name]
    for value, code in [(np.inf, infinity), (-np.inf, minus_infinity), (0.0, zero), (-0.0, minus_zero)]:
        assert encode(np.array(value, dtype), name) == code, value
    if nan is not None:
        assert encode(np.array([np.nan, -np.nan], dtype), name).tolist() == [nan, minus_nan]
    if FLOATS[name].max * 2 <= float(np.finfo(dtype).max):
        assert encode(np.array([FLOATS[name].max, 2 * FLOATS[name].max], dtype), name).tolist() == [largest, beyond]


def test_integers_clamp_by_default_and_wrap_when_told() -> None:
    x = np.array([-1000.0, -129.5, -128.5, 127.5, 300.0, np.inf, -np.inf])
    assert decode(encode(x, "int8"), "int8").tolist() == [-128, -128, -128, 127, 127, 127, -128]
    assert decode(encode(x[:5], "int8", overflow="wrap"), "int8").tolist() == [24, 126, -128, -128, 44]
    assert set(INTEGERS) == {f"{sign}int{bits}" for sign in ("", "u") for bits in (2, 3, 4, 8, 16)}
