from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from narrowcast.data.dataset import Dataset
from narrowcast.data.metrics import get_metric
from narrowcast.errors import DataError
from narrowcast.measure.accuracy import Judge
from narrowcast.runtimes import Session

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(50, 6)).astype(np.float32)
LABELS = INPUTS.argmax(1).astype(np.int64)
Make = Callable[..., Dataset]


class Shaky(Session):
    """Gives its inputs back as class scores, with an error of a given size."""

    def __init__(self, error: float = 0.0) -> None:
        self.error, self.seen = error, 0

    def run(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.seen += len(batch["x"])
        noise = np.random.default_rng(self.seen).normal(size=batch["x"].shape)
        return {"scores": (batch["x"] + self.error * noise).astype(np.float32), "other": batch["x"] * np.nan}


def test_the_original_and_a_session_are_scored_on_the_same_samples(dataset_of: Make) -> None:
    original = Shaky()
    judge = Judge(dataset_of(x=INPUTS, labels=LABELS), get_metric("top1"), original)
    assert judge.original.value == 1.0
    shares: list[float] = []
    score = judge.score(Shaky(1.0), shares.append)
    assert 0 < score.value < 1
    assert score.samples == 50
    assert shares[-1] == pytest.approx(1.0)
    assert original.seen == 50  # once, and kept


@pytest.mark.parametrize("name", ["agreement", "cosine", "mse", "mae", "sqnr"])
def test_metrics_that_compare_need_no_labels(name: str, dataset_of: Make) -> None:
    judge = Judge(dataset_of(x=INPUTS), get_metric(name), Shaky())
    assert judge.original.value == get_metric(name).perfect
    little, much = judge.score(Shaky(0.05)), judge.score(Shaky(2.0))
    assert (little.value > much.value) is judge.metric.higher_is_better


def test_a_metric_on_labels_refuses_data_without(dataset_of: Make) -> None:
    with pytest.raises(DataError, match="metric top1 needs labels, and test has none") as caught:
        Judge(dataset_of(x=INPUTS), get_metric("top1"), Shaky())
    assert "agreement" in caught.value.allowed


def test_a_label_beyond_the_classes_is_named_with_its_sample(dataset_of: Make) -> None:
    labels = LABELS.copy()
    labels[33] = 6
    with pytest.raises(DataError, match=r"label 6 \(sample 33.*has 6 classes") as caught:
        Judge(dataset_of(x=INPUTS, labels=labels), get_metric("top1"), Shaky())
    assert "0 to 5" in caught.value.allowed


@pytest.mark.parametrize(("name", "sign"), [("top1", 1), ("mse", -1)])
def test_a_drop_is_positive_where_a_session_is_worse(name: str, sign: int, dataset_of: Make) -> None:
    judge = Judge(dataset_of(x=INPUTS, labels=LABELS), get_metric(name), Shaky())
    score = judge.score(Shaky(1.0))
    drop = judge.drop(score)
    assert drop.value == pytest.approx(sign * (judge.original.value - score.value))
    assert drop.value > 0
    assert drop.low <= drop.value <= drop.high
    assert judge.drop(judge.original).value == 0


def test_the_interval_of_a_drop_is_over_pairs(dataset_of: Make) -> None:
    """Two sessions that fail on the same samples differ by nothing, however uncertain each one's accuracy is."""
    labels = LABELS.copy()
    labels[::2] = (labels[::2] + 1) % 6
    judge = Judge(dataset_of(x=INPUTS, labels=labels), get_metric("top1"), Shaky())
    assert judge.original.value == 0.5
    assert judge.original.high - judge.original.low > 0.15
    drop = judge.drop(judge.score(Shaky()))
    assert (drop.value, drop.low, drop.high) == (0.0, 0.0, 0.0)
