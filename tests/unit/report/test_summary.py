from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest

from narrowcast.artifacts.manifest import Evidence, Measurement, MetricRecord, ModelRecord, Verdict
from narrowcast.recipes.budget import Limit, Standing
from narrowcast.report import summary_rows
from narrowcast.report.bars import blame_bars, profile_bars, segments
from narrowcast.report.candidates import candidate_rows
from narrowcast.report.plots import pareto
from narrowcast.report.summary import key_numbers, limit_rows

Make = Callable[..., Evidence]


def plain(words: str) -> str:
    return words.replace("\N{NO-BREAK SPACE}", " ")


def rows_of(evidence: Evidence) -> dict[str, tuple[str, ...]]:
    return {
        row.measure: tuple(
            plain(cell) for cell in (row.original.value, row.artifact.value, row.ratio.value, row.samples)
        )
        for row in summary_rows(evidence)
    }


def test_an_artifact_without_any_noise_is_exact(make, met: Evidence):
    same = [m.model_copy(update={"value": math.inf}) if m.measure == "accuracy" else m for m in met.measurements]
    metric = MetricRecord(name="sqnr", unit="dB", higher_is_better=True)
    found = key_numbers(make(metric=metric, measurements=tuple(same)))[2]
    assert (found.value, found.word, found.detail) == ("exact", "sqnr", "exact → exact")


def test_rows_come_in_the_reports_order_with_unknown_measures_last(met: Evidence):
    names = [row.measure for row in summary_rows(met.model_copy(update={"measurements": met.measurements[::-1]}))]
    assert names[:4] == ["accuracy", "accuracy_drop", "size", "latency_p50"]
    assert names[-1] == "load_time"
    assert summary_rows(met)[-1].label == "Load time"


def test_rows_hold_the_numbers(met: Evidence):
    rows = rows_of(met)
    assert rows["accuracy"] == ("94.33%", "94.11%", "", "900")
    assert rows["accuracy_drop"] == ("–", "0.22 points", "tie", "900")
    assert rows["latency_p50"] == ("12.4 ms", "5.38 ms", "2.31×", "30")
    assert rows["throughput"] == ("91.4 samples/s", "242 samples/s", "2.65×", "8")
    assert rows["best_batch"] == ("4", "8", "", "1")
    assert rows["peak_memory"] == ("127 MB", "83.9 MB", "1.52×", "1")


def test_compression_joins_the_size(met: Evidence):
    rows = rows_of(met)
    assert rows["size"] == ("18.6 MB", "4.91 MB", "3.79×", "1")
    assert "compression" not in rows


def test_a_ratio_of_timings_is_never_made_up(met: Evidence):
    kept = tuple(m for m in met.measurements if m.subject != "ratio")
    rows = rows_of(met.model_copy(update={"measurements": kept}))
    assert rows["latency_p50"][2] == ""
    assert rows["size"][2] == "3.79×"


def test_a_ratio_whose_interval_holds_one_is_a_tie(met: Evidence):
    row = next(row for row in summary_rows(met) if row.measure == "load_time")
    assert (row.ratio.value, row.ratio.interval, row.ratio.word) == ("tie", "0.97 to 1.08×", "")


@pytest.mark.parametrize(("value", "word"), [(0.8, "slower"), (0.999, "the same"), (1.0, "the same"), (1.2, "faster")])
def test_a_ratio_says_which_way(make: Make, value: float, word: str):
    only = Measurement(measure="latency_p50", subject="ratio", value=value, unit="x")
    assert summary_rows(make(measurements=(only,)))[0].ratio.word == word


def test_a_percentile_that_the_sample_does_not_support_says_so(met: Evidence):
    assert rows_of(met)["latency_p99"] == ("too few runs", "too few runs", "", "–")


def test_percentiles_are_not_missed_where_latency_was_not_measured(make: Make):
    size = Measurement(measure="size", subject="artifact", value=10.0, unit="bytes")
    assert list(rows_of(make(measurements=(size,)))) == ["size"]


def test_three_numbers_head_the_report(met: Evidence):
    speed, size, kept = key_numbers(met)
    assert (speed.value, speed.word, plain(speed.detail)) == ("2.31×", "faster", "12.4 ms → 5.38 ms")
    assert (size.value, size.word, plain(size.detail)) == ("3.79×", "smaller", "18.6 MB → 4.91 MB")
    assert (kept.value, kept.word, kept.detail) == ("99.8%", "of accuracy kept", "top1 94.33% → 94.11%")


def test_a_tiny_loss_is_not_rounded_to_none(make: Make):
    values = (("original", 0.94), ("artifact", 0.93999))
    both = tuple(Measurement(measure="accuracy", subject=s, value=v, unit="") for s, v in values)  # type: ignore[arg-type]
    assert key_numbers(make(measurements=both))[2].value == "99.999%"


def test_an_error_is_not_a_share_that_was_kept(make: Make):
    record = MetricRecord(name="mse", unit="", higher_is_better=False)
    values = (("original", 0.0), ("artifact", 0.0125))
    both = tuple(Measurement(measure="accuracy", subject=s, value=v, unit="") for s, v in values)  # type: ignore[arg-type]
    key = key_numbers(make(metric=record, measurements=both))[2]
    assert (key.value, key.word) == ("0.01250", "mse")


def test_random_weights_are_said_beside_the_accuracy(make: Make):
    model = ModelRecord(ref="m", sha256="0", bytes=1, random_weights=True)
    assert key_numbers(make(model=model))[2].word == "of accuracy kept (random weights)"


def test_missing_numbers_are_not_measured(not_met: Evidence, bare: Evidence):
    speed, size, kept = key_numbers(not_met)
    assert (speed.value, speed.word) == ("tie", "no measurable difference")
    assert (size.word, kept.word) == ("not measured", "not measured")
    assert [key.word for key in key_numbers(bare)] == ["not measured"] * 3


def test_limits_say_how_far_they_are(met: Evidence, not_met: Evidence):
    first = limit_rows(met)[0]
    assert (first.met, first.value, first.bound, plain(first.margin)) == (
        True,
        "94.11%",
        "at least 93.86%",
        "0.25 points to spare",
    )
    accuracy, latency, size, memory = limit_rows(not_met)
    assert (accuracy.value, accuracy.margin) == ("not measured", "")
    assert (memory.value, memory.margin) == ("not measured", "")
    assert (plain(latency.value), plain(latency.margin)) == ("12.1 ms", "5.90 ms over")
    assert (plain(size.value), plain(size.bound)) == ("6.0004 MB", "at most 6.0000 MB")


def test_an_accuracy_below_its_bound_is_short(make: Make):
    limit = Limit(measure="accuracy", bound=0.95, at_least=True, text="top1 at least 0.95")
    verdict = Verdict(met=False, headline="No.", standings=(Standing(limit=limit, value=0.94, met=False),))
    assert plain(limit_rows(make(verdict=verdict))[0].margin) == "1.00 points short"


def test_candidates_say_what_they_miss(met: Evidence):
    rows = candidate_rows(met)
    assert [row.number for row in rows] == list(range(1, 10))
    assert [row.name for row in rows if row.chosen] == [met.chosen]
    assert (rows[0].verdict, rows[6].verdict, rows[8].verdict) == ("misses latency, size", "keeps all limits", "failed")
    assert rows[1].speedup.value == "tie"
    assert rows[2].memory == "–"
    assert (rows[8].accuracy.value, rows[8].size, rows[8].kept_float) == ("–", "–", "–")


def test_an_interval_just_above_one_does_not_read_as_a_tie(met: Evidence):
    speed = candidate_rows(met)[0].speedup
    assert (speed.value, speed.interval) == ("1.04×", "1.002 to 1.072×")


def test_the_pareto_front_holds_what_nothing_beats(met: Evidence):
    points = list(enumerate(met.candidates[:8], start=1))
    assert [number for number, _ in pareto(points, True)] == [5, 6, 7, 8, 1]
    assert [number for number, _ in pareto(points, False)] == [5, 4]


def test_blame_is_the_worst_first_on_a_log_scale(met: Evidence):
    bars, ticks = blame_bars(met.blame[::-1], 20)
    assert len(bars) == 20
    assert [bar.group for bar in bars] == [item.group for item in met.blame[:20]]
    assert [bar.kept_float for bar in bars[:4]] == [True, True, True, False]
    assert 0 < bars[-1].width < bars[0].width <= 100
    assert ticks[0].place == 0
    # Two decades apart are as far apart on the axis wherever they lie.
    gaps = {round(b.place - a.place, 6) for a, b in itertools.pairwise(ticks)}
    assert len(gaps) == 1


def test_blame_of_nothing_finite_has_no_axis(met: Evidence):
    broken = [
        item.model_copy(update={"noise": value}) for item, value in zip(met.blame, (float("nan"), 0.0), strict=False)
    ]
    bars, ticks = blame_bars(broken)
    assert [bar.width for bar in bars] == [0.0, 0.0]
    assert [bar.noise for bar in bars] == ["0", "–"]
    assert ticks == []


def test_the_profiles_tail_is_added_up(met: Evidence):
    bars = profile_bars(met.profile, 3)
    assert [bar.op_type for bar in bars] == ["Conv", "Gemm", "Add", "2 other types"]
    assert (bars[-1].count, bars[-1].time_share, plain(bars[-1].bytes)) == (36, "5.5%", "280 B")
    assert len(profile_bars(met.profile, 4)) == 5


def test_segments_cover_the_bar(met: Evidence):
    parts = segments(met.plan.shares())
    assert [part.name for part in parts] == ["INT8", "FP32", "FP16"]
    assert sum(part.width for part in parts) == pytest.approx(100)
    assert len({part.colour for part in segments(dict.fromkeys(("int8", "nf4", "int3", "mx"), 0.1))}) == 4
