"""What holds for every format, those that users make up too."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from format_engines import cast, decode, encode
from format_values import ROUNDINGS, SMALL, same_bits
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from narrowcast.errors import FormatError
from narrowcast.formats import reference
from narrowcast.formats.kinds import Codebook, ElementFormat, Format, Integer, Nan
from narrowcast.formats.rules import Rules

EXAMPLES = settings(max_examples=120, deadline=None)
DIRECTIONS = [*ROUNDINGS, "stochastic"]


@st.composite
def floats(draw: st.DrawFn, bits: int = 64) -> Format:
    """Draw a floating-point format of the user's own."""
    exponent_bits = draw(st.integers(1, 11))
    mantissa_bits = draw(st.integers(0, min(52, bits - 1 - exponent_bits)))
    usual = 2 ** (exponent_bits - 1) - 1
    bias = draw(st.one_of(st.just(usual), st.integers(usual - 150, usual + 150)))
    signed, has_zero = draw(st.booleans()), draw(st.sampled_from([True, True, True, False]))
    nan = draw(st.sampled_from(list(Nan)))
    try:
        return Format(exponent_bits, mantissa_bits, bias, signed=signed, nan=nan, has_zero=has_zero)
    except FormatError:
        assume(False)
        raise


@st.composite
def integers(draw: st.DrawFn) -> Integer:
    """Draw an integer, or a fixed-point number, of the user's own."""
    signed = draw(st.booleans())
    return Integer(draw(st.integers(1 + signed, 16)), signed, draw(st.one_of(st.just(0), st.integers(0, 64))))


@st.composite
def codebooks(draw: st.DrawFn) -> Codebook:
    """Draw a table of numbers."""
    entries = st.floats(-(2.0**100), 2.0**100, width=draw(st.sampled_from([32, 64])))
    values = draw(st.lists(entries, min_size=2, max_size=draw(st.sampled_from([4, 16, 80])), unique=True))
    return Codebook("drawn", tuple(sorted(value + 0.0 for value in values)))


FORMATS = st.one_of(st.sampled_from(list(SMALL.values())), floats(16), floats(), integers(), codebooks())
FINITE = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def near(draw: st.DrawFn, format: ElementFormat) -> float:
    """Draw a number: any, one of the format's own range, or one close to a value or a midpoint of the format."""
    kind = draw(st.sampled_from(["any", "range", "value", "middle"]))
    if kind == "any":
        return draw(FINITE)
    if kind == "range":
        return draw(st.floats(format.min, format.max))
    low = reference.decode(draw(st.integers(0, count(format) - 1)), format)
    assume(np.isfinite(low))
    if kind == "middle":
        high = reference.decode(draw(st.integers(0, count(format) - 1)), format)
        assume(np.isfinite(high))
        low = low / 2 + high / 2
    for _ in range(draw(st.integers(0, 2))):
        low = float(np.nextafter(low, draw(st.sampled_from([-np.inf, np.inf]))))
    assume(np.isfinite(low))
    return low


def count(format: ElementFormat) -> int:
    return len(format.values) if isinstance(format, Codebook) else 1 << format.bits


def fits(x: float, format: ElementFormat) -> bool:
    """Return whether a number is between the format's ends, and has a sign that the format has."""
    return format.min <= x <= format.max


@EXAMPLES
@given(st.data())
def test_encoding_what_was_decoded_gives_the_code_back(data: st.DataObject) -> None:
    format = data.draw(FORMATS)
    code = data.draw(st.integers(0, count(format) - 1))
    value = decode(np.array([code], np.uint64), format)
    assert same_bits(value, np.array([reference.decode(code, format)])).all()
    assume(not np.isnan(value[0]))
    assert encode(value, format, rounding=data.draw(st.sampled_from(DIRECTIONS))).tolist() == [code]


@EXAMPLES
@given(st.data())
def test_arrays_encode_as_the_reference_does(data: st.DataObject) -> None:
    format = data.draw(FORMATS)
    rounding = data.draw(st.sampled_from(ROUNDINGS))
    x = np.array(data.draw(st.lists(near(format), min_size=1, max_size=8)))
    rules = Rules.of(format, rounding=rounding)
    assert encode(x, format, rounding=rounding).tolist() == [reference.encode(v, format, rules) for v in x.tolist()]
    with np.errstate(over="ignore", under="ignore"):
        single = x.astype(np.float32)
    wanted = [reference.encode(v, format, rules) for v in single.tolist()]
    assert encode(single, format, rounding=rounding).tolist() == wanted


@EXAMPLES
@given(st.data())
def test_a_cast_stays_what_it_is_when_cast_again(data: st.DataObject) -> None:
    format = data.draw(FORMATS)
    rounding = data.draw(st.sampled_from(DIRECTIONS))
    x = np.array([data.draw(near(format))])
    once = cast(x, format, rounding=rounding)
    assert same_bits(cast(once, format, rounding=rounding), once).all()


@EXAMPLES
@given(st.data())
def test_a_larger_number_never_becomes_a_smaller_one(data: st.DataObject) -> None:
    format = data.draw(FORMATS)
    x = np.sort(np.array([data.draw(near(format)) for _ in range(6)]))
    rounding = data.draw(st.sampled_from([name for name in ROUNDINGS if name != "to_odd"]))
    rounded = cast(x, format, rounding=rounding, overflow="clamp", **clamped_below(format))
    assert (np.diff(rounded) >= 0).all()


def clamped_below(format: ElementFormat) -> dict[str, str]:
    return {"below": "clamp"} if isinstance(format, Format) and not format.signed else {}


@EXAMPLES
@given(st.data())
def test_signed_floats_round_a_number_and_its_negative_alike(data: st.DataObject) -> None:
    format = data.draw(floats().filter(lambda item: item.signed))
    x = np.array([data.draw(near(format))])
    mirrored = {"up": "down", "down": "up"}
    rounding = data.draw(st.sampled_from(ROUNDINGS))
    rounded, other = cast(x, format, rounding=rounding), cast(-x, format, rounding=mirrored.get(rounding, rounding))
    assert (rounded == -other).all() or (np.isnan(rounded) & np.isnan(other)).all()


@EXAMPLES
@given(st.data())
def test_every_rounding_lands_on_one_of_the_two_neighbours(data: st.DataObject) -> None:
    format = data.draw(FORMATS)
    x = data.draw(near(format))
    assume(fits(x, format))
    below, above = (cast(np.array([x]), format, rounding=name)[0] for name in ("down", "up"))
    assume(np.isfinite(below) and np.isfinite(above))
    if isinstance(format, Format) and not format.has_zero and abs(x) < format.smallest_normal:
        return  # between the smallest numbers there is nothing
    assert below <= x <= above
    between = (
        0 if below == above else int(encode(np.array([above]), format)[0]) != int(encode(np.array([below]), format)[0])
    )
    assert between == (below != x)
    for rounding in DIRECTIONS:
        found = cast(np.array([x]), format, rounding=rounding)[0]
        assert found in (below, above), rounding
    toward_zero = cast(np.array([x]), format, rounding="toward_zero")[0]
    assert toward_zero == (above if abs(above) < abs(below) else below)  # a table need not hold zero


@EXAMPLES
@given(st.data())
def test_rounding_to_nearest_errs_by_half_the_gap_at_most(data: st.DataObject) -> None:
    format = data.draw(FORMATS)
    x = data.draw(near(format))
    assume(fits(x, format))
    below, above = (cast(np.array([x]), format, rounding=name)[0] for name in ("down", "up"))
    assume(np.isfinite(below) and np.isfinite(above) and below <= x <= above)
    for rounding in ("nearest_even", "nearest_away"):
        found = float(cast(np.array([x]), format, rounding=rounding)[0])
        error = abs(Fraction(found) - Fraction(x))
        assert error == min(abs(Fraction(float(end)) - Fraction(x)) for end in (below, above))
        assert 2 * error <= Fraction(float(above)) - Fraction(float(below))


@EXAMPLES
@given(st.data())
def test_half_an_ulp_of_a_float_and_half_a_step_of_an_integer(data: st.DataObject) -> None:
    format = data.draw(st.one_of(floats(), integers()))
    x = data.draw(st.floats(format.min, format.max))
    if isinstance(format, Format):
        assume(abs(x) >= format.smallest_normal)
        bound = Fraction(format.eps) / 2 * abs(Fraction(x))  # relative: half of epsilon
    else:
        bound = Fraction(format.step) / 2
    found = float(cast(np.array([x]), format)[0])
    assume(np.isfinite(found))
    assert abs(Fraction(found) - Fraction(x)) <= bound


@EXAMPLES
@given(st.data())
def test_to_odd_is_exact_or_has_the_odd_code(data: st.DataObject) -> None:
    format = data.draw(st.one_of(floats().filter(lambda item: item.mantissa_bits), integers(), codebooks()))
    x = data.draw(near(format))
    assume(fits(x, format) and not (isinstance(format, Format) and not format.has_zero))
    code = encode(np.array([x]), format, rounding="to_odd")
    assert decode(code, format)[0] == x or int(code[0]) % 2 == 1


@pytest.mark.parametrize("format", SMALL.values(), ids=SMALL)
def test_codes_grow_with_the_numbers_they_stand_for(format: ElementFormat) -> None:
    x = np.sort(np.random.default_rng(0).normal(0, 1, 2000) * min(format.max, 1e30))
    rounded = cast(x, format, overflow="clamp", **clamped_below(format))
    assert (np.diff(rounded) >= 0).all()
    assert len(np.unique(rounded)) > 1
