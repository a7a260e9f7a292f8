from __future__ import annotations

import doctest
import math

import pytest

from narrowcast.artifacts.manifest import MetricRecord
from narrowcast.report import text

TOP1 = MetricRecord(name="top1", unit="", higher_is_better=True)
MSE = MetricRecord(name="mse", unit="", higher_is_better=False)
SQNR = MetricRecord(name="sqnr", unit="dB", higher_is_better=True)


def plain(words: str) -> str:
    return words.replace("\N{NO-BREAK SPACE}", " ")


def test_the_examples_in_the_docstrings_hold():
    found = doctest.testmod(text)
    assert found.attempted >= 7
    assert found.failed == 0


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (0.01241, "s", "12.4 ms"),
        (1.5, "seconds", "1.50 s"),
        (8.2e-7, "s", "0.820 µs"),
        (12.5, "ms", "12.5 ms"),
        (0.9996, "s", "1.00 s"),
        (128.4, "s", "128 s"),
        (4_913_204, "bytes", "4.91 MB"),
        (999, "B", "999 B"),
        (999_600, "bytes", "1.00 MB"),
        (18.6, "MB", "18.6 MB"),
        (33.25, "dB", "33.2 dB"),
        (12, "", "12"),
        (2.307, "x", "2.31×"),
        (45.1, "%", "45.10%"),
        (123456.7, "samples/s", "123,457 samples/s"),
    ],
)
def test_quantities_are_scaled_to_what_reads_best(value: float, unit: str, expected: str):
    assert plain(text.quantity(value, unit)) == expected


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_a_dash_everywhere(value: float | None):
    shown = [text.number(value), text.integer(value), text.share(value), text.ratio(value), text.noise(value)]
    shown += [text.quantity(value, unit) for unit in ("s", "bytes", "dB", "x", "", "%")]
    if value is not None:
        shown += [form(value, 0) for record in (TOP1, MSE) for form in (text.accuracy(record), text.drop(record))]
        shown.append(text.drop(SQNR)(value, 0))
    assert set(shown) == {text.MISSING}
    assert text.interval(value, 1.0, text.ratio) == ""


def test_a_metric_is_written_in_its_own_way():
    assert text.accuracy(TOP1)(0.9411, 0) == "94.11%"
    assert plain(text.drop(TOP1)(-0.0022, 0)) == "−0.22 points"
    assert text.accuracy(MSE)(0.000123, 0) == "0.0001230"
    assert plain(text.accuracy(SQNR)(31.26, 0)) == "31.26 dB"
    assert text.accuracy(SQNR)(math.inf, 0) == "exact"
    assert text.accuracy(SQNR)(math.nan, 0) == text.MISSING


def test_different_values_never_read_the_same():
    first, second = text.apart(6_000_400.0, 6e6, lambda value, extra: text.quantity(value, "bytes", extra))
    assert (plain(first), plain(second)) == ("6.0004 MB", "6.0000 MB")
    assert text.apart(2.0, 2.0, text.ratio) == ("2.00×", "2.00×")


def test_an_interval_of_different_units_keeps_both():
    form = lambda value, extra: text.quantity(value, "s", extra)  # noqa: E731
    assert plain(text.interval(0.0009, 0.0012, form)) == "900 µs to 1.20 ms"


@pytest.mark.parametrize(("low", "high", "expected"), [(0.97, 1.08, True), (1.01, 1.2, False), (math.nan, 2.0, False)])
def test_a_tie_is_an_interval_that_holds_one(low: float, high: float, expected: bool):
    assert text.tie(low, high) is expected


def test_times_are_for_people():
    assert text.when("2026-03-09T14:05:00+02:00") == "9 March 2026, 12:05 UTC"
    assert text.when("2026-03-09T14:05:00") == "9 March 2026, 14:05 UTC"
    assert text.when("yesterday") == "yesterday"


def test_a_label_is_printable_and_fits():
    assert text.label("a\x00b\nc") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c"
    assert len(text.label("x" * 500, 30)) == 30
    assert text.label("67.5\xa0GB") == "67.5\xa0GB"


def test_a_terminal_without_unicode_gets_ascii():
    assert text.ascii_of("✓ 2.31× 5.4×10⁻⁵ 820\xa0µs – …") == "yes 2.31x 5.4e-5 820 us - ..."
