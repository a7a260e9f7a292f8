"""Accuracy of a deployed session on a part of the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrowcast.data.dataset import Dataset
from narrowcast.data.metrics import Metric, Score, score_of
from narrowcast.errors import DataError
from narrowcast.runtimes import Session

__all__ = ["Judge", "check_classes"]

Array = NDArray[Any]

BATCH = 8


class Judge:
    """Scores sessions on one part of the data; what the original says is computed once and kept.

    Only the first output of the model is judged.
    """

    def __init__(self, data: Dataset, metric: Metric, original: Session, seed: int = 0) -> None:
        """Run the original over the data.

        Args:
            data: The part of the data to judge on.
            metric: The metric.
            original: A session on the original model, batch axis dynamic.
            seed: Seed of the bootstrap.

        Raises:
            DataError: The metric needs labels that the data lack, or a label is beyond the model's classes.
        """
        self.data, self.metric, self.seed = data, metric, seed
        if metric.needs == "labels" and data.labels is None:
            raise DataError(
                f"metric {metric.name} needs labels, and {data.source} has none",
                allowed="agreement, cosine, sqnr, mse or mae for data without labels",
                next_step="name another metric, or give labels",
            )
        self._outputs: list[Array] = []
        for _, feeds in data.batches(BATCH):
            first = next(iter(original.run(feeds).values()))
            check_classes(data, metric, first.shape)
            self._outputs.append(first)
        own = self._score(lambda number, feeds: self._outputs[number])
        # A model agrees with itself by definition: there is nothing to be unsure of.
        self.original = own if metric.perfect is None else replace(own, low=own.value, high=own.value)

    def score(self, session: Session, progress: Callable[[float], None] | None = None) -> Score:
        """Return the score of a session."""

        def run(number: int, feeds: dict[str, Array]) -> Array:
            if progress is not None:
                progress((number + 1) / len(self._outputs))
            return next(iter(session.run(feeds).values()))

        return self._score(run)

    def drop(self, score: Score) -> Score:
        """Return how much worse a score is than the original's, in the metric's unit; the interval is over pairs."""
        sign = 1.0 if self.metric.higher_is_better else -1.0
        metric, joined = self.metric, np.hstack([self.original.terms, score.terms])
        width = score.terms.shape[1]

        class Difference(Metric):
            def terms(self, outputs: Array, reference: Array) -> Array:
                raise AssertionError("terms are given")

            def finish(self, terms: Array) -> float:
                return sign * (metric.finish(terms[:, :width]) - metric.finish(terms[:, width:]))

        return score_of(Difference(), joined, self.data.groups, self.seed)

    def _score(self, run: Callable[[int, dict[str, Array]], Array]) -> Score:
        terms: list[Array] = []
        for number, (indices, feeds) in enumerate(self.data.batches(BATCH)):
            outputs = run(number, feeds)
            by_labels = self.metric.needs == "labels" and self.data.labels is not None
            reference = self.data.labels[indices] if by_labels else self._outputs[number]  # type: ignore[index]
            terms.append(self.metric.terms(outputs, reference))
        return score_of(self.metric, np.concatenate(terms), self.data.groups, self.seed)


def check_classes(data: Dataset, metric: Metric, shape: tuple[int | str | None, ...]) -> None:
    """Check that a model has a class for every label that a metric reads.

    Args:
        data: The data.
        metric: The metric; one that reads no labels passes.
        shape: Shape of the model's first output, ``[batch, classes]``; one of other rank, or whose classes are not known
            before it runs, passes.

    Raises:
        DataError: A label is beyond the classes.
    """
    if metric.needs != "labels" or data.labels is None or len(shape) != 2 or not isinstance(shape[1], int):
        return
    first = int(np.argmax(data.labels >= shape[1]))
    if data.labels[first] >= shape[1]:
        raise DataError(
            f"{data.source}: label {int(data.labels[first])} (sample {first}) has no class: the model's output has "
            f"{shape[1]} classes",
            allowed=f"labels from 0 to {shape[1] - 1}",
            next_step="check that the data belong to this model, and that labels count from 0",
        )
