from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from narrowcast.artifacts.manifest import Evidence, Measurement
from narrowcast.report import measurement_table, render_terminal


def shown(evidence: Evidence, width: int, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    render_terminal(evidence, Console(file=stream, width=width, color_system=None, force_terminal=False))
    stream.flush()
    return raw.getvalue().decode(encoding).replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_no_line_is_wider_than_the_terminal(met: Evidence, not_met: Evidence, width: int):
    for evidence in (met, not_met):
        assert max(cell_len(line) for line in shown(evidence, width).splitlines()) <= width


def test_a_wide_terminal_shows_everything(met: Evidence):
    found = shown(met, 100)
    for words in (
        "✓ Budget met",
        met.verdict.headline,
        "99.8% of accuracy kept",
        "0.25 points to spare",
        "94.11% (92.54 to 95.51)",
        "2.31× faster (2.28 to 2.33)",
        "tie (0.97 to 1.08)",
        "too few runs",
        "89.5 MB",
        "misses latency, size",
        "NOT_IMPLEMENTED",
        "kept in FP32",
        "simulation",
        "accuracy on the report part",
        "accuracy on the search part",
    ):
        assert words in found
    assert found.count("kept in FP32") == 3
    assert "0.0064" in found
    assert "0.0035" not in found  # the ninth of the blamed groups
    assert "…   " not in found.split("Which operators")[0]  # no column is cut off


def test_a_narrow_terminal_keeps_what_matters(met: Evidence):
    found = shown(met, 80)
    for words in ("2.31× faster", "94.11%", "5.38 ms", "1.04×", "18.4 MB", "misses latency", "0.42"):
        assert words in found
    assert "89.5 MB" not in found


def test_a_budget_that_was_not_met_says_so(not_met: Evidence):
    found = shown(not_met, 100)
    for words in (
        "✗ Budget not met",
        "Random weights",
        "What would help",
        "5.90 ms over",
        "not measured",
        "tie (0.98 to 1.05)",
    ):
        assert words in found
    assert "nan" not in found.lower()
    assert "Which operators" not in found


def test_markup_in_names_is_text(make, met: Evidence):
    name = "[bold red]x[/] \x1b[31m"
    only = met.candidates[6].model_copy(update={"name": name})
    found = shown(make(candidates=(only,), chosen=name), 140)
    assert "[bold red]x[/]" in found
    assert "\x1b" not in found


def test_a_terminal_without_unicode_is_served(met: Evidence):
    found = shown(met, 100, "ascii")
    assert "yes Budget met" in found
    assert "2.31x faster" in found


def test_an_empty_run_is_shown(bare: Evidence):
    found = shown(bare, 80)
    assert bare.verdict.headline in found
    assert "Candidates" not in found


def test_measurements_alone_make_a_table(met: Evidence):
    raw = io.StringIO()
    Console(file=raw, width=120, color_system=None).print(measurement_table(list(met.measurements)))
    found = raw.getvalue().replace("\N{NO-BREAK SPACE}", " ")
    for words in ("0.9411 (0.9254 to 0.9551)", "3.79× smaller", "2.31× faster (2.28 to 2.33)", "tie (0.97 to 1.08)"):
        assert words in found


def test_accuracy_reads_as_its_metric_where_that_is_known(met: Evidence):
    raw = io.StringIO()
    Console(file=raw, width=120, color_system=None).print(measurement_table(met.measurements, met.metric))
    assert "94.11% (92.54 to 95.51)" in raw.getvalue()


def test_colour_follows_what_is_better_not_the_word(make):
    worse = Measurement(measure="peak_memory", subject="ratio", value=0.8, unit="x")
    better = Measurement(measure="throughput", subject="ratio", value=1.3, unit="x")
    raw = io.StringIO()
    Console(file=raw, width=120, color_system="standard", force_terminal=True).print(measurement_table([worse, better]))
    assert "\x1b[31m0.80× more" in raw.getvalue()
    assert "\x1b[32m1.30× more" in raw.getvalue()
