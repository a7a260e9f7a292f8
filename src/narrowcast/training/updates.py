"""The update: unscaling, clipping and the optimizer's step, for three kinds of optimizers.

- :class:`~narrowcast.training.gradients.FusedUpdate` does all of it itself.
- PyTorch's fused optimizers divide gradients by a number and leave the update out where they are told so, on the device:
  unscaling and clipping cost no pass over the gradients of their own (the seam that :class:`torch.amp.GradScaler` uses).
- All others get gradients that are unscaled and clipped, by one multiplication.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from narrowcast.training.gradients import FusedUpdate, Gradients, Ranks

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
        """Return whether the device leaves the next update out by itself, and the gradients' census says what broke."""
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
    if _is_fused(optimizer):
        return _Fused(optimizer, clip_norm, ranks, before)
    return _Plain(optimizer, clip_norm, ranks, before)


class _Own:
    def __init__(self, optimizer: FusedUpdate, clip_norm: float | None, before: Callable[[], None]) -> None:
        self._optimizer = optimizer
        self._clip_norm = clip_norm
        self._before = before

    def leaves_out(self) -> bool:
        return False  # it does, but takes no norm of each gradient, and nobody keeps the gradients

    def __call__(self, gradients: Gradients, factor: Tensor | float, loss: Tensor, *, decide: bool) -> Outcome:
        self._before()
        inverse = torch.where(loss.isfinite(), factor, torch.nan)  # a factor of NaN makes every gradient one
        norm, finite = self._optimizer.update(inverse, self._clip_norm)
        return Outcome(norm, finite, _on_host(finite, decide))


class _Fused:
    def __init__(
        self, optimizer: Optimizer, clip_norm: float | None, ranks: Ranks | None, before: Callable[[], None]
    ) -> None:
        self._optimizer = optimizer
        self._clip_norm = clip_norm
        self._ranks = ranks
        self._before = before
        keeps = isinstance(optimizer, SGD) and any(group["momentum"] for group in optimizer.param_groups)
        self._first = _Plain(optimizer, clip_norm, ranks, before) if keeps else None

    def leaves_out(self) -> bool:
        return self._first is None or not self._begins()

    def _begins(self) -> bool:
        """Return whether a parameter is about to get its first momentum."""
        state = self._optimizer.state
        return any(
            one.grad is not None and "momentum_buffer" not in state.get(one, {})
            for group in self._optimizer.param_groups
            if group["momentum"]
            for one in group["params"]
        )

    def __call__(self, gradients: Gradients, factor: Tensor | float, loss: Tensor, *, decide: bool) -> Outcome:
        if self._first is not None and self._begins():
            # SGD keeps its first gradients as momentum: told to leave that update out, it would keep what the memory held.
            return self._first(gradients, factor, loss, decide=decide)
        norm, finite, factor = _measured(gradients, factor, loss, self._clip_norm, self._ranks)
        known = _on_host(finite, decide)  # before the step, so that the device works on it while the host goes on
        if known is False:
            return Outcome(norm, finite, known)
        self._before()
        if isinstance(factor, Tensor):
            divisor = factor.float().reciprocal()
        else:
            divisor = None if factor == 1.0 else torch.full((), 1 / factor, device=norm.device)
        told: Any = self._optimizer  # by attributes, as torch.amp.GradScaler does
        told.grad_scale, told.found_inf = divisor, None if known else finite.logical_not().float()
        try:
            self._optimizer.step()
        finally:
            del told.grad_scale, told.found_inf
        return Outcome(norm, finite, known)


class _Plain:
    def __init__(
        self, optimizer: Optimizer, clip_norm: float | None, ranks: Ranks | None, before: Callable[[], None]
    ) -> None:
        self._optimizer = optimizer
        self._clip_norm = clip_norm
        self._ranks = ranks
        self._before = before

    def leaves_out(self) -> bool:
        return False

    def __call__(self, gradients: Gradients, factor: Tensor | float, loss: Tensor, *, decide: bool) -> Outcome:
        norm, finite, factor = _measured(gradients, factor, loss, self._clip_norm, self._ranks)
        known = _on_host(finite, decide)
        if known is not False:
            gradients.multiply(factor)
            self._before()
            self._optimizer.step()
        return Outcome(norm, finite, known)


def _measured(
    gradients: Gradients, factor: Tensor | float, loss: Tensor, clip_norm: float | None, ranks: Ranks | None
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Return the norm, whether everything is finite, and the factor with clipping in it."""
    norm = gradients.norm(ranks)
    if not (isinstance(factor, float) and factor == 1.0):
        norm = norm * factor
    finite = torch.isfinite(norm + loss)
    if ranks is not None and ranks.world > 1:
        finite = ranks.all_finite(finite)
    if clip_norm is not None:  # with the epsilon of torch.nn.utils.clip_grad_norm_
        factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0) * factor
    return norm, finite, factor


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
