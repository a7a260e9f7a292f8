from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from html import escape, unescape
from pathlib import Path

import numpy as np
import pytest
from pages import Page, alone, chromium
from PIL import Image

from narrowcast.artifacts.manifest import Evidence, Histogram, MetricRecord
from narrowcast.report import render_html

Make = Callable[..., Evidence]


@pytest.fixture(params=["met", "not_met", "bare"])
def any_evidence(request: pytest.FixtureRequest) -> Evidence:
    return request.getfixturevalue(request.param)


def test_the_page_needs_nothing_else(any_evidence: Evidence):
    alone(render_html(any_evidence))


def test_the_page_is_sound(any_evidence: Evidence):
    page = Page(render_html(any_evidence))
    counts = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert [name for name, count in counts.items() if count > 1] == []
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))
    assert all(attributes.get("aria-label") for attributes in page.all("svg"))
    for attributes in page.all("section"):
        assert attributes["aria-labelledby"] in counts
    for _, attributes in page.tags:
        assert (attributes.get("href") or "#")[1:] in {*counts, ""}
        for name in re.findall(r"url\(#([^)]+)\)", " ".join(str(value) for value in attributes.values())):
            assert name in counts


def test_no_value_reads_nan(any_evidence: Evidence):
    page = Page(render_html(any_evidence))
    shown = [page.text, *(str(value) for _, attributes in page.tags for value in attributes.values() if value)]
    assert [words for words in shown if re.search(r"\b(?:nan|NaN|inf|None|null|undefined)\b", words)] == []


def test_sections_come_in_order(met: Evidence):
    page = Page(render_html(met))
    places = [
        page.text.index(words)
        for words in (
            "Budget met",
            "Before and after",
            "Formats",
            "Candidates",
            "Which operators lose accuracy",
            "The worst tensors, before and after",
            "Where the original’s time and bytes go",
            "Details",
        )
    ]
    assert places == sorted(places)


NUMBERS = """2.31× faster|3.79× smaller|99.8%|12.4 ms → 5.38 ms|18.6 MB → 4.91 MB|94.33%|94.11%|92.54 to 95.51%
0.22 points|−0.31 to 0.78 points|12.3 to 12.5 ms|5.34 to 5.43 ms|2.28 to 2.33×|13.8 ms|6.11 ms|5.96 to 6.34 ms
91.4 samples/s|242 samples/s|239 to 245 samples/s|2.65× more|43.8 ms|33.1 ms|127 MB|83.9 MB|1.52× less|131 ms|87.1 ms
tie 0.97 to 1.08×|at least 93.86%|0.25 points to spare|820 µs to spare|1.09 MB to spare|INT8 85.7%|FP32 10.7%|FP16 3.6%
9 candidates in 128 s|93.11 to 95.11%|2.30× faster|2.26 to 2.33×|8.90 ms|89.5 MB|misses accuracy, latency|keeps all limits
0.42|4.9×10⁻⁶|1.10 ms|14.3 dB|32.6 dB|79.0%|9.80 ms|13.5 MB|5.12 MB|128 calibration, 600 search, 900 report (seed 7)
Crops of one photograph stay in one part.|30 rounds of 14 runs each|Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz, 2 cores
amx_int8|Linux 6.1.0|16.8 GB|onnxruntime 1.23.2|9 March 2026, 14:05 UTC|narrowcast 0.1.0|900 samples that the search never saw
search part (600 samples)|2 threads, batch 1|minmax, percentile, entropy, mse|too few runs|Fused with it|bias corrected
24.7 dB|0.0226|33.1 dB|INT8 with calibrated ranges|1 of 28 groups only store|The worst 20 of 28|NOT_IMPLEMENTED"""


@pytest.mark.parametrize("words", [words for line in NUMBERS.splitlines() for words in line.split("|")])
def test_the_page_shows(met: Evidence, words: str, pages: dict[str, str]):
    if "met" not in pages:
        pages["met"] = Page(render_html(met)).text
    assert words in pages["met"]


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {}


def test_names_and_hashes_are_whole(met: Evidence):
    page = Page(render_html(met))
    for words in (met.model.ref, met.model.sha256, met.data.ref, met.data.sha256, met.chosen, met.verdict.headline):
        assert words in page.text
    titles = {attributes.get("title") for _, attributes in page.tags}
    assert {item.group for item in met.blame[:20]} <= titles
    assert {item.tensor for item in met.histograms} <= titles


def test_each_protocol_stands_once(met: Evidence):
    page = Page(render_html(met))
    for protocol in {m.protocol for m in met.measurements}:
        assert page.text.count(protocol) == 1


def test_a_budget_that_was_met_gives_no_advice(met: Evidence):
    page = Page(render_html(met))
    assert "Budget not met" not in page.text
    assert "What would help" not in page.text
    assert "Random weights" not in page.text
    assert "simulation" in page.text


def test_a_budget_that_was_not_met_says_what_would_help(not_met: Evidence):
    page = Page(render_html(not_met))
    assert "Budget not met" in page.text
    assert "Allow 12.1 ms, or use a processor with VNNI." in page.text
    assert "not measured" in page.text
    assert "Random weights. Nobody has trained this model." in page.text
    assert "No operator was singled out" in page.text
    assert "1 could not be built or run" in page.text


def test_no_blame_is_explained(make: Make, met: Evidence):
    full = met.plan.model_copy(update={"operators": met.plan.operators[3:]})
    assert "The full reduction of precision met the budget" in render_html(make(blame=(), plan=full))
    assert "It was not needed" in render_html(make(blame=()))


def test_an_empty_run_still_makes_a_page(bare: Evidence):
    page = Page(render_html(bare))
    for words in (
        "No limit was set.",
        "Nothing was measured.",
        "No candidates were recorded.",
        "The plan names no operators.",
    ):
        assert words in page.text


def test_what_the_user_wrote_is_text(not_met: Evidence):
    source = render_html(not_met)
    hostile = not_met.model.ref
    assert "<script" not in source
    assert source.count(escape(hostile, quote=False).replace('"', "&#34;").replace("'", "&#39;")) >= 8
    assert hostile in unescape(source)


def test_a_candidates_name_is_text_in_the_plot_too(make: Make, met: Evidence):
    nasty = "</svg><b id='x'>$\\frac{1}{0}$ 层"
    page = Page(render_html(make(candidates=(met.candidates[6].model_copy(update={"name": nasty}),), chosen=nasty)))
    assert "$\\frac{1}{0}$ 层" in page.text
    assert not page.all("b") or all("id" not in attributes for attributes in page.all("b"))


def test_rendering_twice_gives_the_same_page(met: Evidence):
    assert render_html(met) == render_html(met)


def test_report_json_gives_the_same_page(met: Evidence):
    assert any(math.isnan(item.accuracy) for item in met.candidates)  # NaN survives, too
    assert render_html(Evidence.model_validate_json(met.model_dump_json())) == render_html(met)


def test_only_the_worst_tensors_are_drawn(make: Make):
    many = tuple(
        Histogram(tensor=f"tensor {i}", sqnr_db=float(i), edges=(0.0, 1.0, 2.0), before=(1, 2), after=(2, 1))
        for i in range(30, 0, -1)
    )
    page = Page(render_html(make(histograms=many)))
    assert "tensor 1 " in page.text
    assert "tensor 12 " in page.text
    assert "tensor 13 " not in page.text


def test_counts_that_do_not_fit_their_edges_are_not_drawn(make: Make):
    broken = Histogram(tensor="broken", sqnr_db=3.0, edges=(0.0, 1.0), before=(1, 2), after=(2, 1))
    page = Page(render_html(make(histograms=(broken,), candidates=())))
    assert page.all("svg") == []


@pytest.mark.parametrize(("factor", "unit"), [(1e-3, "µs"), (1.0, "ms"), (1e3, "s")])
def test_the_axis_is_in_the_unit_that_reads_best(make: Make, met: Evidence, factor: float, unit: str):
    scaled = tuple(c.model_copy(update={"latency": c.latency * factor, "standings": ()}) for c in met.candidates)
    assert f"Median latency ({unit})" in Page(render_html(make(candidates=scaled))).text


@pytest.mark.parametrize("count", [1, 2, 40])
def test_any_number_of_candidates_can_be_drawn(make: Make, met: Evidence, count: int):
    alike = tuple(met.candidates[0].model_copy(update={"name": f"candidate {i}"}) for i in range(count))
    page = Page(render_html(make(candidates=alike)))
    labels = [attributes["aria-label"] or "" for attributes in page.all("svg")]
    assert any(f"for {count} candidates" in words for words in labels)


@pytest.mark.slow
def test_a_browser_shows_the_page(met: Evidence, tmp_path: Path):
    page = tmp_path / "report.html"
    page.write_text(render_html(met), encoding="utf-8")
    seen = tmp_path / "seen.png"
    chromium(tmp_path, page, f"--screenshot={seen}", "--window-size=1200,4000")
    with Image.open(seen) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("L"), np.float64)
    assert pixels.shape == (4000, 1200)
    # Text and pictures all the way down: no band of a quarter of the picture is blank.
    assert min(band.std() for band in np.array_split(pixels, 4)) > 5
    assert escape(met.verdict.headline) in chromium(tmp_path, page, "--dump-dom")


@pytest.mark.slow
@pytest.mark.parametrize("width", [520, 700, 1200])
def test_a_long_key_number_stays_in_its_column(make: Make, met: Evidence, tmp_path: Path, width: int):
    """The value of an error such as MSE is written with an exponent, and takes more room than a percentage."""
    lost = [m.model_copy(update={"value": 3.237e-5}) if m.measure == "accuracy" else m for m in met.measurements]
    metric = MetricRecord(name="mse", unit="", higher_is_better=False)
    source = render_html(make(metric=metric, measurements=tuple(lost)))
    assert "3.237×10⁻⁵</span>" in source
    count = (
        "<script>document.title = [...document.querySelectorAll('.big')].filter("
        "big => big.scrollWidth > big.clientWidth).length + ' too wide of ' + document.querySelectorAll('.big').length"
        "</script>"
    )
    page = tmp_path / "report.html"
    page.write_text(re.sub(r"<meta http-equiv=.Content-Security-Policy[^>]*>", "", source) + count, encoding="utf-8")
    assert "<title>0 too wide of 3</title>" in chromium(tmp_path, page, "--dump-dom", f"--window-size={width},900")
