"""What a load found, as people read it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from pages import alone, chromium
from rich.console import Console

from narrowcast.measure.load.records import Outcome
from narrowcast.measure.load.values import LoadResult, Probe, Recovery, Slo
from narrowcast.measure.statistics import Estimate
from narrowcast.report.load import render_load
from narrowcast.report.load_terminal import render_load_terminal
from narrowcast.report.load_words import headline, holds
from unit.load.load_results import records, result, run


def search() -> LoadResult:
    measured = run(records(), Slo(percentile=95, seconds=0.05))
    probes = [
        Probe(rate=rate, requests=1000, missed=Estimate(share, share / 2, min(1.0, share * 2), 1000), verdict=verdict)
        for rate, share, verdict in (
            (100, 0.0, "held"),
            (200, 0.05, "unclear"),
            (400, 0.7, "missed"),
            (800, 0.1, "void"),
        )
    ]
    return result(measured, probes=probes, largest=Estimate(210, 190, 230, 4000), confirmed=200.0)


def test_the_page_needs_nothing_else_and_opens(tmp_path: Path) -> None:
    source = render_load(search())
    url = "http://127.0.0.1:1"
    assert url in source
    page = alone(source.replace(url, ""))  # it names the server, but asks nobody
    assert "p95 ≤ 50.0" in page.text
    file, seen = tmp_path / "load.html", tmp_path / "load.png"
    file.write_text(source)
    chromium(tmp_path, file, f"--screenshot={seen}", "--window-size=1100,2500")
    assert seen.stat().st_size > 20_000


def test_the_page_and_the_terminal_say_the_same_and_escape_what_servers_say() -> None:
    slo = Slo(percentile=95, seconds=0.05)
    found = result(run(records(), slo))
    page = render_load(found)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http://www" not in page
    screen = io.StringIO()
    render_load_terminal(found, Console(file=screen, width=120))
    assert "\x1b[31m" not in screen.getvalue()
    for part in ("p95 ≤ 50.0", "unavailable"):
        assert part in page
        assert part in screen.getvalue()


def test_searches_recoveries_and_comparisons_are_drawn() -> None:
    measured = run(records(), Slo(percentile=95, seconds=0.05))
    assert render_load(search()).count("<circle") == 2 * len(search().probes)  # a wide and a narrow picture
    recovery = Recovery(
        capacity=200, normal=100, overload=400, before=4, during=3, seconds=1.5, definition="so", accepted=None
    )
    assert "overload begins" in render_load(result(measured, recovery=recovery))
    rates = {
        "dynamic": Estimate(500, 450, 550, 12),
        "static": Estimate(200, 180, 220, 12),
        "none": Estimate(490, 400, 600, 12),
    }
    kinds = dict.fromkeys(rates, measured)
    gains = {"static": Estimate(2.5, 2.3, 2.8, 12), "none": Estimate(1.02, 0.9, 1.1, 12)}
    probes = [probe.model_copy(update={"kind": "static"}) for probe in search().probes]
    compared = result(measured, others=kinds, goodputs=rates, gains=gains, probes=probes)
    words = "has 2.50× the goodput of static batching and no more goodput beyond noise than no batching"
    screen = io.StringIO()
    render_load_terminal(compared, Console(file=screen, width=200))
    for text in (render_load(compared), screen.getvalue()):
        assert words in text
        assert "static batching, held" in text


@pytest.mark.parametrize("scenario", ["server", "stress", "rate"])
def test_what_was_interrupted_passes_no_verdict(scenario: str) -> None:
    whole = result(run(records(), Slo(percentile=95, seconds=0.05)), interrupted=True)
    found = whole.model_copy(update={"workload": whole.workload.model_copy(update={"scenario": scenario})})
    assert holds(found) is None
    assert headline(found).startswith("Interrupted")
    assert "Interrupted" in render_load(found)


def test_a_run_without_an_answer_can_be_shown() -> None:
    made = records()
    made["outcome"] = Outcome.SHED
    found = result(run(made))
    assert "Void: none of 3600 requests had a good answer" in render_load(found)
    render_load_terminal(found, Console(file=io.StringIO()))
