"""The training step, for loops of one's own: forward, backward, one decision, one update.

A step takes one micro-batch; each ``accumulate``-th closes a window and updates the weights. Gradients are sums over a
window, divided by what they are a sum over (samples, or what a :class:`Loss` says), whatever its micro-batches weigh.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils._pytree import tree_leaves

from narrowcast.errors import TrainingError
from narrowcast.training.gradients import FusedUpdate, Gradients, Ranks
from narrowcast.training.ledger import Ledger, Skip
from narrowcast.training.policies import Precision
from narrowcast.training.policies import precision as policy_of

__all__ = ["Loss", "StepInfo", "Trainer", "Watch"]

_log = logging.getLogger(__name__)
Batch = tuple[Any, Any]


class Loss(NamedTuple):
    """A loss that is a sum.

    Args:
        total: The sum, 0-d.
        weight: What it is a sum over: samples, tokens that count, or any other weight.
    """

    total: Tensor
    weight: Tensor | float


class Watch(Protocol):
    """What looks at the numbers of a run."""

    def before_forward(self, trainer_step: int, batch: Batch) -> None:
        """Called before each micro-batch."""
        ...

    def after_backward(self, model: nn.Module, scale: float) -> None:
        """Called after each backward pass; gradients are scaled by ``scale``."""
        ...

    def before_update(self, model: nn.Module) -> None:
        """Called when gradients are unscaled and clipped."""
        ...

    def after_update(self, model: nn.Module, info: StepInfo) -> None:
        """Called when the weights have moved."""
        ...

    def on_nonfinite(self, trainer: Trainer, batch: Batch, step: int) -> None:
        """Called when a gradient or a loss of a step is not finite, before gradients are dropped."""
        ...


@dataclass(frozen=True)
class StepInfo:
    """What a step did. Tensors stay on the device; reading ``loss``, ``grad_norm`` or ``lr`` waits for them.

    Args:
        step: Updates done so far.
        updated: Whether this step moved the weights.
        skipped: Whether it would have, and was left out as a gradient is not finite.
        scale: The loss scale that the step ran with.
        samples_per_s: Samples of this rank per second since the last window closed; None in the first.
        total: Sum of the window's losses so far, 0-d.
        weight: What ``total`` is a sum over.
        norm: Norm of all gradients, unscaled and before clipping, 0-d; None unless the step closed a window.
        rate: Learning rate of the first parameter group in this step.
    """

    step: int
    updated: bool
    skipped: bool
    scale: float
    samples_per_s: float | None
    total: Tensor
    weight: Tensor | float
    norm: Tensor | None
    rate: Tensor | float

    @property
    def loss(self) -> float:
        """Mean loss of the window so far (of this rank, or of all ranks where they have been summed)."""
        return float(self.total / self.weight)

    @property
    def grad_norm(self) -> float | None:
        """Norm of all gradients, unscaled and before clipping; None unless the step closed a window."""
        return None if self.norm is None else float(self.norm)

    @property
    def lr(self) -> float:
        """Learning rate of the first parameter group in this step."""
        return float(self.rate)


@dataclass
class _Window:
    """The micro-batches since the last update."""

    count: int = 0
    samples: int = 0
    total: Tensor | None = None
    weight: Tensor | float = 0.0
    batch: Batch | None = None

    def add(self, loss: Loss, samples: int, batch: Batch) -> None:
        total = loss.total.detach()
        self.total = total if self.total is None else self.total + total
        self.weight = self.weight + loss.weight
        self.count += 1
        self.samples += samples
        self.batch = batch


class Trainer:
    """Trains a module, step by step.

    Args:
        model: Any module, compiled or not; it is cast or converted in place where the precision asks for it.
        optimizer: Any optimizer of PyTorch's kind that needs no closure, over the model's parameters (and the loss's, if it
            is a module).
        loss: From outputs and targets to a mean over the batch (0-d), or to a :class:`Loss`.
        precision: A policy or its name.
        schedule: A learning-rate schedule, stepped after each update.
        clip_norm: The largest norm of all gradients together.
        accumulate: Micro-batches in a window.
        watch: What looks at the numbers.
        ranks: The processes that train together.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[Any, Any], Tensor | Loss],
        *,
        precision: str | Precision = "fp32",
        schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
        clip_norm: float | None = None,
        accumulate: int = 1,
        watch: Watch | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.precision = policy_of(precision)
        self._parameters = _trained(model, loss, optimizer)
        self.device = next(iter(self._parameters.values())).device
        self.precision.check(self.device)
        self.model = self.precision.prepare(model)
        self.optimizer = optimizer
        self.loss = loss
        self.schedule = schedule
        self.clip_norm = clip_norm
        self.accumulate = accumulate
        self.watch = watch
        self.ranks = ranks
        self.ledger = Ledger()
        self.steps = 0
        self.skipped = 0
        self._scale = self.precision.scale.start()
        self._window = _Window()
        self._share: Tensor | float | None = None
        self._closed_at: float | None = None

    @property
    def scale(self) -> float:
        """What the losses of the window at hand are multiplied with."""
        return self._scale.value

    def step(self, batch: Batch) -> StepInfo:
        """Run one micro-batch; each ``accumulate``-th updates the weights.

        Args:
            batch: Inputs and targets. Inputs are a tensor, a tuple (arguments) or a dict (arguments by name).

        Raises:
            TrainingError: The batch or the loss cannot be used, or training cannot go on.
        """
        inputs, targets = _parts(batch)
        if self.watch is not None:
            self.watch.before_forward(self.steps, batch)
        samples = _samples(inputs)
        with self.precision.running(self.device):
            with self.precision.autocast(self.device):
                value = self.loss(self._outputs(inputs), targets)
            loss = _as_loss(value, samples)
            self._backward(loss)
        if self.watch is not None:
            self.watch.after_backward(self.model, self.scale)
        self._window.add(loss, samples, batch)
        return self._update() if self._window.count == self.accumulate else self._info()

    def flush(self) -> StepInfo | None:
        """Close a window that holds fewer micro-batches than the others, normalised by what it holds; None if it is empty."""
        return self._update() if self._window.count else None

    def _outputs(self, inputs: Any) -> Any:
        if isinstance(inputs, Mapping):
            return self.model(**inputs)
        return self.model(*inputs) if isinstance(inputs, tuple | list) else self.model(inputs)

    def _backward(self, loss: Loss) -> None:
        """Add the gradients of a loss, over what a window is expected to weigh, times the scale."""
        if self._share is None:
            self._share = loss.weight * self.accumulate
        total = loss.total.float()
        if isinstance(self._share, Tensor):
            (total * (self.scale / self._share)).backward()
        elif (factor := self.scale / self._share) == 1.0:
            total.backward()
        else:
            (total * factor).backward()

    def _update(self) -> StepInfo:
        """Decide, clip, and move the weights; or leave the step out."""
        window, share = self._window, self._share
        assert share is not None
        gradients = Gradients(self._parameters, self.device)
        factor = share / window.weight / self.scale
        norm = gradients.norm(self.ranks)
        true_norm = norm * factor
        if self.precision.scale.guards:
            finite = torch.isfinite(norm)
            if self.ranks is not None:
                finite = self.ranks.all_finite(finite)
            if not finite:  # the one place that waits for the device
                return self._skip(gradients, true_norm)
        if self.clip_norm is not None:
            factor = factor * (self.clip_norm / (true_norm + 1e-6)).clamp(max=1.0)
        gradients.multiply(factor)
        if self.watch is not None:
            self.watch.before_update(self.model)
        self.optimizer.step()
        self.steps += 1
        info = self._info(updated=True, norm=true_norm)
        if self.schedule is not None:
            self.schedule.step()
        self._scale = self.precision.scale.after(self._scale, True)
        if self.watch is not None:
            self.watch.after_update(self.model, info)
        self._close()
        return info

    def _skip(self, gradients: Gradients, norm: Tensor) -> StepInfo:
        broken = gradients.broken()
        skip = Skip(
            step=self.steps,
            attempt=self.steps + self.skipped,
            rank=self.ranks.rank if self.ranks is not None else 0,
            layers=tuple(one.name for one in broken),
            kind=broken[0].kind if broken else "inf",
            scale=self.scale,
        )
        self.ledger.add(skip)
        if self.watch is not None and self._window.batch is not None:
            self.watch.on_nonfinite(self, self._window.batch, self.steps)
        self.skipped += 1
        info = self._info(skipped=True, norm=norm)
        self._scale = self.precision.scale.after(self._scale, False)
        _log.warning(
            "step %d left out: %s in the gradient of %s; the loss scale goes from %g to %g",
            self.steps,
            skip.kind,
            skip.layers[0] if skip.layers else "?",
            skip.scale,
            self.scale,
        )
        self._close()
        return info

    def _close(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self._window = _Window()
        self._closed_at = time.perf_counter()

    def _info(self, *, updated: bool = False, skipped: bool = False, norm: Tensor | None = None) -> StepInfo:
        window = self._window
        assert window.total is not None
        seconds = None if self._closed_at is None else time.perf_counter() - self._closed_at
        return StepInfo(
            step=self.steps,
            updated=updated,
            skipped=skipped,
            scale=self.scale,
            samples_per_s=None if seconds is None else window.samples / seconds,
            total=window.total,
            weight=window.weight,
            norm=norm,
            rate=self.optimizer.param_groups[0]["lr"],
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, as nested dictionaries of tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "scale": self._scale._asdict(),
            "counters": {"steps": self.steps, "skipped": self.skipped},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self._scale = self._scale._replace(**state["scale"])
        self.steps = state["counters"]["steps"]
        self.skipped = state["counters"]["skipped"]


def _trained(
    model: nn.Module, loss: Callable[[Any, Any], Tensor | Loss], optimizer: torch.optim.Optimizer
) -> dict[str, nn.Parameter]:
    """Return the parameters that the optimizer moves, by name, in the model's order."""
    known = {id(one): (name, one) for name, one in model.named_parameters()}
    if isinstance(loss, nn.Module):
        known |= {id(one): (f"loss.{name}", one) for name, one in loss.named_parameters()}
    moved = {id(one) for group in optimizer.param_groups for one in group["params"]}
    return {name: one for key, (name, one) in known.items() if key in moved}


def _parts(batch: Batch) -> Batch:
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise TrainingError(f"a batch is {type(batch).__name__}", allowed="a pair (inputs, targets)")


def _samples(inputs: Any) -> int:
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    return 1


def _as_loss(value: Tensor | Loss, samples: int) -> Loss:
    if isinstance(value, Loss):
        return value
    return Loss(value * samples, samples)
