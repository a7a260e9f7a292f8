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
        model: As it is called. Its weights are those of the step; what else it keeps, such as buffers, is as the latest forward
            pass left it, which may be that of the next micro-batch.
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

    All ranks call it at the same places. An update is told in its own step, unless the device decides whether it is made (see
    :class:`~narrowcast.training.Trainer`). Then it is told in the next step, when that one's forward and backward pass are
    queued; or by ``flush``, ``discard``, ``finish`` or ``state_dict``, or when another watch takes the place. The order is::

        before_forward    of the next micro-batch, which counts the update as made
        after_update      if it was, or else on_nonfinite, which says that it was not
        after_backward    of the next micro-batch

    The weights are as the update left them. Its gradients are gone, and those of the next micro-batch may be there: whoever
    runs a step again sets them aside.
    """

    def before_forward(self, trainer_step: int, batch: Batch) -> None:
        """Called before each micro-batch, with the updates done so far; the last one counts if it is not known yet."""
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
