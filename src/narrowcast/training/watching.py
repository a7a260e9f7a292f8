"""What a trainer tells of a run to whoever watches its numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from narrowcast.training.policies import Precision
from narrowcast.training.window import Batch, Loss, StepInfo

__all__ = ["BrokenStep", "Watch"]


class BrokenStep(NamedTuple):
    """A step whose loss or gradients were not finite.

    Args:
        model: As it is called; its weights are those of the step.
        loss: From outputs and targets to a mean, or to a :class:`~narrowcast.training.Loss`.
        batch: The first micro-batch that shows it.
        precision: The policy.
        scale: The loss scale of the step.
        factor: What the batch's mean loss was multiplied with.
        step: Updates done before it.
    """

    model: nn.Module
    loss: Callable[[Any, Any], Tensor | Loss]
    batch: Batch
    precision: Precision
    scale: float
    factor: float
    step: int


class Watch(Protocol):
    """What looks at the numbers of a run.

    All ranks call it at the same places. Where the device decides whether an update is made, what became of it is told when the
    next forward and backward pass are queued (or by ``flush``, ``discard``, ``finish`` or ``state_dict``), before what
    :meth:`after_backward` says of these; the weights are as the update left them, and its gradients are gone.
    """

    def before_forward(self, trainer_step: int, batch: Batch) -> None:
        """Called before each micro-batch, with the updates done so far, and the last one if it is not known yet."""
        ...

    def after_backward(self, model: nn.Module, scale: float) -> None:
        """Called after each backward pass: gradients are those of the window so far, times ``scale``."""
        ...

    def before_update(self, model: nn.Module) -> None:
        """Called before the weights move, or before the device decides whether they do.

        Gradients are unscaled and clipped unless the optimizer does that itself.
        """
        ...

    def after_update(self, model: nn.Module, info: StepInfo) -> None:
        """Called when the weights have moved, with their gradients unless the device decided."""
        ...

    def on_nonfinite(self, broken: BrokenStep) -> None:
        """Called when a loss or a gradient of an update was not finite; the weights have not moved if it was left out."""
        ...
