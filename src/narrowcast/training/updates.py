"""The update: unscaling, clipping and the optimizer's step, for three kinds of optimizers.

- :class:`~narrowcast.training.gradients.FusedUpdate` does all of it itself.
- PyTorch's fused optimizers divide gradients by a number and leave the update out where they are told so, on the device:
  unscaling and clipping cost no pass over the gradients of their own (the seam that :class:`torch.amp.GradScaler` uses).
- All others get gradients that are unscaled and clipped, by one multiplication.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from narrowcast.training.gradients import Census, CountingUpdate, FusedUpdate, Gradients, Ranks

__all__ = ["Outcome", "Update", "update_for"]


class Outcome(NamedTuple):
    """What an update came to.

    Args:
        norm: Norm of all gradients, unscaled and before clipping; 0-d.
        finite: Whether the losses and all gradients are finite, on every rank; 0-d, bool.
        known: The same on the host; None if it was not to be known there.
    """

    norm: Tensor
    finite: Tensor
    known: bool | None


class Update(Protocol):
    """Moves the weights by their gradients, or leaves them as they are where those are not finite."""

    def leaves_out(self) -> bool:
        """Return whether the device leaves the next update out by itself, and a census says what broke."""
        ...

    def census(self, gradients: Gradients) -> Census:
        """Return what tells of the last update where numbers broke, without the gradients; only where it leaves out."""
        ...

    def __call__(self, gradients: Gradients, factor: Tensor | float, loss: Tensor, *, decide: bool) -> Outcome:
        """Update.

        Args:
            gradients: As the backward passes left them.
            factor: What makes them the gradients of the mean loss: unscales and normalises.
            loss: The window's loss, 0-d; one that is not finite stops the update as a gradient does.
            decide: Whether the host must know the outcome before it goes on, at the price of waiting for the device. Without,
                weights are harmed by what is not finite unless the update leaves itself out.
        """
        ...


def update_for(
    optimizer: Optimizer, clip_norm: float | None, ranks: Ranks | None, before: Callable[[], None]
) -> Update:
    """Return the update for an optimizer.

    Args:
        optimizer: Any.
        clip_norm: The largest norm of all gradients together.
        ranks: The processes that train together.
        before: Called before the weights move.
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
        self, gradients: Gradients, factor: Tensor | float, loss: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """Return the norm, whether everything is finite, and the factor with clipping in it."""
        norm = gradients.norm(self.ranks)
        if not (isinstance(factor, float) and factor == 1.0):
            norm = norm * factor
        finite = torch.isfinite(norm + loss)
        if self.ranks is not None and self.ranks.world > 1:
            finite = self.ranks.all_finite(finite)
        if self.clip_norm is not None:  # with the epsilon of torch.nn.utils.clip_grad_norm_
            factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0) * factor
        return norm, finite, factor


@dataclass(frozen=True)
class _Own:
    optimizer: FusedUpdate
    clip_norm: float | None
    before: Callable[[], None]

    def leaves_out(self) -> bool:
        return isinstance(self.optimizer, CountingUpdate)  # the others do, but cannot say what broke

    def census(self, gradients: Gradients) -> Census:
        assert isinstance(self.optimizer, CountingUpdate)
        return gradients.counts(self.optimizer)

    def __call__(self, gradients: Gradients, factor: Tensor | float, loss: Tensor, *, decide: bool) -> Outcome:
        self.before()
        inverse = torch.where(loss.isfinite(), factor, torch.nan)  # a factor of NaN makes every gradient one
        norm, finite = self.optimizer.update(inverse, self.clip_norm)
        return Outcome(norm, finite, _on_host(finite, decide))


@dataclass(frozen=True)
class _Plain:
    optimizer: Optimizer
    measure: _Measure
    before: Callable[[], None]

    def leaves_out(self) -> bool:
        return False

    def census(self, gradients: Gradients) -> Census:
        return gradients.norms()

    def __call__(self, gradients: Gradients, factor: Tensor | float, loss: Tensor, *, decide: bool) -> Outcome:
        norm, finite, factor = self.measure(gradients, factor, loss)
        known = _on_host(finite, decide)
        if known is not False:
            gradients.multiply(factor)
            self.before()
            self.optimizer.step()
        return Outcome(norm, finite, known)


@dataclass(frozen=True)
class _Fused:
    """Updates by a fused optimizer; ``plain`` does what it cannot."""

    plain: _Plain

    def leaves_out(self) -> bool:
        return not self._begins()

    def census(self, gradients: Gradients) -> Census:
        return gradients.norms()

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

    def __call__(self, gradients: Gradients, factor: Tensor | float, loss: Tensor, *, decide: bool) -> Outcome:
        if self._begins():
            return self.plain(gradients, factor, loss, decide=decide)
        norm, finite, factor = self.plain.measure(gradients, factor, loss)
        known = _on_host(finite, decide)  # before the step, so that the device works on it while the host goes on
        if known is False:
            return Outcome(norm, finite, known)
        self.plain.before()
        if isinstance(factor, Tensor):
            divisor = factor.float().reciprocal()
        else:
            divisor = None if factor == 1.0 else torch.full((), 1 / factor, device=norm.device)
        told: Any = self.plain.optimizer  # by attributes, as torch.amp.GradScaler does
        told.grad_scale, told.found_inf = divisor, None if known else finite.logical_not().float()
        try:
            told.step()
        finally:
            del told.grad_scale, told.found_inf
        return Outcome(norm, finite, known)


def _on_host(flag: Tensor, decide: bool) -> bool | None:
    """Return a flag on the host, which waits for it, or None."""
    if not decide:
        return None
    return bool(flag.numpy()) if flag.device.type == "cpu" else bool(flag)


def _is_fused(optimizer: Optimizer) -> bool:
    from torch.distributed.tensor import DTensor

    groups = optimizer.param_groups
    return (
        isinstance(optimizer, Adam | AdamW | SGD | Adagrad)
        and all(group.get("fused") for group in groups)
        and not any(isinstance(one, DTensor) for group in groups for one in group["params"])
    )
