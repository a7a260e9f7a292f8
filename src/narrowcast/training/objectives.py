"""What is minimised, and what is measured: losses by name, and the score of a network on a part of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional

from narrowcast.data.dataset import Dataset
from narrowcast.data.metrics import METRICS, Metric, get_metric, score_of
from narrowcast.errors import ConfigError, MetricError, TrainingError, choices
from narrowcast.models.loaders import user_function
from narrowcast.training.classes import Classes, cross_entropy_sum
from narrowcast.training.config import LossSettings
from narrowcast.training.distillation import logits_of
from narrowcast.training.feeding import Batch
from narrowcast.training.policies import Precision
from narrowcast.training.window import Loss

__all__ = ["LossFunction", "Measure", "Result", "classes_of", "loss_of", "measure_of"]

LossFunction = Callable[[Any, Any], Tensor | Loss]


class Result(BaseModel):
    """A score of a network on a part of the data.

    Attributes:
        metric: Its name.
        value: The number.
        low: Lower end of its 95 % confidence interval; None for ``loss``.
        high: Upper end.
        samples: Samples that it was measured on.
        higher_is_better: The metric's direction.
    """

    model_config = ConfigDict(frozen=True)

    metric: str
    value: float
    low: float | None
    high: float | None
    samples: int
    higher_is_better: bool


def loss_of(settings: LossSettings) -> LossFunction:
    """Return the loss that a name says: a mean, or a :class:`~narrowcast.training.Loss` where weights differ.

    Raises:
        ConfigError: No loss has that name, or a function cannot be found.
    """
    if settings.name.startswith("py:"):
        return user_function(settings.name[3:], "loss", ConfigError)
    if settings.name not in _LOSSES:
        raise ConfigError(
            f"loss {settings.name!r} is unknown", allowed=choices(settings.name, _LOSSES) + ", or py:MODULE:FUNCTION"
        )
    chosen = _LOSSES[settings.name]
    return lambda outputs, targets: chosen(logits_of(outputs, "the network"), targets, settings)


def classes_of(settings: LossSettings, outputs: Any) -> Classes | None:
    """Return the class indices that a network's outputs have a place for; None where a loss compares other things.

    Args:
        settings: The loss.
        outputs: What the network gives for a few samples.
    """
    axis = _CLASSES.get(settings.name)
    if axis is None:
        return None
    logits = logits_of(outputs, "the network")
    return Classes(logits.shape[axis], settings.ignore) if logits.dim() > axis else None  # the loss says what is wrong


def _next_token(logits: Tensor, tokens: Tensor, settings: LossSettings) -> Loss:
    """Return the sum over tokens of what each position (``[N, T, V]``) says of the next token (``[N, T]``)."""
    if logits.dim() != 3 or logits.shape[:2] != tokens.shape:
        raise TrainingError(
            f"next-token with outputs {list(logits.shape)} and targets {list(tokens.shape)}",
            allowed="outputs [N, T, V] and token indices [N, T]",
            next_step="check data.targets and the network's outputs, or give a loss of your own",
        )
    return _cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), settings)


def _cross_entropy(logits: Tensor, targets: Tensor, settings: LossSettings) -> Loss:
    """Return the sum over targets that count, of samples (logits ``[N, C]``) or dense (``[N, C, ...]``)."""
    return Loss(*cross_entropy_sum(logits, targets, ignore=settings.ignore, label_smoothing=settings.label_smoothing))


def _squares(outputs: Tensor, targets: Tensor, settings: LossSettings) -> Tensor:
    """Return the mean of squared differences over all numbers."""
    del settings
    if outputs.shape != targets.shape:
        raise TrainingError(
            f"loss mse: the network gives {list(outputs.shape)}, the targets are {list(targets.shape)}",
            allowed="the same shape",
            next_step="check data.targets, or give a loss of your own: py:MODULE:FUNCTION",
        )
    return functional.mse_loss(outputs.float(), targets.float())


#: The axis of the outputs that holds the classes, of losses whose targets are class indices.
_CLASSES = {"cross-entropy": 1, "next-token": 2}

_LOSSES: dict[str, Callable[[Tensor, Tensor, LossSettings], Tensor | Loss]] = {
    "cross-entropy": _cross_entropy,
    "next-token": _next_token,
    "mse": _squares,
}


@dataclass(frozen=True)
class Measure:
    """What a network is judged by.

    Attributes:
        metric: A metric of the data layer; None for the mean loss.
        loss: The loss, without a teacher's part.
    """

    metric: Metric | None
    loss: LossFunction

    @property
    def name(self) -> str:
        """What it is called."""
        return "loss" if self.metric is None else self.metric.name

    @property
    def higher_is_better(self) -> bool:
        """Its direction."""
        return self.metric is not None and self.metric.higher_is_better

    def __call__(
        self,
        module: nn.Module,
        batches: Iterator[Batch],
        part: Dataset,
        policy: Precision,
        device: torch.device,
    ) -> Result:
        """Return the score of a module, which is put into evaluation mode and back.

        Args:
            module: The network.
            batches: All samples of the part, in order.
            part: The part that they are of.
            policy: What it computes in.
            device: Where it is.
        """
        training = module.training
        module.eval()
        terms: list[np.ndarray] = []
        total = weight = 0.0
        try:
            with torch.no_grad(), policy.autocast(device), policy.running(device):
                for batch in batches:
                    inputs = policy.inputs(batch.inputs)
                    outputs = module(*inputs) if isinstance(inputs, tuple) else module(inputs)
                    if self.metric is None:
                        loss = _sum_of(self.loss(outputs, batch.targets), len(batch.targets))
                        total, weight = total + float(loss.total), weight + float(loss.weight)
                    else:
                        given = logits_of(outputs, "the network").float().cpu().numpy()
                        terms.append(self.metric.terms(given, batch.targets.cpu().numpy()))
        finally:
            module.train(training)
        if self.metric is None:
            value = total / weight
            return Result(metric="loss", value=value, low=None, high=None, samples=part.size, higher_is_better=False)
        score = score_of(self.metric, np.concatenate(terms), part.groups)
        return Result(
            metric=self.metric.name,
            value=score.value,
            low=score.low,
            high=score.high,
            samples=score.samples,
            higher_is_better=self.metric.higher_is_better,
        )


def measure_of(name: str | None, targets: str, loss: LossFunction) -> Measure:
    """Return what a network is judged by.

    Args:
        name: A metric of ``narrowcast optimize``, or ``loss``; by default top1 with labels, else the loss.
        targets: What the data are compared with: ``labels`` or the name of an array.
        loss: The loss.

    Raises:
        MetricError: No metric has that name, or it does not fit the targets.
    """
    chosen = name or ("top1" if targets == "labels" else "loss")
    if chosen == "loss":
        return Measure(None, loss)
    if not chosen.startswith("py:") and chosen not in METRICS:
        raise MetricError(
            f"metric {chosen!r} is unknown", allowed=choices(chosen, [*METRICS, "loss"]) + ", or py:MODULE:FUNCTION"
        )
    metric = get_metric(chosen)
    if not chosen.startswith("py:") and (metric.needs == "labels") != (targets == "labels"):
        kind = "labels" if metric.needs == "labels" else "an array of numbers"
        raise MetricError(
            f"metric {chosen} compares with {kind}, and data.targets is {targets!r}",
            allowed="top1, top5 or macro-f1 with labels; mse, mae, cosine or sqnr with an array; loss with both",
            next_step="set metric: loss, or another data.targets",
        )
    return Measure(metric, loss)


def _sum_of(value: Tensor | Loss, samples: int) -> Loss:
    return value if isinstance(value, Loss) else Loss(value * samples, samples)
