"""The update: unscaling, clipping and the optimizer's step, for three kinds of optimizers.

- :class:`~narrowcast.training.gradients.FusedUpdate` does all of it itself.
- PyTorch's fused optimizers divide gradients by a number and leave the update out where they are told so, on the device:
  unscaling and clipping cost no pass over the gradients of their own (the seam that :class:`torch.amp.GradScaler` uses).
- All others get gradients that are unscaled and clipped, by one multiplication.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from narrowcast.training.census import Census, Finding
from narrowcast.training.gradients import CountingUpdate, FusedUpdate, Gradients, Ranks

__all__ = ["Decide", "Update", "at_once", "never", "update_for"]


#: Takes what was found as soon as the device has it, and returns whether everything is finite; None if the host is not to
#: wait for that. Weights are then harmed by what is not finite, unless the update leaves itself out.
Decide = Callable[[Finding], bool | None]


def at_once(finding: Finding) -> bool:
    """Decide by waiting for the device."""
    broken = finding.broken
    return not (broken.numpy() if broken.device.type == "cpu" else bool(broken))


def never(finding: Finding) -> None:
    """Wait for nothing."""


class Update(Protocol):
    """Moves the weights by their gradients, or leaves them as they are where those are not finite."""

    def leaves_out(self) -> bool:
        """Return whether the device leaves the next update out by itself, and a census says what broke."""
        ...

    def __call__(
        self, gradients: Gradients, factor: Tensor | float, loss: Tensor, census: Census, decide: Decide
    ) -> tuple[Tensor, Finding, bool | None]:
        """Update.

        Args:
            gradients: As the backward passes left them.
            factor: What makes them the gradients of the mean loss: unscales and normalises.
            loss: The window's loss, 0-d; one that is not finite stops the update as a gradient does.
            census: Says where numbers broke.
            decide: Called once.

        Returns:
            The norm of all gradients, unscaled and before clipping (0-d), what was found, and what ``decide`` returned.
        """
        ...


def update_for(
    optimizer: Optimizer, clip_norm: float | None, ranks: Ranks | None, before: Callable[[Tensor | None], None]
) -> Update:
    """Return the update for an optimizer.

    Args:
        optimizer: Any.
        clip_norm: The largest norm of all gradients together.
        ranks: The processes that train together.
        before: Called before the weights move, with 1 if the device will leave the update out after all and 0 if not (0-d);
            None if it is known that they move, or if the optimizer finds that out itself.
    """
    if isinstance(optimizer, FusedUpdate):
        return _Own(optimizer, clip_norm, before)
    plain = _Plain(optimizer, _Measure(clip_norm, ranks), before)
    return _Fused(plain) if _is_fused(optimizer) else plain


@dataclass(frozen=True)
class _Measure:
    """Takes the norm of gradients.

    Args:
        clip_norm: The largest norm of all gradients together.
        ranks: The processes that train together.
    """

    clip_norm: float | None
    ranks: Ranks | None

    def __call__(
        self, gradients: Gradients, factor: Tensor | float, loss: Tensor, census: Census
    ) -> tuple[Tensor, Finding, Tensor | float]:
        """Return the norm, whether everything is finite, and the factor with clipping in it."""
        norm = gradients.norm(self.ranks)
        if not (isinstance(factor, float) and factor == 1.0):
            norm = norm * factor
        finding = census.take(torch.isfinite(norm + loss), gradients)
        if self.clip_norm is not None:  # with the epsilon of torch.nn.utils.clip_grad_norm_
            factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0) * factor
        return norm, finding, factor


@dataclass(frozen=True)
class _Own:
    optimizer: FusedUpdate
    clip_norm: float | None
    before: Callable[[Tensor | None], None]

    def leaves_out(self) -> bool:
        return isinstance(self.optimizer, CountingUpdate)  # the others do, but cannot say what broke

    def __call__(
        self, gradients: Gradients, factor: Tensor | float, loss: Tensor, census: Census, decide: Decide
    ) -> tuple[Tensor, Finding, bool | None]:
        self.before(None)
        inverse = torch.where(loss.isfinite(), factor, torch.nan)  # a factor of NaN makes every gradient one
        norm, finite = self.optimizer.update(inverse, self.clip_norm)
        own = self.optimizer
        finding = census.counted(
            finite, gradients.counted(own) if isinstance(own, CountingUpdate) else gradients.broken
        )
        return norm, finding, decide(finding)


@dataclass(frozen=True)
class _Plain:
    optimizer: Optimizer
    measure: _Measure
    before: Callable[[Tensor | None], None]

    def leaves_out(self) -> bool:
        return False

    def __call__(
        self, gradients: Gradients, factor: Tensor | float, loss: Tensor, census: Census, decide: Decide
    ) -> tuple[Tensor, Finding, bool | None]:
        norm, finding, factor = self.measure(gradients, factor, loss, census)
        finite = decide(finding)
        if finite is not False:
            gradients.multiply(factor)
            self.before(None)
            self.optimizer.step()
        return norm, finding, finite


@dataclass(frozen=True)
class _Fused:
    """Updates by a fused optimizer; ``plain`` does what it cannot."""

    plain: _Plain

    def leaves_out(self) -> bool:
        return not self._begins()

    def _begins(self) -> bool:
        """Return whether an SGD is about to keep its first gradients as momentum.

        Told to leave that update out, it would keep what the memory held.
        """
        optimizer = self.plain.optimizer
        return isinstance(optimizer, SGD) and any(
            one.grad is not None and "momentum_buffer" not in optimizer.state.get(one, {})
            for group in optimizer.param_groups
            if group["momentum"]
            for one in group["params"]
        )

    def __call__(
        self, gradients: Gradients, factor: Tensor | float, loss: Tensor, census: Census, decide: Decide
    ) -> tuple[Tensor, Finding, bool | None]:
        if self._begins():
            return self.plain(gradients, factor, loss, census, decide)
        norm, finding, factor = self.plain.measure(gradients, factor, loss, census)
        finite = decide(finding)  # before the step, so that the device works on it while the host goes on
        if finite is False:
            return norm, finding, finite
        broken = None if finite else finding.broken
        self.plain.before(broken)
        if isinstance(factor, Tensor):
            divisor = factor.float().reciprocal()
        else:
            divisor = None if factor == 1.0 else torch.full_like(norm, 1 / factor)
        told: Any = self.plain.optimizer  # by attributes, as torch.amp.GradScaler does
        told.grad_scale, told.found_inf = divisor, broken
        try:
            told.step()
        finally:
            del told.grad_scale, told.found_inf
        return norm, finding, finite


def _is_fused(optimizer: Optimizer) -> bool:
    """Return whether an optimizer is one of PyTorch's fused ones; of sharded weights, PyTorch has Adam and AdamW alone."""
    from torch.distributed.tensor import DTensor

    groups = optimizer.param_groups
    sharded = any(isinstance(one, DTensor) for group in groups for one in group["params"])
    kinds = (Adam, AdamW) if sharded else (Adam, AdamW, SGD, Adagrad)
    return isinstance(optimizer, kinds) and all(group.get("fused") for group in groups)
