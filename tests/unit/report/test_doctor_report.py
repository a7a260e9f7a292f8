"""What is said of a run's numbers: the page, the pictures, the values for programs, and TensorBoard's files."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from doctor_runs import LAYERS, STEPS, counted, write_run
from pages import alone, chromium
from PIL import Image
from rich.console import Console

from narrowcast.errors import ArtifactError, FormatError
from narrowcast.formats import cast
from narrowcast.report.doctor import render_doctor
from narrowcast.report.doctor_board import write_board
from narrowcast.report.doctor_json import doctor_record
from narrowcast.report.doctor_plots import HeatRow, Mark, heat_map, timeline
from narrowcast.report.doctor_run import PARTS, open_run, worst
from narrowcast.report.doctor_terminal import render_doctor_terminal
from narrowcast.training.doctor.buckets import fold
from narrowcast.training.doctor.record import append, read, write_series
from narrowcast.training.doctor.values import EventKind, Layer, Part, Reading, Setting
from narrowcast.training.doctor.whatif import shares


@pytest.fixture(params=["unhealthy", "healthy", "unscaled", "bare"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    match request.param:
        case "bare":
            layers = (Layer(name="", kind="Linear", parameters=3),)
            setting = Setting(
                level="cheap", every=50, precision="fp32", compute="fp32", formats=("fp16",), layers=layers
            )
            append(run / "doctor", [setting])
            return run
        case kind:
            return write_run(run, healthy=kind == "healthy", scaled=kind != "unscaled")


def test_the_page_is_sound_and_needs_nothing_else(folder: Path):
    source = render_doctor(open_run(folder))
    alone(source)
    assert not re.search(r"\bnan\b|\binf\b|None", re.sub(r"NaN|<style>.*?</style>", "", source, flags=re.DOTALL))
    json.dumps(doctor_record(open_run(folder)), allow_nan=False)


def test_the_page_says_verdict_cause_remedies_and_advice(tmp_path: Path):
    source = render_doctor(open_run(write_run(tmp_path)))
    for words in (
        "needs attention",
        "blocks.1.mlp.up overflows FP16 in the forward pass from step 118 on",
        "61% of the gradients of stem.conv become zero.",
        "Overflow to infinity in blocks.1.mlp.up, forward, aten.addmm",
        "keep layer &#39;blocks.1.mlp.up&#39; in fp32",
        "17 infinite",
        "Loss scale <strong>2¹⁴</strong>",
        "non-finite at 118",
    ):
        assert words in source, words
    assert source.count('class="mark good"') == 2
    assert source.count('class="mark bad"') == 1
    assert "sound" in render_doctor(open_run(write_run(tmp_path / "other", healthy=True)))


def test_names_cannot_become_markup(tmp_path: Path):
    write_run(tmp_path)
    record = tmp_path / "doctor" / "record.jsonl"
    record.write_text(record.read_text().replace("blocks.1.mlp.up", "<b>&\\u202e"))
    source = render_doctor(open_run(tmp_path))
    assert "<b>" not in source
    assert "&lt;b&gt;&amp;" in source


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["fp16", "bf16", "e4m3fn", "e5m2"])
def test_what_if_agrees_with_the_format_itself(tmp_path: Path, format: str):
    """Counted shares against casting the very numbers: within the bounds, for activations and for scaled gradients."""
    run = open_run(write_run(tmp_path), [format])
    layer = next(one for one in run.layers if one.name == LAYERS[4])
    rng = np.random.default_rng(7)
    values = 2.0 ** rng.normal(-20, 6, 20_000)
    counts = counted(values)
    held = shares(counts, format, scale=run.scale)
    rounded = cast(values * run.scale, format, overflow="ieee")
    zero, over = float((rounded == 0).mean()), float((~np.isfinite(rounded)).mean())
    assert held.zero.low <= zero <= held.zero.high
    assert held.overflow.low <= over <= held.overflow.high
    assert layer.parts[Part.FORWARD].held[format].plain.scale == 1.0
    assert layer.parts[Part.BACKWARD].held[format].plain.scale == run.scale == 2.0**15


def test_a_scale_of_its_own_keeps_the_largest_number(tmp_path: Path):
    run = open_run(write_run(tmp_path))
    for layer in run.layers:
        for part, view in layer.parts.items():
            for held in view.held.values():
                assert held.scaled.overflow.high == 0, (layer.name, part)
                assert math.log2(held.factor) % 1 == 0


def test_events_that_are_alike_are_told_once(tmp_path: Path):
    run = write_run(tmp_path)
    told = open_run(run).record.events
    more = [
        event.model_copy(update={"step": event.step + late, "sentence": event.sentence.replace("61%", f"{late}%")})
        for late in (3, 40)
        for event in told
    ]
    append(run / "doctor", more)
    found = open_run(run)
    assert [(one.first.kind, one.first.step, one.count, one.last) for one in found.events] == [
        (EventKind.NONFINITE, 118, 3, 158),
        (EventKind.VANISHED, 180, 3, 220),
        (EventKind.BACKOFF, 2, 3, 42),
    ]
    assert found.events[0].again == "2 times more, last at step 158"
    assert found.headline == "Overflow to infinity in blocks.1.mlp.up, forward, aten.addmm, at step 118"
    assert render_doctor(found).count('class="card cause"') == 1


def test_gradients_are_judged_under_the_scale_that_moved_the_weights(tmp_path: Path):
    run = write_run(tmp_path)
    append(run / "doctor", [Reading(step=STEPS, scale=2.0**-n, skipped=True) for n in range(3)])
    found = open_run(run)
    assert found.scale == 2.0**15
    assert found.steps == STEPS


def test_updates_are_given_beside_their_weights(tmp_path: Path):
    run = open_run(write_run(tmp_path))
    for place, layer in enumerate(run.layers):
        # Drawn around 2**(-9 + 0.3 * place), and 0.01 octaves more a step, of which there are 220 at most.
        assert layer.ratio is not None
        assert -9.3 < math.log2(layer.ratio) - 0.3 * place < -6.5
        assert layer.stagnant["e5m2"].low > 0.5 > layer.stagnant["fp16"].high


def test_the_cheap_level_says_what_it_left_out(tmp_path: Path):
    run = write_run(tmp_path)
    assert not any("deep" in note for note in open_run(run).notes)
    kept = [one for one in read(run).series if one.part not in (Part.FORWARD, Part.BACKWARD)]
    write_series(run / "doctor", kept)
    append(run / "doctor", [read(run).setting.model_copy(update={"level": "cheap"})])
    found = open_run(run)
    assert any("`doctor: deep` has them" in note for note in found.notes)
    screen = Console(file=io.StringIO(), width=80, highlight=False)
    render_doctor_terminal(found, screen)
    assert "weights" in screen.file.getvalue()  # type: ignore[attr-defined]


def test_the_worst_layer_is_the_one_that_overflows(tmp_path: Path):
    run = open_run(write_run(tmp_path), ["e4m3fn"])
    found = worst(run, Part.FORWARD, "e4m3fn")
    assert found is not None
    assert found[0] == LAYERS[4]
    assert worst(run, Part.GRADIENT, "e4m3fn") is None
    assert run.formats == ("e4m3fn", "fp16", "e5m2")


def test_the_format_that_is_computed_in_comes_first(tmp_path: Path):
    assert open_run(write_run(tmp_path / "a")).formats == ("fp16", "e4m3fn", "e5m2")
    assert open_run(write_run(tmp_path / "b", scaled=False)).formats == ("bf16", "fp16", "e4m3fn", "e5m2")


# Files ----------------------------------------------------------------------------------------------------------------


def test_lines_that_a_killed_run_left_are_left_out_with_a_note(tmp_path: Path):
    write_run(tmp_path)
    for name in ("log.jsonl", "skips.jsonl", "doctor/record.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 99999, "lo')
    run = open_run(tmp_path)
    assert [note for note in run.notes if "cut off" in note] == [
        f"{name}: the last line is cut off, as a killed run leaves it, and was left out"
        for name in ("record.jsonl", "log.jsonl", "skips.jsonl")
    ]
    assert run.steps == STEPS
    assert run.skipped == (118,)
    assert "cut off" in render_doctor(run)


def test_damaged_lines_are_left_out_with_a_note(tmp_path: Path):
    write_run(tmp_path)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    (tmp_path / "log.jsonl").write_text("\n".join(["\x00\x00", "[1]", *lines]) + "\n")
    with (tmp_path / "skips.jsonl").open("a") as file:
        file.write('{"step": "late"}\n')
    run = open_run(tmp_path)
    assert "log.jsonl: line 1 is damaged and was left out" in run.notes
    assert "log.jsonl: line 2 is damaged and was left out" in run.notes
    assert any(note.startswith("skips.jsonl: 1 line") for note in run.notes)
    assert len(run.log) == len(lines)


def test_the_log_stands_in_where_the_doctor_read_nothing(tmp_path: Path):
    write_run(tmp_path)
    record = tmp_path / "doctor" / "record.jsonl"
    kept = [line for line in record.read_text().splitlines() if json.loads(line)["type"] != "reading"]
    record.write_text("\n".join(kept) + "\n")
    run = open_run(tmp_path)
    assert [reading.step for reading in run.readings] == list(range(0, STEPS, 10))
    assert run.readings[0].loss == pytest.approx(2.3, abs=0.1)


def test_folders_without_a_record_say_what_to_do(tmp_path: Path):
    with pytest.raises(ArtifactError, match="does not exist"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="narrowcast train"):
        open_run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is a file"):
        open_run(tmp_path / "file")
    with pytest.raises(FormatError, match="e5m2"):
        open_run(write_run(tmp_path / "run"), ["e5m3x"])
    with pytest.raises(FormatError, match="blocks"):
        open_run(tmp_path / "run", ["mxfp4"])


# Pictures -------------------------------------------------------------------------------------------------------------


def _texts(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("text")]


@pytest.mark.parametrize(
    "losses",
    [[1.0], [2.0, 2.0, 2.0], [1.0, math.inf, 3.0], [math.nan] * 3, [0.0, 0.0], [1e-30, 1e30], [-5.0, 4.0]],
    ids=["one", "flat", "infinite", "nan", "zero", "far", "negative"],
)
def test_curves_of_any_numbers_are_drawn(losses: list[float]):
    readings = [Reading(step=step, loss=loss, grad_norm=abs(loss), scale=2.0**step) for step, loss in enumerate(losses)]
    for width in (860, 400):
        svg = timeline(readings, [0], [], name="t", width=width)
        assert "nan" not in svg.replace("NaN", "")
        words = _texts(svg)
        assert "Loss" in words
        assert any("not finite" in word for word in words) == any(not math.isfinite(loss) for loss in losses)


def test_a_peak_of_one_step_is_not_lost_among_many():
    readings = [Reading(step=step, loss=100.0 if step == 31_234 else 1.0) for step in range(50_000)]
    svg = timeline(readings, [], [], name="t")
    assert len(svg) < 100_000
    curve = re.search(r'class="curve" d="([^"]*)"', svg)
    assert curve is not None
    heights = [float(y) for y in re.findall(r"[ML]\d+ ([\d.]+)", curve.group(1))]
    assert min(heights) < max(heights) - 70


def test_labels_of_marks_do_not_lie_on_each_other():
    marks = [Mark(step, EventKind.NONFINITE, "words", normal=step == 0) for step in range(0, 100, 2)]
    svg = timeline([Reading(step=step, loss=1.0) for step in range(100)], [], marks, name="t")
    ends = []
    for node in ElementTree.fromstring(svg).iter():
        if node.tag.endswith("text") and (node.text or "").startswith("non-finite at"):
            x, size = float(node.get("x", 0)), 7.4 * len(node.text or "")
            ends.append((x - size, x) if "e " in node.get("class", "") else (x, x + size))
    ends.sort()
    assert 2 <= len(ends) < 20
    assert all(first[1] < second[0] for first, second in itertools.pairwise(ends))
    assert svg.count('class="o"') == 49


def test_heat_maps_place_exponents_and_limits():
    columns = fold(counted(np.array([1.5] * 90 + [0.0] * 5 + [70_000.0] * 5 + [math.inf])))
    svg = heat_map([HeatRow("layer", columns, "words")], ["fp16"], name="m")
    drawn = re.findall(r'class="cell (\w+)" d="M([\d.]+)', svg)
    assert [shade for shade, _ in drawn] == ["h4", "h6", "hot"]
    limit = re.search(r'class="o" d="M([\d.]+) [^>]*><title>fp16: overflows', svg)
    assert limit is not None
    ones = float(dict(drawn)["h6"])
    octaves = (float(limit.group(1)) - ones) / 16  # 1.5 lies in the octave from 2**0, 65,520 just under 2**16
    assert re.search(rf"M{ones + 16 * octaves:.0f}", re.sub(r"\.\d", "", svg)) is not None
    shifted = heat_map([HeatRow("layer", columns, "words")], ["fp16"], name="m", scale=2.0**4)
    moved = re.search(r'class="o" d="M([\d.]+) [^>]*><title>fp16: overflows', shifted)
    assert moved is not None
    assert float(moved.group(1)) < float(limit.group(1))


def test_rows_without_numbers_and_long_names_are_drawn():
    rows = [HeatRow("x" * 300, np.zeros(258, np.int64), "nothing"), HeatRow("", fold(counted(np.zeros(4))), "zeros")]
    for width in (860, 400):
        words = _texts(heat_map(rows, ["fp16", "int8", "nf4"], name="m", width=width))
        assert max(map(len, words)) < 60


@pytest.mark.slow
def test_a_browser_shows_the_page_without_labels_on_labels(tmp_path: Path):
    page = tmp_path / "doctor.html"
    page.write_text(render_doctor(open_run(write_run(tmp_path / "run"))), encoding="utf-8")
    seen = tmp_path / "seen.png"
    chromium(tmp_path, page, f"--screenshot={seen}", "--window-size=1200,4000")
    with Image.open(seen) as image:
        pixels = np.asarray(image.convert("L"), np.float64)
    for part in np.split(pixels, 4):
        assert part.std() > 4


def test_shares_of_a_sample_are_said_to_be_such(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    whole = open_run(folder)
    count = sum(int(one.total.sum()) for one in whole.record.series if one.part in PARTS)
    assert whole.counted == (count, count)
    write_series(folder / "doctor", [replace(one, numbers=10 * one.numbers) for one in whole.record.series])
    run = open_run(folder)
    screen = Console(file=io.StringIO(), width=400)
    render_doctor_terminal(whole, screen)
    assert "sample of" not in screen.file.getvalue() + render_doctor(whole)
    render_doctor_terminal(run, screen)
    assert f"shares are of a sample of {count:,} of {10 * count:,} numbers" in screen.file.getvalue()
    page = render_doctor(run)
    assert f"shares are of this sample of {10 * count:,}" in page
    assert "a sample of 48,000 of 480,000 numbers, the smallest above" in page
    parts = doctor_record(run)["layers"][0]["parts"]
    assert {(part["count"], part["numbers"]) for part in parts.values()} == {(48_000, 480_000)}


# TensorBoard ----------------------------------------------------------------------------------------------------------


def test_tensorboard_reads_scalars_and_exponents(tmp_path: Path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = open_run(write_run(tmp_path / "run"))
    assert write_board(run, tmp_path / "board") == len(run.record.series)
    found = event_accumulator.EventAccumulator(str(tmp_path / "board"), size_guidance={"scalars": 0, "histograms": 0})
    found.Reload()
    losses = found.Scalars("doctor/loss")
    assert len(losses) == STEPS - 1  # one is infinite
    assert losses[0].value == pytest.approx(run.readings[0].loss)
    histograms = found.Histograms(f"exponents/forward/{LAYERS[0]}")
    series = run.record.of(LAYERS[0], Part.FORWARD)
    assert series is not None
    assert [one.step for one in histograms] == series.steps.tolist()
    last = histograms[-1].histogram_value
    assert last.num == series.columns[-1].sum()
    assert last.max == math.floor(math.log2(series.largest[-1])) + 1
    assert {part.value for part in PARTS if part is not Part.GRADIENT} <= {
        tag.split("/")[1] for tag in found.Tags()["histograms"]
    }
