"""What a trainer refuses, with a word on what to do."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from narrowcast.errors import TrainingError

__all__ = [
    "check_rounding",
    "check_settings",
    "check_unchanged",
    "check_weight",
    "check_weights",
    "moved_by",
    "not_finite",
    "replicas_in",
    "trained_parameters",
    "unwrapped",
]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside of :func:`torch.compile` and DistributedDataParallel, whose names have no prefix."""
    while True:
        if isinstance(model, OptimizedModule):
            model = model._orig_mod  # pyright: ignore[reportPrivateUsage]
        elif isinstance(model, DistributedDataParallel):
            model = model.module
        else:
            return model


def replicas_in(model: nn.Module) -> DistributedDataParallel | None:
    """Return the replicas that a module is, or that it was compiled from; None if there are none."""
    while isinstance(model, OptimizedModule):
        model = model._orig_mod  # pyright: ignore[reportPrivateUsage]
    return model if isinstance(model, DistributedDataParallel) else None


def trained_parameters(model: nn.Module, loss: Any, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """Return the parameters that an optimizer moves, by name, in the order of the model.

    Parameters of a loss that is a module (a learned temperature, a projection) have ``loss.`` before their names.

    Raises:
        TrainingError: The model has none to train, or the optimizer moves none of them, or moves others.
    """
    named = dict(unwrapped(model).named_parameters())
    if isinstance(loss, nn.Module):
        named |= {f"loss.{name}": one for name, one in loss.named_parameters()}
    if not any(one.requires_grad for one in named.values()):
        raise TrainingError(
            "the model has no trainable parameters",
            allowed="at least one parameter that requires a gradient",
            next_step="unfreeze some with parameter.requires_grad_(True)",
        )
    moved = {id(one) for group in optimizer.param_groups for one in group["params"]}
    found = {name: one for name, one in named.items() if id(one) in moved}
    others = len(moved) - len(found)
    if others or not any(one.requires_grad for one in found.values()):
        raise TrainingError(
            f"the optimizer moves {others} tensors that are not parameters of the model"
            + ("" if found else ", and none that are")
            if others
            else "the optimizer moves no trainable parameter",
            allowed="parameters of the model, and of the loss if it is a module",
            next_step="make the optimizer from model.parameters(), after the model is on its device",
        )
    return found


def moved_by(optimizer: Optimizer) -> int:
    """Return how many tensors an optimizer moves."""
    return sum(len(group["params"]) for group in optimizer.param_groups)


def check_unchanged(optimizer: Optimizer, before: int) -> None:
    """Check that an optimizer moves as many tensors as before.

    Raises:
        TrainingError: It moves others, whose gradients nobody would unscale or clip.
    """
    if moved_by(optimizer) != before:
        raise TrainingError(
            f"the optimizer moves {moved_by(optimizer)} tensors, and {before} when the trainer was built",
            next_step="give the optimizer all parameters at first, and freeze some with requires_grad_(False); or build the "
            "trainer anew",
        )


def check_weight(weight: Tensor | float) -> None:
    """Check that losses weigh something, where the host knows it.

    Raises:
        TrainingError: They weigh nothing.
    """
    if not isinstance(weight, Tensor) and not weight > 0:
        raise TrainingError(
            "the losses of a window weigh nothing: a mean over no samples or tokens",
            next_step="leave out batches that are empty or padding alone",
        )


def check_settings(
    optimizer: Optimizer, schedule: object, *, clip_norm: float | None, accumulate: int, nonfinite: str
) -> None:
    """Check what a trainer is built from.

    Raises:
        TrainingError: An optimizer that needs a closure, a schedule that needs a metric, or a number that is not allowed.
    """
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if isinstance(optimizer, LBFGS) or (closure is not None and closure.default is inspect.Parameter.empty):
        raise TrainingError(
            f"{type(optimizer).__name__} evaluates the loss several times in a step (a closure)",
            allowed="optimizers whose step() needs no closure, such as SGD and AdamW",
            next_step="write a loop of your own for it",
        )
    if isinstance(schedule, ReduceLROnPlateau):
        raise TrainingError(
            "ReduceLROnPlateau is stepped with a metric, which a training step does not have",
            allowed="schedules that are stepped after each update, such as OneCycleLR",
            next_step="leave schedule out, and call its step(metric) after each evaluation",
        )
    if clip_norm is not None and not 0 < clip_norm < float("inf"):
        raise TrainingError(f"clip_norm is {clip_norm}", allowed="a finite number above 0, or None")
    if accumulate < 1:
        raise TrainingError(f"accumulate is {accumulate}", allowed="a whole number of 1 or more")
    if nonfinite not in ("raise", "skip"):
        raise TrainingError(f"nonfinite is {nonfinite!r}", allowed="raise, skip")


def check_rounding(optimizer: Optimizer, update: str) -> None:
    """Check that an optimizer that rounds BF16 weights by itself does it as the precision says.

    Raises:
        TrainingError: It does not.
    """
    wanted = "nearest" if update == "plain" else update
    for group in optimizer.param_groups:
        rounding = group.get("rounding", "nearest")
        if rounding != wanted:
            raise TrainingError(
                f"the optimizer rounds BF16 weights {rounding!r}, and the precision's update is {update!r}",
                next_step=f"build it with rounding={wanted!r}, or the precision with the other update",
            )


def check_weights(parameters: Mapping[str, nn.Parameter], precision: str) -> None:
    """Check that the parameters of a policy with FP32 weights are FP32 (or FP64).

    Raises:
        TrainingError: Some are in half precision.
    """
    for name, one in parameters.items():
        if one.dtype in (torch.float16, torch.bfloat16):
            kind = "FP16" if one.dtype == torch.float16 else "BF16"
            raise TrainingError(
                f"{name} has {kind} weights, and precision {precision} trains FP32 weights",
                next_step="call model.float() before the optimizer is made"
                + ("" if kind == "FP16" else ", or train in bf16-true, which rounds its updates so that none is lost"),
            )


def not_finite(step: int, precision: str, where: str = "") -> TrainingError:
    """Return the error for an update that cannot be made, without loss scaling.

    Args:
        step: Updates before it.
        precision: Name of the policy.
        where: What is known of rank and layer.
    """
    return TrainingError(
        f"a loss or a gradient of update {step} is not finite, in precision {precision}{where}",
        next_step="check the data for NaN, lower the learning rate or set clip_norm; with nonfinite='skip' such updates "
        "are left out instead",
    )
