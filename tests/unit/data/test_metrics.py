from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score, mean_absolute_error, mean_squared_error, top_k_accuracy_score

from narrowcast.data.metrics import METRICS, Metric, default_metric, get_metric, score_of
from narrowcast.errors import MetricError

RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(200, 12)).astype(np.float32)
LABELS = RNG.integers(0, 12, 200)
OTHER = (SCORES + 0.3 * RNG.normal(size=SCORES.shape)).astype(np.float32)


def value(name: str, outputs: np.ndarray, reference: np.ndarray) -> float:
    """The metric over batches of uneven size: what is kept of each sample must be enough."""
    metric = get_metric(name)
    parts = [
        metric.terms(outputs[i], reference[i]) for i in np.array_split(np.arange(len(outputs)), min(7, len(outputs)))
    ]
    return metric.finish(np.concatenate(parts))


def test_top1_and_top5_agree_with_scikit_learn() -> None:
    for k in (1, 5):
        expected = top_k_accuracy_score(LABELS, SCORES, k=k, labels=np.arange(12))
        assert value(f"top{k}", SCORES, LABELS) == pytest.approx(expected)


def test_top5_of_fewer_classes_is_always_right() -> None:
    assert value("top5", SCORES[:, :4], LABELS % 4) == 1.0


def test_macro_f1_agrees_with_scikit_learn() -> None:
    expected = f1_score(LABELS, SCORES.argmax(1), average="macro")
    assert value("macro-f1", SCORES, LABELS) == pytest.approx(expected)


def test_macro_f1_counts_a_class_that_is_only_predicted() -> None:
    scores, labels = np.eye(4)[[0, 0, 3, 1]], np.array([0, 0, 1, 1])
    assert value("macro-f1", scores, labels) == pytest.approx(
        f1_score(labels, scores.argmax(1), average="macro", zero_division=0)
    )


def test_errors_agree_with_scikit_learn() -> None:
    assert value("mse", OTHER, SCORES) == pytest.approx(mean_squared_error(SCORES, OTHER))
    assert value("mae", OTHER, SCORES) == pytest.approx(mean_absolute_error(SCORES, OTHER))


def test_cosine_is_the_mean_over_samples() -> None:
    expected = [
        float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
        for a, b in zip(OTHER.astype(np.float64), SCORES.astype(np.float64), strict=True)
    ]
    assert value("cosine", OTHER, SCORES) == pytest.approx(np.mean(expected))
    assert value("cosine", np.array([[1.0, 0.0]]), np.array([[1.0, 1.0]])) == pytest.approx(math.sqrt(0.5))
    assert value("cosine", 3 * SCORES, SCORES) == pytest.approx(1.0)
    assert value("cosine", -SCORES, SCORES) == pytest.approx(-1.0)


def test_cosine_of_a_zero_output_is_finite() -> None:
    assert value("cosine", np.zeros_like(SCORES), SCORES) == 0.0


def test_agreement_is_the_share_of_equal_winners() -> None:
    theirs = np.eye(3)[[0, 1, 2, 2]]
    assert value("agreement", np.eye(3)[[0, 1, 0, 2]], theirs) == 0.75


def test_sqnr_pools_signal_and_noise_over_all_samples() -> None:
    signal, noise = (SCORES.astype(np.float64) ** 2).sum(), ((OTHER.astype(np.float64) - SCORES) ** 2).sum()
    assert value("sqnr", OTHER, SCORES) == pytest.approx(10 * math.log10(signal / noise))
    exact = np.full((2, 4), 10.0)
    assert value("sqnr", exact + 1.0, exact) == pytest.approx(20.0)
    assert value("sqnr", SCORES, SCORES) == math.inf


@pytest.mark.parametrize("name", [name for name in METRICS if METRICS[name]().needs == "original"])
def test_the_original_is_perfect_by_every_metric_that_compares_with_it(name: str) -> None:
    assert value(name, SCORES, SCORES) == pytest.approx(get_metric(name).perfect)


def test_every_metric_knows_its_direction() -> None:
    directions = {name: METRICS[name]().higher_is_better for name in METRICS}
    assert {name for name, up in directions.items() if not up} == {"mse", "mae"}
    for name, up in directions.items():
        reference = LABELS if METRICS[name]().needs == "labels" else SCORES
        close, far = SCORES + 0.01 * RNG.normal(size=SCORES.shape), RNG.normal(size=SCORES.shape)
        if METRICS[name]().needs == "labels":
            close = np.eye(12)[LABELS] + 0.01 * RNG.normal(size=SCORES.shape)
        better, worse = value(name, close, reference), value(name, far, reference)
        assert (better > worse) is up, name


@pytest.mark.parametrize("name", ["top1", "top5", "macro-f1", "agreement"])
def test_class_metrics_refuse_outputs_that_are_no_class_scores(name: str) -> None:
    with pytest.raises(MetricError, match=rf"{name}.*\[4, 2, 3\]"):
        get_metric(name).terms(np.zeros((4, 2, 3)), np.zeros(4, np.int64))


def test_an_unknown_metric_suggests_the_nearest() -> None:
    with pytest.raises(MetricError, match="'top-1' is unknown") as caught:
        get_metric("top-1")
    assert "did you mean top1?" in caught.value.allowed


def test_the_default_metric_follows_labels_and_outputs() -> None:
    assert default_metric(True, 2) == "top1"
    assert default_metric(False, 2) == "agreement"
    assert default_metric(False, 3) == "cosine"


@pytest.fixture
def user_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_metrics.py").write_text(
        "import numpy as np\n"
        "def worst(outputs, reference): return np.abs(outputs - reference).max(1)\n"
        "worst.higher_is_better = False\n"
        "worst.needs = 'original'\n"
        "def too_few(outputs, reference): return [1.0]\n"
        "def nan(outputs, reference): return np.full(len(outputs), np.nan)\n"
        "def broken(outputs, reference): return outputs - reference[:, 99]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "user_metrics", raising=False)


@pytest.mark.usefixtures("user_metrics")
def test_a_metric_of_the_user_has_the_direction_that_it_says() -> None:
    metric = get_metric("py:user_metrics:worst")
    assert (metric.higher_is_better, metric.needs) == (False, "original")
    assert value("py:user_metrics:worst", OTHER, SCORES) == pytest.approx(np.abs(OTHER - SCORES).max(1).mean(), 1e-6)


@pytest.mark.usefixtures("user_metrics")
@pytest.mark.parametrize("name", ["too_few", "nan"])
def test_a_metric_of_the_user_must_give_one_finite_number_per_sample(name: str) -> None:
    with pytest.raises(MetricError, match=f"user_metrics:{name}"):
        value(f"py:user_metrics:{name}", OTHER, SCORES)


@pytest.mark.usefixtures("user_metrics")
def test_what_goes_wrong_in_a_metric_of_the_user_is_a_metric_error() -> None:
    with pytest.raises(MetricError, match="metric py:user_metrics:broken failed with IndexError"):
        value("py:user_metrics:broken", OTHER, SCORES)


@pytest.mark.usefixtures("user_metrics")
def test_a_function_that_does_not_exist_is_a_metric_error() -> None:
    with pytest.raises(MetricError, match="no function 'wurst'"):
        get_metric("py:user_metrics:wurst")


# Intervals ------------------------------------------------------------------------------------------------------------


class Mean(Metric):
    name = "mean"

    def terms(self, outputs: np.ndarray, reference: np.ndarray) -> np.ndarray:
        raise AssertionError


def test_an_interval_holds_its_value_and_is_the_same_for_the_same_seed() -> None:
    terms = RNG.normal(size=(80, 1))
    first, again, other = (score_of(Mean(), terms, None, seed) for seed in (1, 1, 2))
    assert first.low < first.value < first.high
    assert (first.low, first.high) == (again.low, again.high)
    assert (first.low, first.high) != (other.low, other.high)
    assert first.samples == 80


def test_an_interval_over_groups_is_wider_where_samples_of_a_group_are_alike() -> None:
    rng = np.random.default_rng(5)
    groups = np.repeat(np.arange(20), 24)
    terms = (rng.normal(size=20)[groups] + 0.1 * rng.normal(size=480))[:, None]
    alone, grouped = score_of(Mean(), terms, None), score_of(Mean(), terms, groups)
    assert grouped.value == alone.value
    assert grouped.high - grouped.low > 3 * (alone.high - alone.low)


def test_an_interval_over_groups_of_one_is_that_over_samples() -> None:
    terms = RNG.normal(size=(50, 1))
    alone, grouped = score_of(Mean(), terms, None), score_of(Mean(), terms, np.arange(50))
    assert (alone.low, alone.high) == (grouped.low, grouped.high)


def test_the_order_of_groups_does_not_matter_to_the_value() -> None:
    groups = np.repeat(np.arange(10), 5)
    terms = RNG.normal(size=(50, 1))
    order = RNG.permutation(50)
    one, other = score_of(Mean(), terms, groups), score_of(Mean(), terms[order], groups[order])
    assert one.value == pytest.approx(other.value)
    assert (one.low, one.high) == pytest.approx((other.low, other.high))


def test_intervals_over_groups_cover_the_truth_about_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrowcast.data.metrics.RESAMPLES", 200)
    rng, trials = np.random.default_rng(11), 120
    groups = np.repeat(np.arange(30), 6)
    covered = covered_by_samples = 0
    for seed in range(trials):
        terms = (2.0 + rng.normal(size=30)[groups] + 0.3 * rng.normal(size=180))[:, None]
        found, naive = score_of(Mean(), terms, groups, seed), score_of(Mean(), terms, None, seed)
        covered += found.low <= 2.0 <= found.high
        covered_by_samples += naive.low <= 2.0 <= naive.high
    assert covered / trials > 0.87
    assert covered_by_samples / trials < 0.75  # what the groups are for


@pytest.mark.parametrize(("share", "inside"), [(1.0, 0.9), (0.0, 0.1)])
def test_a_share_of_all_or_nothing_still_has_an_interval(share: float, inside: float) -> None:
    found = score_of(Mean(), np.full((20, 1), share), None)
    assert found.low <= inside <= found.high
    assert share in (found.low, found.high)
    grouped = score_of(Mean(), np.full((20, 1), share), np.arange(20) // 4)
    assert grouped.high - grouped.low > found.high - found.low
