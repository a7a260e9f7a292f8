"""Metrics with a direction, computed batch by batch, with confidence intervals that respect where samples come from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrowcast.errors import MetricError, choices
from narrowcast.models.loaders import user_code, user_function

__all__ = ["METRICS", "Metric", "Score", "default_metric", "get_metric", "score_of"]

Array = NDArray[Any]
Floats = NDArray[np.float64]

#: Resamples of the bootstrap.
RESAMPLES = 2000


class Metric(ABC):
    """A metric: what it keeps of each sample, and how that becomes one number.

    Attributes:
        name: What the user calls it.
        unit: Unit of the number, empty for a share.
        higher_is_better: Its direction.
        needs: ``labels`` or ``original`` (the outputs of the original model).
        perfect: Value of the original itself, for metrics that compare with it; None for the others.
    """

    name: str
    unit: str = ""
    higher_is_better: bool = True
    needs: str = "labels"
    perfect: float | None = None

    @abstractmethod
    def terms(self, outputs: Array, reference: Array) -> Floats:
        """Return what is kept of each sample, ``[N, k]``.

        Args:
            outputs: The first output of the model, ``[N, ...]``.
            reference: Labels ``[N]``, or the original's first output, ``[N, ...]``.
        """

    def finish(self, terms: Floats) -> float:
        """Return the metric of samples whose terms are given, ``[N, k]``."""
        return float(terms[:, 0].mean())


def _flat(outputs: Array) -> Floats:
    return outputs.reshape(len(outputs), -1).astype(np.float64)


def _class_scores(outputs: Array, name: str) -> Array:
    if outputs.ndim != 2:
        raise MetricError(
            f"metric {name} needs class scores, and the model's first output has shape {list(outputs.shape)}",
            allowed="outputs [batch, classes]",
            next_step="use cosine, sqnr, mse, mae or py:MODULE:FUNCTION",
        )
    return outputs


class _TopK(Metric):
    def __init__(self, k: int) -> None:
        self.name, self.k = f"top{k}", k

    def terms(self, outputs: Array, reference: Array) -> Floats:
        scores = _class_scores(outputs, self.name)
        k = min(self.k, scores.shape[1])
        best = np.argpartition(-scores, k - 1, axis=1)[:, :k] if k > 1 else scores.argmax(1)[:, None]
        return (best == reference[:, None]).any(1, keepdims=True).astype(np.float64)


class _MacroF1(Metric):
    name = "macro-f1"

    def terms(self, outputs: Array, reference: Array) -> Floats:
        return np.stack([_class_scores(outputs, self.name).argmax(1), reference], axis=1).astype(np.float64)

    def finish(self, terms: Floats) -> float:
        predicted, actual = terms[:, 0].astype(int), terms[:, 1].astype(int)
        size = int(max(predicted.max(), actual.max())) + 1
        hits = np.bincount(actual[predicted == actual], minlength=size)
        sums = np.bincount(predicted, minlength=size) + np.bincount(actual, minlength=size)
        present = sums > 0
        return float((2 * hits[present] / sums[present]).mean())


class _Agreement(Metric):
    name, needs, perfect = "agreement", "original", 1.0

    def terms(self, outputs: Array, reference: Array) -> Floats:
        same = _class_scores(outputs, self.name).argmax(1) == reference.argmax(1)
        return same[:, None].astype(np.float64)


class _Cosine(Metric):
    name, needs, perfect = "cosine", "original", 1.0

    def terms(self, outputs: Array, reference: Array) -> Floats:
        ours, theirs = _flat(outputs), _flat(reference)
        norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        return ((ours * theirs).sum(1) / np.maximum(norms, 1e-30))[:, None]


class _Error(Metric):
    higher_is_better, needs, perfect = False, "original", 0.0

    def __init__(self, name: str, power: int) -> None:
        self.name, self.power = name, power

    def terms(self, outputs: Array, reference: Array) -> Floats:
        return (np.abs(_flat(outputs) - _flat(reference)) ** self.power).mean(1, keepdims=True)


class _Sqnr(Metric):
    name, unit, needs, perfect = "sqnr", "dB", "original", math.inf

    def terms(self, outputs: Array, reference: Array) -> Floats:
        ours, theirs = _flat(outputs), _flat(reference)
        return np.stack([(theirs**2).sum(1), ((ours - theirs) ** 2).sum(1)], axis=1)

    def finish(self, terms: Floats) -> float:
        signal, noise = terms.sum(0)
        return math.inf if noise == 0 else float(10 * np.log10(max(signal, 1e-300) / noise))


class _User(Metric):
    """A function ``f(outputs, reference) -> one number per sample``, mean taken; ``f.higher_is_better`` if it says so."""

    def __init__(self, text: str) -> None:
        self.function: Callable[[Array, Array], Any] = user_function(text, "metric", MetricError)
        self.name = f"py:{text}"
        self.higher_is_better = bool(getattr(self.function, "higher_is_better", True))
        self.needs = str(getattr(self.function, "needs", "labels"))

    def terms(self, outputs: Array, reference: Array) -> Floats:
        with user_code(f"metric {self.name}", MetricError):
            values = np.asarray(self.function(outputs, reference), np.float64).reshape(-1)
        if len(values) != len(outputs) or not np.isfinite(values).all():
            raise MetricError(
                f"metric {self.name} returned {len(values)} values for {len(outputs)} samples, or one is not finite",
                allowed="one finite number per sample",
            )
        return values[:, None]


METRICS: dict[str, Callable[[], Metric]] = {
    "top1": lambda: _TopK(1),
    "top5": lambda: _TopK(5),
    "macro-f1": _MacroF1,
    "mse": lambda: _Error("mse", 2),
    "mae": lambda: _Error("mae", 1),
    "cosine": _Cosine,
    "agreement": _Agreement,
    "sqnr": _Sqnr,
}


def get_metric(name: str) -> Metric:
    """Return a metric by name, or the user's own by ``py:MODULE:FUNCTION``.

    Raises:
        MetricError: No metric has that name.
    """
    if name.startswith("py:"):
        return _User(name[3:])
    if name not in METRICS:
        raise MetricError(f"metric {name!r} is unknown", allowed=choices(name, METRICS) + ", or py:MODULE:FUNCTION")
    return METRICS[name]()


def default_metric(has_labels: bool, output_rank: int) -> str:
    """Return top1 for data with labels, agreement for class scores without labels, and cosine for other outputs."""
    if has_labels:
        return "top1"
    return "agreement" if output_rank == 2 else "cosine"


@dataclass(frozen=True)
class Score:
    """A metric's value with its 95 % confidence interval, and the terms that it came from, ``[N, k]``."""

    value: float
    low: float
    high: float
    samples: int
    terms: Floats


def score_of(metric: Metric, terms: Floats, groups: NDArray[np.int64] | None, seed: int = 0) -> Score:
    """Return the score of samples.

    The interval is a percentile bootstrap over groups (over samples where there are none): crops of one picture are not
    independent, and counting them as if they were would make the interval too narrow. Where every resample agrees (a share
    of exactly 0 or 1), the exact binomial bound for the number of groups takes its place.

    Args:
        metric: The metric.
        terms: Terms of each sample, ``[N, k]``.
        groups: Group of each sample, ``[N]``, or None.
        seed: Seed of the resampling.
    """
    value = metric.finish(terms)
    names, members = np.unique(np.arange(len(terms)) if groups is None else groups, return_inverse=True)
    members = members.reshape(-1)
    by_group = [np.flatnonzero(members == number) for number in range(len(names))] if groups is not None else None
    rng = np.random.default_rng(seed)
    found = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        drawn = rng.integers(0, len(names), len(names))
        rows = drawn if by_group is None else np.concatenate([by_group[group] for group in drawn])
        found[number] = metric.finish(terms[rows])
    low, high = (float(edge) for edge in np.quantile(found, [0.025, 0.975], method="nearest"))
    if low == high and value in (0.0, 1.0) and terms.shape[1] == 1 and set(np.unique(terms)) <= {0.0, 1.0}:
        bound = 1 - 0.025 ** (1 / len(names))
        low, high = (0.0, bound) if value == 0.0 else (1 - bound, 1.0)
    return Score(value, low, high, len(terms), terms)
