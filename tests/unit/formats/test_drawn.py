"""Stochastic rounding under the microscope: the draws are those of the array codec."""

from __future__ import annotations

import numpy as np
import pytest

import narrowcast.formats as nf
from narrowcast.errors import FormatError
from narrowcast.formats.microscope import Event, drawn, look
from narrowcast.formats.rules import Rules
from narrowcast.formats.table import element

VALUES = ["0.1", "-3.3", "1/3", "2^-30", "0", "-0", "inf", "77.7", "0.1"]


@pytest.mark.parametrize("name", ["e4m3fn", "bf16", "fp16", "int8", "nf4", "e2m1", "fp64"])
def test_codes_are_those_of_an_array_under_the_same_seed(name: str) -> None:
    format, numbers = element(name), np.array([0.1, -3.3, 1 / 3, 2.0**-30, 0.0, -0.0, np.inf, 77.7, 0.1])
    rules = Rules.of(format, rounding="stochastic")
    found = [drawn(VALUES, format, rules, seed) for seed in range(20)]
    wanted = [nf.encode(numbers, format, rounding="stochastic", seed=seed).tolist() for seed in range(20)]
    assert found == wanted
    if name not in ("fp64", "int8"):
        assert len({tuple(codes) for codes in found}) > 1
    for value, code in zip(VALUES, found[0], strict=True):
        assert look(value, format, rules, code).code == code


def test_both_neighbours_are_drawn_and_said() -> None:
    format = element("e4m3fn")
    rules = Rules.of(format, rounding="stochastic")
    seen = {look("3.3", format, rules, drawn(["3.3"], format, rules, seed)[0]) for seed in range(40)}
    assert {specimen.stored for specimen in seen} == {3.25, 3.5}
    assert {specimen.words.split(",")[1].strip() for specimen in seen} == {"as 80 % of draws do", "as 20 % of draws do"}


def test_what_float64_cannot_hold_is_not_drawn() -> None:
    fp64 = element("fp64")
    rules = Rules.of(fp64, rounding="stochastic")
    code = drawn(["-1e400"], fp64, rules, 0)[0]
    assert look("-1e400", fp64, rules, code).event is Event.OVERFLOWED
    assert drawn(["1e400"], element("int8"), Rules.of(element("int8"), rounding="stochastic"), 0) == [127]


def test_nan_without_a_place_is_refused() -> None:
    with pytest.raises(FormatError, match="NaN at position 1"):
        drawn(["1", "nan"], element("e2m1"), Rules.of(element("e2m1"), rounding="stochastic"), 0)
