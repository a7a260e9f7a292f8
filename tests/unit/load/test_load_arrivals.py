from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from narrowcast.errors import DataError, UserError
from narrowcast.load.arrivals import Constant, Gamma, Poisson, Ramp, read_arrivals
from narrowcast.load.stress import Phases
from narrowcast.measure.load.records import as_csv, as_jsonl, as_npz, empty_records

SECONDS = 200.0


@pytest.mark.parametrize(
    "arrivals", [Constant(50.0), Poisson(50.0), Gamma(50.0, 3.0)], ids=["constant", "poisson", "gamma"]
)
def test_times_are_in_order_within_the_run_and_as_many_as_the_rate_says(arrivals: Constant | Poisson | Gamma) -> None:
    times = arrivals.times(SECONDS, np.random.default_rng(1))
    assert (np.diff(times) >= 0).all()
    assert times[0] >= 0
    assert times[-1] < SECONDS
    cv = arrivals.cv if isinstance(arrivals, Gamma) else 1.0
    assert abs(len(times) - 50 * SECONDS) <= 4 * cv * np.sqrt(50 * SECONDS)


def test_the_same_seed_gives_the_same_times() -> None:
    first, second, other = (Poisson(50.0).times(5.0, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert (first == second).all()
    assert len(first) != len(other) or (first != other).any()


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.diff(Poisson(50.0).times(SECONDS, np.random.default_rng(2)))
    assert stats.kstest(gaps, "expon", args=(0, 1 / 50)).pvalue > 0.01


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_gamma_gaps_have_the_coefficient_of_variation_that_is_asked_for(cv: float) -> None:
    gaps = np.diff(Gamma(100.0, cv).times(2 * SECONDS, np.random.default_rng(5)))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.08)


@pytest.mark.parametrize(("start", "stop"), [(10.0, 90.0), (90.0, 10.0), (0.0, 100.0), (100.0, 0.0)])
def test_a_ramp_has_its_rate_at_each_time(start: float, stop: float) -> None:
    times = Ramp(start, stop).times(SECONDS, np.random.default_rng(6))
    counts = np.histogram(times, 4, (0, SECONDS))[0]
    middles = start + (stop - start) * np.array([1, 3, 5, 7]) / 8
    expected = middles * SECONDS / 4
    assert (np.abs(counts - expected) <= 4 * np.sqrt(expected)).all()
    assert times.max() < SECONDS


def test_phases_follow_each_other() -> None:
    times = Phases(((10.0, 20.0), (100.0, 10.0), (10.0, 20.0))).times(50.0, np.random.default_rng(7))
    inside = (times >= 20) & (times < 30)
    assert abs(inside.sum() - 1000) < 130
    assert abs((~inside).sum() - 400) < 80


def test_times_are_replayed_from_text_and_from_records(tmp_path: Path) -> None:
    (tmp_path / "times.txt").write_text("# when\n7.5\n5.0\n6.0\n")
    records = empty_records(3)
    records["intended"] = [5.0, 6.0, 7.5]
    (tmp_path / "run.csv").write_text(as_csv(records))
    (tmp_path / "run.npz").write_bytes(as_npz(records))
    (tmp_path / "run.jsonl").write_text(as_jsonl(records))
    for name in ("times.txt", "run.csv", "run.npz", "run.jsonl"):
        arrivals = read_arrivals(f"replay:{tmp_path / name}", None)
        assert arrivals.times(10.0, np.random.default_rng(0)).tolist() == [0.0, 1.0, 2.5]
        assert arrivals.times(2.0, np.random.default_rng(0)).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "rate", "said"),
    [
        ("poison", 5.0, "did you mean poisson"),
        ("poisson:2", 5.0, "unknown"),
        ("poisson", None, "needs a rate"),
        ("gamma", 5.0, "cannot be read"),
        ("gamma:-1", 5.0, "cannot be read"),
        ("ramp:1", None, "cannot be read"),
        ("ramp:0:0", None, "never come"),
        ("ramp:1:2", 5.0, "contradict"),
        ("replay:x", 5.0, "contradict"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, rate: float | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_arrivals(text, rate)


def test_damaged_records_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.npz").write_bytes(as_npz(empty_records(50))[:-100])
    (tmp_path / "run.jsonl").write_text('{"intended": 1.0}\n[2.0]\n')
    for name in ("run.npz", "run.jsonl"):
        with pytest.raises(DataError, match="cannot be read"):
            read_arrivals(f"replay:{tmp_path / name}", None)


@pytest.mark.parametrize("content", ["", "one\n", "nan\n"])
def test_a_file_without_times_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "times.txt").write_text(content)
    with pytest.raises(DataError):
        read_arrivals(f"replay:{tmp_path / 'times.txt'}", None)
    with pytest.raises(DataError, match="cannot be read"):
        read_arrivals(f"replay:{tmp_path / 'absent.txt'}", None)
