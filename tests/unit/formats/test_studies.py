"""The two questions about four bits, and the numbers that are quoted for them."""

from __future__ import annotations

import numpy as np
import pytest

import narrowcast.formats as nf
from narrowcast.errors import FormatError

GAUSSIAN = nf.sample("gaussian", 1 << 20, seed=1)


def test_nf4_int4_and_e2m1_on_gaussian_numbers() -> None:
    found = nf.four_bit_errors(GAUSSIAN, block=64)
    assert found["nf4"] == pytest.approx(0.0084, abs=0.0001)
    assert found["int4, step max/8 without -8"] == pytest.approx(0.0108, abs=0.0001)
    assert found["e2m1"] == pytest.approx(0.0112, abs=0.0001)
    # INT4's number depends on where its step comes from, more than it differs from E2M1's.
    assert found["int4, step max/7"] == pytest.approx(0.0116, abs=0.0001)
    assert found["int4, step max/8"] == pytest.approx(0.0099, abs=0.0001)


def test_heavy_tails_turn_the_order_of_the_others_around() -> None:
    found = nf.four_bit_errors(nf.sample("laplace", 1 << 20), block=64)
    assert found["nf4"] < found["e2m1"] < found["int4, step max/8"] < found["int4, step max/7"]


def test_errors_are_those_of_quantising() -> None:
    x = GAUSSIAN[: 1 << 16]
    found = nf.four_bit_errors(x, block=64)
    for name, format in (("nf4", "nf4"), ("int4, step max/7", "int4"), ("e2m1", "e2m1")):
        quantized = nf.error(x, nf.quantize(x, format, block=64)).relative ** 2
        assert quantized == pytest.approx(found[name], rel=1e-3)


def test_a_larger_block_costs_fewer_bits_and_more_error() -> None:
    costs = nf.block_costs(GAUSSIAN.reshape(-1, 1024))
    assert [cost.block for cost in costs] == [16, 32, 64, 128, 256, 512]
    assert [cost.bits_per_element for cost in costs] == [4 + 32 / cost.block for cost in costs]
    errors = [cost.relative_mse for cost in costs]
    assert errors == sorted(errors)
    assert costs[2].relative_mse == pytest.approx(0.0084, abs=0.0001)
    assert costs[2].sqnr_db == pytest.approx(-10 * np.log10(costs[2].relative_mse))


def test_what_cannot_be_asked() -> None:
    with pytest.raises(FormatError, match="100 elements in blocks of 64"):
        nf.four_bit_errors(np.ones(100))
    with pytest.raises(FormatError, match="did you mean gaussian"):
        nf.sample("gausian", 3)
    with pytest.raises(FormatError, match="does not divide"):
        nf.block_costs(np.ones((2, 100)))
