"""Exponents alone (E8M0), and numbers that their new format holds: nothing is rounded, and loops of their own do it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from format_engines import cast, decode, encode
from format_values import FLOATS, same_bits

from narrowcast.formats import reference
from narrowcast.formats.rules import Rules


@pytest.mark.parametrize("convention", [None, "ml_dtypes", "torch", "onnx", "cuda"])
@pytest.mark.parametrize("rounding", [None, "nearest_away", "toward_zero", "up", "down", "to_odd"])
@pytest.mark.parametrize("below", [None, "nan", "magnitude", "clamp"])
@pytest.mark.parametrize("overflow", [None, "ieee", "clamp", "nan"])
def test_every_rule_of_e8m0_is_as_the_reference_says(
    convention: str | None, rounding: str | None, below: str | None, overflow: str | None
) -> None:
    format = FLOATS["e8m0"]
    rules = Rules.of(format, rounding, overflow, None, below, convention)
    edges = [
        math.ldexp(share, exponent) for exponent in (-150, -149, -128, -127, -126, -1, 0, 127) for share in (1, 1.5)
    ]
    x = np.array([0.0, *edges, 2.0**128, 1e300, 5e-324, math.inf, math.nan])
    x = np.concatenate([x, -x, np.nextafter(x, 0), np.nextafter(x, np.inf)])
    with np.errstate(over="ignore"):
        single = x.astype(np.float32)
        single = np.concatenate([single, np.nextafter(single, np.float32(0)), np.nextafter(single, np.float32(np.inf))])
    for numbers in (x, single):
        wanted = [reference.encode(value, format, rules) for value in numbers.astype(np.float64).tolist()]
        choices = {"rounding": rounding, "overflow": overflow, "below": below, "convention": convention}
        assert encode(numbers, "e8m0", **choices).tolist() == wanted


@pytest.mark.parametrize("own", ["fp16", "fp32", "fp64"])
@pytest.mark.parametrize("name", ["fp16", "fp32", "fp64"])
@pytest.mark.parametrize("overflow", ["ieee", "saturate", "clamp", "nan"])
def test_numbers_of_ieee_754_in_each_other_s_formats(own: str, name: str, overflow: str) -> None:
    bits = FLOATS[own].bits
    words = np.random.default_rng(0).integers(0, 1 << bits - 1, 3001, dtype=np.uint64) << 1  # all exponents, some NaN
    special = [0, 1, 2, FLOATS[own].infinity_code - 1, FLOATS[own].infinity_code, FLOATS[own].infinity_code + 1]
    words = np.concatenate([words, np.array(special, np.uint64)]).astype(f"u{bits // 8}")
    x = np.concatenate([words, words | words.dtype.type(1 << bits - 1)]).view(f"f{bits // 8}")
    rules = Rules.of(FLOATS[name], overflow=overflow)
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes quiet
        wide = x.astype(np.float64)
    codes, rounded = encode(x, name, overflow=overflow), cast(x, name, overflow=overflow)
    known = ~np.isnan(x)
    wanted = [reference.encode(value, FLOATS[name], rules) for value in wide[known].tolist()]
    assert codes[known].tolist() == wanted
    lost = codes[~known].astype(np.uint64)
    quiet = 1 << (FLOATS[name].mantissa_bits - 1)
    if name == own:
        assert (lost == (words_of(x)[~known] | np.uint64(quiet))).all()
    assert (lost & np.uint64(quiet)).all()
    assert (lost >> np.uint64(FLOATS[name].bits - 1) == np.signbit(x[~known])).all()
    assert rounded.dtype == x.dtype
    with np.errstate(over="ignore", invalid="ignore"):
        assert same_bits(rounded, decode(codes, name).astype(x.dtype)).all()
    assert (encode(x[::-2], name, overflow=overflow) == codes[::-2]).all()


def words_of(x: np.ndarray) -> np.ndarray:
    return x.view(f"u{x.itemsize}").astype(np.uint64)
