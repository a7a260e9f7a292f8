"""What the microscope says of values and codes, and the literals, order and facts that it stands on."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import pytest

from narrowcast.errors import FormatError
from narrowcast.formats.facts import facts
from narrowcast.formats.kinds import Codebook, ElementFormat, Format, Nan
from narrowcast.formats.literals import parse_code, parse_value
from narrowcast.formats.microscope import Event, Specimen, Standing, look, look_at_code
from narrowcast.formats.order import code_at, floor_place, place_of, places, value_at
from narrowcast.formats.rules import Rules
from narrowcast.formats.table import BLOCKS, ELEMENTS, element

SMALL = [format for format in ELEMENTS.values() if format.bits <= 8]


def seen(name: str, value: str, **rules: str) -> Specimen:
    return look(value, element(name), Rules.of(element(name), **rules))


def codes(format: ElementFormat) -> range:
    return range(len(format.values) if isinstance(format, Codebook) else 1 << format.bits)


# Literals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.1", Fraction(1, 10)),
        ("-1e-8", Fraction(-1, 10**8)),
        (" +1_000.50 ", Fraction(2001, 2)),
        (".5", Fraction(1, 2)),
        ("1/3", Fraction(1, 3)),
        ("-1.5/1e2", Fraction(-3, 200)),
        ("2^-24", Fraction(1, 2**24)),
        ("-2**3", Fraction(-8)),
        ("0x1.8p-3", Fraction(3, 16)),
        ("-0xff", Fraction(-255)),
        ("\N{MINUS SIGN}2", Fraction(-2)),
        ("inf", math.inf),
        ("-Infinity", -math.inf),
    ],
)
def test_what_people_type_is_read_exactly(text: str, value: Fraction | float) -> None:
    assert parse_value(text) == value


def test_signs_of_zero_and_nan_are_kept() -> None:
    for text, sign in (("-0", -1.0), ("-0.0e3", -1.0), ("0", 1.0), ("nan", 1.0), ("-nan", -1.0)):
        assert math.copysign(1.0, parse_value(text)) == sign


@pytest.mark.parametrize(
    "text",
    ["abc", "", "1/0", "1/2/3", "1e", "0x", "0x.p1", "--1", "+-inf", "1,5", "1e999999999", "2^-99999", "9" * 2000],
)
def test_what_is_no_number_is_named(text: str) -> None:
    with pytest.raises(FormatError) as raised:
        parse_value(text)
    assert repr(text)[:40].rstrip("'") in raised.value.what
    assert raised.value.allowed


@pytest.mark.parametrize(("text", "code"), [("0x7f", 127), ("0b0_1111_110", 126), ("12", 12)])
def test_codes_are_read_in_three_bases(text: str, code: int) -> None:
    assert parse_code(text, element("e4m3fn")) == code


@pytest.mark.parametrize(("name", "text"), [("e4m3fn", "256"), ("e4m3fn", "-1"), ("e4m3fn", "x"), ("nf4", "16")])
def test_a_code_out_of_range_is_named(name: str, text: str) -> None:
    with pytest.raises(FormatError, match=text):
        parse_code(text, element(name))


# Order ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "format", [*SMALL, Format(3, 2, nan=Nan.NONE, has_zero=False), Format(3, 0, nan=Nan.NONE)], ids=lambda f: f.name
)
def test_places_hold_every_finite_value_once_in_order(format: ElementFormat) -> None:
    values = [value_at(place, format) for place in places(format)]
    assert values == sorted(set(values))
    every = {look_at_code(code, format).stored for code in codes(format)}
    assert set(values) == {value for value in every if math.isfinite(value)}
    for place, value in zip(places(format), values, strict=True):
        assert place_of(code_at(place, format), format) == place
        assert floor_place(value, format) == place


def test_between_two_numbers_the_floor_is_the_lower_one() -> None:
    format = element("e2m1")
    for lower, upper in zip(places(format), places(format)[1:], strict=False):
        middle = (Fraction(value_at(lower, format)) + Fraction(value_at(upper, format))) / 2
        assert floor_place(middle, format) == lower


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "rules", "code", "event", "words"),
    [
        ("bf16", "0.1", {}, 0x3DCD, Event.ROUNDED_UP, "nearest"),
        ("bf16", "-0.1", {}, 0xBDCD, Event.ROUNDED_DOWN, "nearest"),
        ("bf16", "1.5", {}, 0x3FC0, Event.EXACT, "exact"),
        ("bf16", "1e-50", {}, 0x0000, Event.FLUSHED, "less than half of the smallest number"),
        ("bf16", "1e-40", {}, 0x0001, Event.ROUNDED_DOWN, "subnormal: 1 of 8 significant bits left"),
        ("bf16", "nan", {}, 0x7FC0, Event.EXACT, "NaN stays NaN"),
        ("bf16", "-inf", {}, 0xFF80, Event.EXACT, "infinity stays infinity"),
        ("fp16", "65519", {}, 0x7BFF, Event.ROUNDED_DOWN, "to the largest number"),
        ("fp16", "65520", {}, 0x7C00, Event.OVERFLOWED, "beyond the largest number, 65504"),
        ("fp16", "-70000", {}, 0xFC00, Event.OVERFLOWED, "most negative number"),
        ("fp16", "65520", {"rounding": "toward_zero"}, 0x7BFF, Event.ROUNDED_DOWN, "to the largest number"),
        ("fp16", "1e6", {"rounding": "toward_zero"}, 0x7BFF, Event.SATURATED, "saturated"),
        ("fp16", "2^-25", {}, 0x0000, Event.FLUSHED, "half of the smallest number, 5.96046e-08, a tie"),
        ("fp16", "2^-25", {"rounding": "up"}, 0x0001, Event.ROUNDED_UP, "toward plus infinity"),
        ("e4m3fn", "17", {}, 0x58, Event.ROUNDED_DOWN, "from a tie, to the even code"),
        ("e4m3fn", "17", {"rounding": "nearest_away"}, 0x59, Event.ROUNDED_UP, "from a tie, away from zero"),
        ("e4m3fn", "17", {"rounding": "stochastic"}, 0x58, Event.ROUNDED_DOWN, "50 % of draws"),
        ("e4m3fn", "17", {"rounding": "to_odd"}, 0x59, Event.ROUNDED_UP, "odd code"),
        ("e4m3fn", "464", {}, 0x7E, Event.ROUNDED_DOWN, "largest"),
        ("e4m3fn", "465", {}, 0x7E, Event.SATURATED, "448"),
        ("e4m3fn", "465", {"overflow": "nan"}, 0x7F, Event.BECAME_NAN, "overflowed to NaN"),
        ("e4m3fn", "inf", {}, 0x7F, Event.BECAME_NAN, "no infinity"),
        ("e4m3fn", "inf", {"convention": "onnx"}, 0x7E, Event.SATURATED, "448"),
        ("e4m3fnuz", "-0", {}, 0x00, Event.EXACT, "one zero"),
        ("e2m1", "nan", {"nan": "max"}, 0x7, Event.NAN_REPLACED, "no NaN"),
        ("e2m1", "7", {}, 0x7, Event.SATURATED, "6"),
        ("e8m0", "3", {}, 0x81, Event.ROUNDED_UP, "from a tie, away from zero"),
        ("e8m0", "0", {}, 0xFF, Event.BECAME_NAN, "no zero"),
        ("e8m0", "-4", {"below": "magnitude"}, 0x81, Event.SIGN_DROPPED, "no negative numbers"),
        ("e8m0", "-4", {"below": "clamp"}, 0x00, Event.SATURATED, "smallest number"),
        ("e8m0", "2^-130", {}, 0x00, Event.SATURATED, "smallest number"),
        ("int8", "2.5", {}, 0x02, Event.ROUNDED_DOWN, "from a tie"),
        ("int8", "127.4", {}, 0x7F, Event.ROUNDED_DOWN, "largest"),
        ("int8", "200", {}, 0x7F, Event.SATURATED, "127"),
        ("int8", "200", {"overflow": "wrap"}, 0xC8, Event.WRAPPED, "wrapped"),
        ("int8", "383", {"overflow": "wrap"}, 0x7F, Event.WRAPPED, "wrapped"),
        ("int8", "inf", {"overflow": "wrap"}, 0x00, Event.WRAPPED, "wrapped"),
        ("uint8", "-0.3", {}, 0x00, Event.ROUNDED_UP, "smallest"),
        ("uint8", "-1", {}, 0x00, Event.SATURATED, "smallest"),
        ("nf4", "0.1", {}, 0x8, Event.ROUNDED_DOWN, "nearest"),
        ("nf4", "-3", {}, 0x0, Event.SATURATED, "-1"),
    ],
)
def test_what_happened_is_said(
    name: str, value: str, rules: dict[str, str], code: int, event: Event, words: str
) -> None:
    specimen = seen(name, value, **rules)
    assert (specimen.code, specimen.event) == (code, event)
    assert words in specimen.words


def test_a_decimal_is_rounded_once() -> None:
    """Just above the middle of two BF16 numbers, by less than float64 can tell."""
    middle = "1.00390625"
    assert look(float(f"{middle}{'0' * 20}1"), element("bf16")).stored == 1.0
    assert seen("bf16", f"{middle}{'0' * 20}1").stored == 1.0078125
    assert seen("bf16", middle).stored == 1.0


def test_the_error_is_exact() -> None:
    specimen = seen("bf16", "1/3")
    assert specimen.error == Fraction(171, 512) - Fraction(1, 3)
    assert specimen.ulps == Fraction(1, 3)
    assert specimen.relative == Fraction(1, 512)
    assert seen("bf16", "0").relative is None
    assert seen("fp16", "70000").error is None
    assert seen("int8", "200").ulps == -73


@pytest.mark.parametrize("format", SMALL, ids=lambda format: format.name)
def test_rounding_to_nearest_errs_by_half_a_step_at_most(format: ElementFormat) -> None:
    low, high = Fraction(format.min), Fraction(format.max)
    for k in range(101):
        specimen = look(low + (high - low) * k / 100, format)
        assert specimen.ulps is not None
        assert abs(specimen.ulps) <= Fraction(1, 2)
        lower, upper = specimen.around
        assert lower is not None
        assert upper is not None
        assert lower.value <= specimen.value <= upper.value
        assert specimen.stored in (lower.value, upper.value)


@pytest.mark.parametrize("text", ["0.1", "1e300", "5e-324", "-1/3"])
def test_fp64_agrees_with_the_machine(text: str) -> None:
    specimen = seen("fp64", text)
    assert specimen.code == struct.unpack("<Q", struct.pack("<d", float(Fraction(text))))[0]
    down, up = specimen.neighbours
    assert down is not None
    assert up is not None
    assert (down.value, up.value) == tuple(math.nextafter(specimen.stored, end) for end in (-math.inf, math.inf))
    assert Fraction(specimen.exact) == specimen.fraction


def test_neighbours_end_at_infinity_or_nowhere() -> None:
    assert [point and point.value for point in seen("fp16", "65504").neighbours] == [65472.0, math.inf]
    assert [point and point.value for point in seen("fp16", "-inf").neighbours] == [None, -65504.0]
    assert [point and point.value for point in seen("e4m3fn", "448").neighbours] == [416.0, None]
    assert [point and point.value for point in seen("fp16", "-0").neighbours] == [-(2.0**-24), 2.0**-24]
    assert seen("fp16", "nan").neighbours == (None, None)


# Codes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", SMALL, ids=lambda format: format.name)
def test_every_code_can_be_looked_at(format: ElementFormat) -> None:
    for code in codes(format):
        specimen = look_at_code(code, format)
        assert specimen.bits.replace(" ", "") == f"{code:0{format.bits}b}"
        assert int(specimen.hexadecimal, 16) == code
        if math.isfinite(specimen.stored):
            again = look(specimen.stored, format)
            assert (again.stored, again.event) == (specimen.stored, Event.EXACT)


def test_codes_are_described() -> None:
    said = {code: look_at_code(code, element("fp16")) for code in (0x7C01, 0x7E00, 0x7C00, 0x8000, 3, 0x3C00)}
    assert [item.words for item in said.values()] == [
        "a signalling NaN",
        "a quiet NaN",
        "infinity",
        "minus zero",
        "subnormal: 2 of 11 significant bits left",
        "a normal number",
    ]
    assert said[3].standing is Standing.SUBNORMAL
    assert [field.bits for field in said[0x3C00].fields] == ["0", "01111", "0000000000"]
    assert look_at_code(0xFC, element("int8")).stored == -4


# Facts ----------------------------------------------------------------------------------------------------------------


def test_facts_of_known_formats() -> None:
    known = facts(element("e4m3fn"))
    assert (known.largest, known.smallest_normal, known.smallest_positive) == (448, 2**-6, 2**-9)
    assert (known.values, known.layout, known.infinity, known.nan) == (253, "1-4-3", False, True)
    assert facts(element("fp64")).values == 2**64 - 2**53 - 1
    assert facts(BLOCKS["mxfp4"]).bits == 4.25
    assert facts(BLOCKS["nvfp4"]).largest == 6 * 448
    assert facts(element("nf4")).decimal_digits is None


@pytest.mark.parametrize("format", [*ELEMENTS.values(), *BLOCKS.values()], ids=lambda format: format.name)
def test_every_format_has_facts(format: ElementFormat) -> None:
    known = facts(format)
    assert known.smallest <= known.smallest_positive
    assert 0 < known.smallest_positive <= known.largest < math.inf
