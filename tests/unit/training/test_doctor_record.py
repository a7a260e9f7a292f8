"""The record on disk, the advice, and the verdict's words."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from narrowcast.errors import ArtifactError, FormatError, TrainingError
from narrowcast.training.doctor.buckets import BUCKETS, EDGES
from narrowcast.training.doctor.histories import Histories, Sample, format_advice, scale_advice
from narrowcast.training.doctor.journal import Journal
from narrowcast.training.doctor.record import append, read, write_series
from narrowcast.training.doctor.resuming import mark, rewind
from narrowcast.training.doctor.values import Cause, Event, EventKind, Part, Reading, Remedy, Setting
from narrowcast.training.doctor.verdict import Tally, cause_sentence

SETTING = Setting(level="cheap", every=50, precision="fp32", compute="fp32", formats=("fp16",), layers=())


def histogram(numbers):
    counts = np.zeros(BUCKETS, np.int64)
    for number in numbers:
        counts[int(np.searchsorted(EDGES, abs(number), side="left"))] += 1
    return counts


def series_of(numbers, part=Part.BACKWARD, layer="head", steps=1):
    histories = Histories()
    for step in range(steps):
        histories.add(layer, part, Sample(step, 1.0, histogram(numbers), max(map(abs, numbers)), len(numbers)))
    return histories.series([layer])


def written(folder):
    """Write a record in a run's folder and return its lines' file."""
    append(folder / "doctor", [SETTING, Reading(step=0, loss=math.inf), Reading(step=1)])
    write_series(folder / "doctor", series_of([1.0, 0.5], steps=3))
    return folder / "doctor" / "record.jsonl"


def test_a_folder_without_a_record_is_told_apart_from_a_damaged_one(tmp_path):
    with pytest.raises(ArtifactError, match="holds no record"):
        read(tmp_path)
    path = written(tmp_path)
    assert read(tmp_path).readings[0].loss == math.inf
    assert read(tmp_path / "doctor").setting == SETTING
    path.write_text("")
    with pytest.raises(ArtifactError, match="says nothing of its setting"):
        read(tmp_path)


@pytest.mark.parametrize("end", ['{"type": "reading", "st', '{"type": "reading", "step": 2}', "{\xff"])
def test_a_last_line_that_was_cut_off_is_left_out(tmp_path, end):
    path = written(tmp_path)
    path.write_bytes(path.read_bytes() + end.encode("latin-1"))
    assert [one.step for one in read(tmp_path).readings] == [0, 1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"nonsense", "JSON objects of type setting"),
        (b"\xff\xfe\x00\x81PK\x03\x04", "JSON objects"),
        (b"[" * 100_000, "JSON objects"),
        (b"[1, 2]", "JSON objects"),
        (b"17", "JSON objects"),
        (b'{"type": ["setting"]}', "JSON objects"),
        (b'{"type": "omen", "step": 1}', "JSON objects"),
        (b'{"type": "reading", "step": "soon"}', "reading: step: Input should be a valid integer"),
        (b'{"type": "reading", "step": 1, "colour": 2}', "reading: colour: Extra inputs"),
        (b'{"type": "event", "step": 1}', "event: kind: Field required"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, said):
    path = written(tmp_path)
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + line + b"\n" + b"".join(rest))
    with pytest.raises(ArtifactError) as error:
        read(tmp_path)
    assert "damaged at line 2" in str(error.value)
    assert said in str(error.value)
    path.write_bytes(first + b"".join(rest) + line + b"\n")  # the last line too, if it has its end
    with pytest.raises(ArtifactError, match="damaged at line 4"):
        read(tmp_path)


def test_another_version_is_refused(tmp_path):
    path = written(tmp_path)
    whole = path.read_text()
    path.write_text(json.dumps({"type": "setting", "schema_version": 99}) + "\n" + whole)
    with pytest.raises(ArtifactError, match="version 99"):
        read(tmp_path)
    path.write_text(whole)
    save_file({}, tmp_path / "doctor" / "histograms.safetensors", metadata={"schema": "1", "series": "[]"})
    with pytest.raises(ArtifactError, match="version 1"):
        read(tmp_path)


def damaged(arrays, **changes):
    """Return the arrays of a file of histograms with some of them changed; None takes one away."""
    return {name: array for name, array in {**arrays, **changes}.items() if array is not None}


@pytest.mark.parametrize(
    "change",
    [
        {"0.steps": None},
        {"0.seen": None},
        {"0.buckets": np.array([10_000_000])},
        {"0.buckets": np.array([0, 1, 2])},
        {"0.start": np.zeros(0, np.int64)},
        {"0.start": np.array([257])},
        {"0.columns": np.zeros(3, np.int64)},
        {"0.largest": np.zeros(2)},
        {"0.scales": np.float64(1.0)},
    ],
    ids=lambda change: " ".join(f"{name} {np.shape(array)}" for name, array in change.items()),
)
def test_damaged_histograms_are_refused(tmp_path, change):
    written(tmp_path)
    path = tmp_path / "doctor" / "histograms.safetensors"
    with safe_open(path, "numpy") as file:
        about, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(arrays, path, metadata=about)
    assert read(tmp_path).series[0].seen == 3
    kept = {name: np.asarray(array) for name, array in damaged(arrays, **change).items()}
    save_file(kept, path, metadata=about)
    with pytest.raises(ArtifactError, match=r"histograms\.safetensors is damaged"):
        read(tmp_path)


@pytest.mark.parametrize(
    "about", [None, {"schema": "2"}, {"schema": "2", "series": "[[1"}, {"schema": "2", "series": "[7]"}]
)
def test_histograms_that_do_not_say_whose_they_are_are_refused(tmp_path, about):
    written(tmp_path)
    save_file({}, tmp_path / "doctor" / "histograms.safetensors", metadata=about)
    with pytest.raises(ArtifactError, match=r"histograms\.safetensors (is damaged|has version None)"):
        read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"12345678nonsense", bytes(range(256)), "cut"])
def test_a_file_of_histograms_that_is_none_is_refused(tmp_path, content):
    written(tmp_path)
    path = tmp_path / "doctor" / "histograms.safetensors"
    path.write_bytes(path.read_bytes()[:-9] if content == "cut" else content)
    with pytest.raises(ArtifactError, match="damaged"):
        read(tmp_path)


def test_a_record_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    written(tmp_path)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ArtifactError, match=r"record\.jsonl cannot be read: Permission denied"):
        read(tmp_path)


def test_each_line_is_strict_json(tmp_path):
    append(tmp_path, [SETTING, Reading(step=0, loss=math.nan, grad_norm=math.inf)])
    lines = (tmp_path / "record.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["type"] for line in lines] == ["setting", "reading"]


def test_a_step_that_was_done_again_counts_once(tmp_path):
    append(tmp_path, [SETTING, Reading(step=3, loss=1.0), Reading(step=4, loss=2.0), Reading(step=3, loss=5.0)])
    assert [(one.step, one.loss) for one in read(tmp_path).readings] == [(3, 5.0), (4, 2.0)]


def test_long_runs_keep_few_samples_and_count_all(tmp_path):
    (series,) = series_of([1.0, 0.5], steps=1000)
    assert 32 <= len(series.steps) <= 64
    assert set(np.diff(series.steps)) == {series.steps[1] - series.steps[0]}
    assert series.total.sum() == series.numbers == 2000
    assert not series.sampled
    write_series(tmp_path, [series])
    append(tmp_path, [SETTING])
    assert (read(tmp_path).series[0].columns == series.columns).all()


def test_a_peak_is_kept_when_its_sample_is_dropped():
    histories = Histories()
    for step in range(1000):
        size = 300.0 if step == 777 else 1.0
        histories.add("head", Part.FORWARD, Sample(step, 1.0, histogram([size]), size, 1))
    (series,) = histories.series(["head"])
    assert 777 not in series.steps
    assert series.largest.max() == 300.0
    assert series.steps[series.largest.argmax()] == max(step for step in series.steps if step < 777)


def test_advice_from_a_sample_says_so(tmp_path):
    histories = Histories()
    for part in (Part.FORWARD, Part.BACKWARD):
        histories.add("head", part, Sample(0, 1.0, histogram([2.0**-60] * 1999 + [1.0]), 1.0, 50_000))
    series = histories.series(["head"])
    write_series(tmp_path, series)
    append(tmp_path, [SETTING])
    assert [(one.numbers, one.sampled) for one in read(tmp_path).series] == [(50_000, True)] * 2
    evidence = scale_advice(series).evidence
    assert evidence.startswith("the largest of 50,000 gradients is 1,")
    assert "of a sample of 2,000 the share that becomes zero falls from 99.950%" in evidence
    advice = format_advice(series, ("fp16", "bf16"))
    assert [one.format for one in advice] == ["bf16", "bf16"]
    assert all("99.950% of a sample of 2,000 numbers would be zero" in one.evidence for one in advice)
    assert "sample" not in scale_advice(series_of([1.0, 0.5])).evidence


def test_the_scale_is_the_largest_power_of_two_with_room():
    advice = scale_advice(series_of([2.0**-30] * 90 + [2.0**-10] * 10))
    assert advice.scale == 2.0**22
    assert advice.margin >= 8
    assert 2.0**-10 * advice.scale * 2 * 8 > 65504
    assert (advice.lost, advice.lost_scaled) == (0.9, 0.0)
    assert scale_advice(()) is None
    assert scale_advice(series_of([2.0**-40])).scale == 2.0**24


@pytest.mark.parametrize(
    ("numbers", "format"),
    [
        ([1.0, 0.5, 0.25] * 400, "e4m3fn"),
        ([2.0**-12, 1.0, 2.0**-20] * 400, "e5m2"),
        ([2.0**-36, 1.0] * 400, "fp16"),
        ([2.0**-60, 1.0] * 400, "bf16"),
        ([2.0**-145, 1.0] * 400, "fp32"),
    ],
)
def test_the_narrowest_format_that_holds_is_advised(numbers, format):
    (advice,) = format_advice(series_of(numbers), ("fp16", "bf16", "e4m3fn", "e5m2"))
    assert advice.format == format
    assert "would be zero" in advice.evidence


def cause(**changes):
    values = {"step": 7, "rank": 1, "part": Part.FORWARD, "layer": "head", "operator": "aten.mm", "kind": "inf"}
    return Cause(**{**values, "seen": "aten.mm gave 3 infinities", **changes})


def test_a_sentence_says_what_mends_and_what_does_not():
    good = Remedy(kind="layer", setting="keep layer 'head' in fp32", mended=True, evidence="loss 1")
    bad = Remedy(kind="format", setting="train in bf16-mixed", mended=False, evidence="loss nan")
    text = cause_sentence(cause(remedies=(good, bad)))
    assert text.startswith(
        "Step 7, rank 1: the first infinity came in the forward pass of layer 'head': aten.mm gave 3"
    )
    assert "What mends it, tried: keep layer 'head' in fp32 (loss 1)." in text
    assert text.endswith("Tried, did not mend it: train in bf16-mixed.")
    assert cause_sentence(cause()).endswith("Nothing was tried.")


def test_a_verdict_tells_each_fault_once_and_how_often_it_came():
    events = [
        Event(
            kind=EventKind.NONFINITE, step=step, rank=1, normal=False, sentence=f"Step {step}.", cause=cause(step=step)
        )
        for step in (7, 8, 9)
    ]
    tally = Tally()
    assert tally.verdict(10).healthy
    for event in events:
        tally.add(event)
    found = tally.verdict(10)
    assert not found.healthy
    assert found.sentences == ("Step 7. It came again 2 times.",)


def test_of_a_long_run_the_latest_events_are_kept_and_the_folder_and_the_verdict_know_them_all(tmp_path):
    setting = Setting(level="cheap", every=50, precision="fp16-mixed", compute="fp16", formats=("fp16",), layers=())
    journal = Journal(setting, tmp_path / "doctor", 0)
    for step in range(5000):
        sentence = f"Step {step}"
        journal.note([Event(kind=EventKind.NONFINITE, step=step, rank=0, normal=False, sentence=sentence)])
        journal.note([Event(kind=EventKind.BACKOFF, step=step, rank=0, normal=True, sentence=sentence)])
    assert [event.step for event in journal.events] == [step for step in range(5000 - 2048, 5000) for _ in range(2)]
    said = journal.write().verdict.sentences
    assert said[0] == "Step 0. It came again 4999 times."
    assert said[1].startswith("5000 steps were left out")
    found = read(tmp_path)
    assert len(found.events) == 10_000
    assert found.summary.verdict.sentences == said
    again = Journal(setting, tmp_path / "doctor", 6000)
    assert len(again.events) == 4096
    assert again.summary().verdict.sentences == said


def test_a_series_that_is_taken_up_thins_out_as_if_it_had_not_been_cut(tmp_path):
    def sample(step):
        return Sample(step, 1.0, histogram([1.0]), 1.0 + step % 7, 1)

    straight, before, after = Histories(), Histories(), Histories()
    for step in range(300):
        straight.add("head", Part.FORWARD, sample(step))
    for step in range(101):
        before.add("head", Part.FORWARD, sample(step))
    write_series(tmp_path, before.series(["head"]))
    append(tmp_path, [SETTING])
    after.take_up(read(tmp_path).series[0], 101)
    for step in range(101, 300):
        after.add("head", Part.FORWARD, sample(step))
    (wanted,), (found,) = straight.series(["head"]), after.series(["head"])
    assert found.steps.tolist() == wanted.steps.tolist()
    assert found.largest.tolist() == wanted.largest.tolist()
    assert (found.seen, found.numbers) == (wanted.seen, wanted.numbers) == (300, 300)


def test_a_record_goes_back_to_its_last_mark(tmp_path):
    def wrote(number, steps):
        write_series(tmp_path, series_of([1.0], steps=number))
        append(tmp_path, [Reading(step=step) for step in steps])

    append(tmp_path, [SETTING])
    for end in (4, 8, 12):
        wrote(end, range(end - 4, end))
        mark(tmp_path, end, keep=2)
    skipped = Reading(step=12, skipped=True)
    append(tmp_path, [skipped])
    mark(tmp_path, 12, keep=2)
    wrote(15, range(12, 15))
    assert {path.name for path in tmp_path.glob("histograms-*")} == {
        f"histograms-{step:08d}.safetensors" for step in (8, 12)
    }
    assert rewind(tmp_path, 12)
    assert [one.step for one in read(tmp_path).readings] == list(range(13))
    assert read(tmp_path).readings[-1] == skipped  # left out before the checkpoint was written
    assert read(tmp_path).series[0].numbers == 12
    assert rewind(tmp_path, 10)  # without a checkpoint of its own
    assert [one.step for one in read(tmp_path).readings] == list(range(8))
    assert read(tmp_path).series[0].numbers == 8
    assert not rewind(tmp_path, 0)
    assert not list(tmp_path.iterdir())


def test_bad_settings_are_refused():
    import torch

    from narrowcast.training.doctor.watch import Watch

    with pytest.raises(TrainingError, match="level"):
        Watch(torch.nn.Linear(2, 2), "medium")
    with pytest.raises(TrainingError, match="every 0"):
        Watch(torch.nn.Linear(2, 2), every=0)
    with pytest.raises(FormatError, match="neighbours"):
        Watch(torch.nn.Linear(2, 2), formats=("mxfp4",))
