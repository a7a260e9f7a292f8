"""A window: the micro-batches between two updates, what they sum up to, and what a step says of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from narrowcast.errors import TrainingError

__all__ = ["Batch", "Decision", "Fate", "Loss", "StepInfo", "Window", "as_batch", "as_loss", "outputs_of", "samples_in"]

#: Inputs (a tensor, a tuple of arguments, or a dict of arguments by name) and targets.
Batch = tuple[Any, Any]


class Loss(NamedTuple):
    """A loss that is a sum, for batches whose samples do not weigh the same.

    Args:
        total: The sum, 0-d.
        weight: What it is a sum over, such as the tokens that count; 0-d if it is a tensor.
    """

    total: Tensor
    weight: Tensor | float


class Fate(NamedTuple):
    """What became of a step.

    Args:
        step: Updates done so far.
        updated: Whether the step moved the weights.
        skipped: Whether it would have, and was left out.
    """

    step: int
    updated: bool = False
    skipped: bool = False

    @classmethod
    def of(cls, steps: int, *, updated: bool) -> Fate:
        """Return the fate of a step that closed a window, after a number of updates."""
        return cls(steps + updated, updated, not updated)


class Decision:
    """What became of a step: known at once, or found out when somebody asks.

    Args:
        fate: What is known.
        ask: Has it settled, where it is not known.
    """

    def __init__(self, fate: Fate | None = None, ask: Callable[[], object] | None = None) -> None:
        self._fate = fate
        self._ask = ask

    def settle(self, fate: Fate) -> None:
        """Note what became of the step."""
        self._fate, self._ask = fate, None

    def read(self) -> Fate:
        """Return what became of the step; waits for the device if that is not known yet."""
        if self._ask is not None:
            self._ask()
        assert self._fate is not None
        return self._fate


@dataclass(frozen=True)
class StepInfo:
    """What a step did.

    Tensors stay on the device: reading ``loss``, ``grad_norm``, ``lr`` or ``tokens_or_samples_per_s`` waits for them. So may
    reading ``step``, ``updated`` or ``skipped`` of a step that closed a window, where the device decides: it then raises what
    the trainer raises when training cannot go on.

    Args:
        decision: What became of the step.
        scale: The loss scale that the step ran with.
        seconds: Since the last window closed; None in the first.
        samples: Of this rank, in the window so far.
        weighed: What its losses weigh, of this rank: the weights of :class:`Loss`, else samples; 0-d if it is a tensor.
        mean_loss: Mean loss of the window so far, 0-d; of all ranks once it has closed.
        norm: Norm of all gradients, unscaled and before clipping, 0-d; None unless the step closed a window.
        rate: Learning rate of the first parameter group in this step.
    """

    decision: Decision = field(repr=False)
    scale: float
    seconds: float | None = field(repr=False)
    samples: int = field(repr=False)
    weighed: Tensor | float = field(repr=False)
    mean_loss: Tensor
    norm: Tensor | None
    rate: Tensor | float

    @property
    def closed(self) -> bool:
        """Whether this step closed a window: it moved the weights or would have. Waits for nothing."""
        return self.norm is not None

    @property
    def step(self) -> int:
        """Updates done so far."""
        return self.decision.read().step

    @property
    def updated(self) -> bool:
        """Whether this step moved the weights."""
        return self.decision.read().updated

    @property
    def skipped(self) -> bool:
        """Whether it would have, and was left out as a gradient or a loss is not finite."""
        return self.decision.read().skipped

    @property
    def loss(self) -> float:
        """Mean loss of the window so far; of all ranks once it has closed."""
        return float(self.mean_loss)

    @property
    def samples_per_s(self) -> float | None:
        """Samples of this rank per second since the last window closed; None in the first. Waits for nothing."""
        return None if self.seconds is None else self.samples / max(self.seconds, 1e-9)

    @property
    def tokens_or_samples_per_s(self) -> float | None:
        """The same of what losses weigh: tokens that count, where the loss says them as its weight, else samples."""
        return None if self.seconds is None else float(self.weighed) / max(self.seconds, 1e-9)

    @property
    def grad_norm(self) -> float | None:
        """Norm of all gradients, unscaled and before clipping; None unless the step closed a window."""
        return None if self.norm is None else float(self.norm)

    @property
    def lr(self) -> float:
        """Learning rate of the first parameter group in this step."""
        return float(self.rate)


@dataclass
class Window:
    """The micro-batches since the last update.

    Sums are in units of what a micro-batch weighs, see :mod:`narrowcast.training.weighing`.

    Args:
        count: How many they are.
        samples: Their samples on this rank.
        total: Sum of their losses, in units; 0-d, without its graph.
        weight: What it is a sum over, in units.
        weighed: The same as the loss says it: tokens or samples.
        batches: They themselves with their losses, where somebody will want to look at them.
    """

    count: int = 0
    samples: int = 0
    total: Tensor | None = None
    weight: Tensor | float = 0.0
    weighed: Tensor | float = 0.0
    batches: list[tuple[Batch, Tensor]] = field(default_factory=list[tuple[Batch, Tensor]])

    def add(self, total: Tensor, weight: Tensor | float, weighed: Tensor | float, samples: int) -> None:
        """Count a micro-batch."""
        total = total.detach()
        self.total = total if self.total is None else self.total + total
        self.weight = self.weight + weight
        self.weighed = self.weighed + weighed
        self.count += 1
        self.samples += samples

    def first_broken(self) -> Batch | None:
        """Return the first kept micro-batch whose loss is not finite, or the last one if all are; waits for the device."""
        if not self.batches:
            return None
        return next((batch for batch, loss in self.batches if not torch.isfinite(loss)), self.batches[-1][0])


def as_batch(batch: Any) -> Batch:
    """Return a batch as a pair.

    Raises:
        TrainingError: It is none.
    """
    if isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, targets = batch
        return dict(inputs) if isinstance(inputs, Mapping) else inputs, targets
    size = f" of {len(batch)}" if isinstance(batch, tuple | list | Mapping) else ""
    raise TrainingError(
        f"a batch is a {type(batch).__name__}{size}",
        allowed="a pair (inputs, targets); inputs are a tensor, a tuple of arguments, or a dict of arguments by name",
        next_step="wrap the loader so that it gives such pairs",
    )


def outputs_of(model: nn.Module, inputs: Any) -> Any:
    """Return what a model makes of inputs: a tensor, a tuple of arguments, or a dict of arguments by name."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def samples_in(inputs: Any) -> int:
    """Return the length of the first axis of the first tensor; 1 if there is none."""
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    return 1


def as_loss(value: Any, samples: int) -> tuple[Tensor, Tensor | float, bool]:
    """Return what a loss function gave as an FP32 scalar, what it weighs, and whether it is a mean.

    Raises:
        TrainingError: It is no scalar, or depends on no parameter.
    """
    mean = not isinstance(value, Loss)
    total, weight = (value, float(samples)) if mean else value
    if not isinstance(total, Tensor) or total.numel() != 1:
        found = f"shape {list(total.shape)}" if isinstance(total, Tensor) else type(total).__name__
        raise TrainingError(
            f"the loss is no scalar: {found}",
            allowed="a mean over the batch (one number), or Loss(total, weight)",
            next_step="reduce it in the loss function, for example with .mean()",
        )
    if not total.requires_grad:
        raise TrainingError(
            "the loss depends on no trainable parameter",
            next_step="compute it from the model's outputs, without detach(), item() or no_grad()",
        )
    if isinstance(weight, Tensor) and weight.device != total.device:
        weight = float(weight)  # on the host already: a copy to the device would wait for it
    if not isinstance(weight, Tensor) and not weight >= 0:
        raise TrainingError(f"the loss has a weight of {weight}", allowed="a number of 0 or more")
    return total.reshape(()).float(), weight, mean
