"""Every code of every format of up to 16 bits, against the scalar reference and against other libraries."""

from __future__ import annotations

import gfloat
import numpy as np
import pytest
import torch
from format_engines import cast, decode, encode
from format_oracles import ML_DTYPES, ML_INTEGERS, NUMPY, TORCH, UNSIGNED, gfloat_info, in_gfloat
from format_values import (
    CODEBOOKS,
    FLOATS,
    INTEGERS,
    OWN,
    SMALL,
    all_codes,
    assert_same,
    reference_values,
    same_bits,
)

from narrowcast.formats.fast import exact_in_float32
from narrowcast.formats.kinds import ElementFormat, Format, Integer, Nan

EVERY = pytest.mark.parametrize("format", SMALL.values(), ids=SMALL)
IN_GFLOAT = pytest.mark.parametrize(
    "format", [item for item in SMALL.values() if in_gfloat(item)], ids=lambda item: item.name
)
# bitsandbytes 0.49, functional.py, get_4bit_type("nf4"): float32 literals.
BITSANDBYTES_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@EVERY
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_code_decodes_as_the_reference_says(format: ElementFormat, dtype: str) -> None:
    if dtype == "float32" and not exact_in_float32(format):
        return  # the refusal has a test of its own
    codes = all_codes(format)
    found = decode(codes, format, dtype=dtype)
    assert found.dtype == dtype
    wide = found.astype(np.float64)
    wanted = reference_values(format)
    assert_same(wide, wanted, codes, same_bits(wide, wanted))
    assert (np.signbit(wide) == np.signbit(wanted)).all()  # of NaN too


@EVERY
def test_an_odd_number_of_codes_decodes_as_an_even_one_does(format: ElementFormat) -> None:
    codes = all_codes(format)[:-1]
    wanted = reference_values(format)[:-1]
    assert same_bits(decode(codes, format), wanted).all()


@IN_GFLOAT
def test_every_code_decodes_as_gfloat_says(format: Format) -> None:
    codes = all_codes(format)
    wanted = gfloat.decode_ndarray(gfloat_info(format), codes.astype(np.int64))
    found = decode(codes, format)
    assert_same(found, wanted, codes, same_bits(found, wanted))


@pytest.mark.parametrize("name", [name for name in ML_DTYPES if name in SMALL])
def test_every_code_decodes_as_ml_dtypes_says(name: str) -> None:
    codes = all_codes(FLOATS[name])
    with np.errstate(invalid="ignore"):
        wanted = codes.view(ML_DTYPES[name]).astype(np.float64)
    found = decode(codes, name)
    assert_same(found, wanted, codes, same_bits(found, wanted))
    if FLOATS[name].nan not in (Nan.NEGATIVE_ZERO, Nan.NONE) and FLOATS[name].signed:  # else there is one NaN, or none
        assert (np.signbit(found) == np.signbit(wanted)).all()


@pytest.mark.parametrize("name", [name for name in TORCH if name in SMALL])
def test_every_code_decodes_as_torch_says(name: str) -> None:
    codes = all_codes(FLOATS[name])
    wanted = torch.from_numpy(codes).view(TORCH[name]).to(torch.float64).numpy()
    found = decode(codes, name)
    assert_same(found, wanted, codes, same_bits(found, wanted))


@pytest.mark.parametrize("name", ["int8", "int16", "uint8", "uint16", *ML_INTEGERS])
def test_every_integer_decodes_as_numpy_and_ml_dtypes_say(name: str) -> None:
    codes = all_codes(INTEGERS[name])
    wanted = codes.view(np.dtype(ML_INTEGERS.get(name, name))).astype(np.float64)
    assert (decode(codes, name) == wanted).all()


def test_fp16_and_bf16_decode_to_the_very_bits_payloads_of_nan_included() -> None:
    codes = all_codes(FLOATS["fp16"])
    with np.errstate(invalid="ignore"):
        widened = codes.view(np.float16).astype(np.float64).view(np.uint64)
    found = decode(codes, "fp16").view(np.uint64)
    quiet = np.uint64(1 << 51)
    is_nan = np.isnan(codes.view(np.float16))
    assert (np.where(is_nan, found | quiet, found) == np.where(is_nan, widened | quiet, widened)).all()
    bf16 = decode(codes, "bf16").view(np.uint64)
    # The upper half of a float32 is a bfloat16, so its fields stand at known places of a float64.
    is_nan = (codes & 0x7FFF) > 0x7F80
    payload = (codes[is_nan].astype(np.uint64) & np.uint64(0x7F)) << np.uint64(45)
    assert (bf16[is_nan] & np.uint64((1 << 52) - 1) == payload | quiet).all()


def test_every_code_of_tf32_is_the_upper_19_bits_of_a_float32() -> None:
    codes = np.arange(1 << 19, dtype=np.uint32)
    with np.errstate(invalid="ignore"):
        wanted = (codes << np.uint32(13)).view(np.float32).astype(np.float64)
    found = decode(codes, "tf32")
    assert_same(found, wanted, codes, same_bits(found, wanted))


@pytest.mark.parametrize(("name", "bits"), [("fp32", 32), ("fp64", 64)])
def test_fp32_and_fp64_decode_as_numpy_reads_them(name: str, bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, 200_000, dtype=UNSIGNED[bits])
    edge = np.arange(-40, 40).astype(UNSIGNED[bits])
    starts = [0, 1 << (bits - 1), *(code << (bits - 12) for code in range(1 << 12))]
    codes = np.concatenate([codes, *(edge + np.array(start).astype(UNSIGNED[bits]) for start in starts)])
    with np.errstate(invalid="ignore"):
        wanted = codes.view(NUMPY[name]).astype(np.float64)
    found = decode(codes, name)
    assert_same(found, wanted, codes, same_bits(found, wanted))


def test_nf4_is_the_table_that_bitsandbytes_uses() -> None:
    assert CODEBOOKS["nf4"].values == BITSANDBYTES_NF4
    assert (decode(np.arange(16), "nf4", dtype="float32") == np.array(BITSANDBYTES_NF4, np.float32)).all()


@EVERY
@pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero", "up", "to_odd", "stochastic"])
def test_what_a_code_stands_for_encodes_to_that_code(format: ElementFormat, rounding: str) -> None:
    codes = all_codes(format)
    values = decode(codes, format)
    kept = ~np.isnan(values)
    found = encode(values, format, rounding=rounding)
    assert_same(found[kept], codes[kept], values[kept])
    rounded = cast(values, format, rounding=rounding)
    assert same_bits(rounded, values).all()


@EVERY
def test_every_nan_encodes_to_a_quiet_nan_of_the_same_sign(format: ElementFormat) -> None:
    codes = all_codes(format)
    values = decode(codes, format)
    lost = np.isnan(values)
    found = encode(values[lost], format)
    back = decode(found, format)
    assert np.isnan(back).all()
    if isinstance(format, Format) and format.has_nan:
        assert (np.signbit(back) == np.signbit(values[lost])).all()
        quiet = format.nan_code & format.magnitude_mask
        assert (found & quiet == quiet).all()
    else:
        assert not lost.any()


@pytest.mark.parametrize("name", ["e5m2", "e4m3", "e3m4", "fp16", "bf16", "own_e6m9b40"])
def test_ieee_kinds_keep_the_upper_bits_of_a_payload(name: str) -> None:
    format = SMALL[name]
    assert isinstance(format, Format)
    payload = 0x5A5A5A5A5A5A5 & ((1 << 52) - 1)
    x = np.array([0x7FF << 52 | payload, 0xFFF << 52 | payload], np.uint64).view(np.float64)
    kept = payload >> (52 - format.mantissa_bits) | 1 << (format.mantissa_bits - 1) | format.infinity_code
    assert encode(x, format).tolist() == [kept, kept | format.sign_bit]


def test_own_formats_of_the_tests_are_of_every_kind() -> None:
    kinds = {(item.nan, item.signed, item.has_zero) for item in OWN.values() if isinstance(item, Format)}
    assert len(kinds) >= 7
    assert any(isinstance(item, Integer) and item.fraction_bits for item in OWN.values())
