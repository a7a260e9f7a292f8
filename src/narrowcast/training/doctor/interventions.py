"""Changes to what a replay computes, at the level at which people write it: one layer's operators, inputs or weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from narrowcast.training.doctor.paths import Paths, layer_names
from narrowcast.training.overrides import run_in

__all__ = [
    "Rewrite",
    "clamp_inputs",
    "gathered_narrow",
    "in_format",
    "power_of_two_below",
    "rewriting",
    "shrink_weights",
    "with_epsilon",
    "without_maximum",
]

#: From a function's name, its function and its arguments to other arguments; None to leave them.
Change = Callable[[str, tuple[Any, ...], dict[str, Any]], "tuple[tuple[Any, ...], dict[str, Any]] | None"]

_LOGARITHMS = ("log", "log2", "log10", "log_", "sqrt", "sqrt_", "rsqrt", "rsqrt_", "reciprocal", "reciprocal_")
_DIVISIONS = ("div", "true_divide", "__truediv__", "divide", "div_", "__itruediv__")
_REVERSED = ("__rtruediv__", "__rdiv__")
_POWERS = ("pow", "__pow__")
_NORMS = {"layer_norm": 4, "group_norm": 4, "batch_norm": 7, "rms_norm": 3}  # position of the epsilon
_NORMALISE = {"normalize": 3}


class Rewrite(TorchFunctionMode):
    """Changes the arguments of functions that one layer's own code calls.

    Args:
        paths: Where code runs.
        layer: Whose calls are changed.
        change: What to change.

    Attributes:
        changed: How many calls were changed.
    """

    def __init__(self, paths: Paths, layer: str, change: Change) -> None:
        super().__init__()
        self.changed = 0
        self._paths = paths
        self._layer = layer
        self._change = change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(getattr(func, "__name__", ""))  # properties of tensors come as descriptors without one
        if self._paths.forward == self._layer and (found := self._change(name, tuple(args), dict(kwargs))):
            self.changed += 1
            args, kwargs = found
        return func(*args, **kwargs)


def with_epsilon(epsilon: float) -> Change:
    """Return the change that keeps what is divided by, rooted or logged at a distance from zero."""

    def away(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return torch.where(value.abs() < epsilon, torch.full_like(value, epsilon), value)

    def change(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if name in _LOGARITHMS or name in _REVERSED:
            return (away(args[0]), *args[1:]), kwargs
        if name in _DIVISIONS and len(args) > 1 and isinstance(args[1], Tensor):
            return (args[0], away(args[1]), *args[2:]), kwargs
        if name in _POWERS and len(args) > 1 and isinstance(args[1], int | float) and args[1] < 1:
            return (away(args[0]), *args[1:]), kwargs
        places = _NORMS | _NORMALISE
        if name in places:
            place = places[name]
            if len(args) > place:
                return (*args[:place], epsilon, *args[place + 1 :]), kwargs
            return args, {**kwargs, "eps": epsilon}
        return None

    return change


def without_maximum() -> Change:
    """Return the change that subtracts the largest number along the last axis before an exponential."""

    def change(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if name not in ("exp", "exp_", "exp2") or not args[0].dim():
            return None
        return (args[0] - args[0].detach().amax(-1, keepdim=True), *args[1:]), kwargs

    return change


@contextmanager
def rewriting(model: nn.Module, rewrite: Rewrite, layer: str) -> Generator[None]:
    """Have a layer run within a rewrite, also where it is computed again: a backward pass leaves function modes behind.

    Args:
        model: The model.
        rewrite: What changes calls.
        layer: The layer's name.
    """
    part = _module(model, layer)

    def enter(part: nn.Module, args: Any) -> None:
        rewrite.__enter__()

    def leave(part: nn.Module, args: Any, out: Any) -> None:
        rewrite.__exit__(None, None, None)

    handles = [part.register_forward_pre_hook(enter), part.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def in_format(model: nn.Module, layer: str, format: str, base: str) -> Generator[None]:
    """Run a layer in another format, as an override of the precision does; the replay puts its class back.

    Args:
        model: The model.
        layer: The layer's name.
        format: ``fp32``, ``bf16`` or ``fp16``.
        base: What the rest computes in.
    """
    run_in(model, ((layer, format),), base=base, stored="fp32")
    yield


@contextmanager
def clamp_inputs(model: nn.Module, layer: str, limit: float) -> Generator[None]:
    """Clamp the floating-point inputs of a layer to ``[-limit, limit]`` while the context lasts."""

    def clamp(part: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            one.clamp(-limit, limit) if isinstance(one, Tensor) and one.is_floating_point() else one for one in args
        )

    handle = _module(model, layer).register_forward_pre_hook(clamp)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def shrink_weights(model: nn.Module, layer: str, factor: float) -> Generator[None]:
    """Multiply a layer's own parameters by a factor while the context lasts."""
    parameters = list(_module(model, layer).parameters(recurse=False))
    before = [one.detach().clone() for one in parameters]
    try:
        with torch.no_grad():
            for one in parameters:
                one.mul_(factor)
        yield
    finally:
        with torch.no_grad():
            for one, value in zip(parameters, before, strict=True):
                one.copy_(value)


def _module(model: nn.Module, layer: str) -> nn.Module:
    names = layer_names(model)
    return next(part for part in model.modules() if names.get(id(part)) == layer)


def gathered_narrow(model: nn.Module) -> bool:
    """Return whether sharded weights come together in 16 bits: then no layer can be run in another format."""
    from torch.distributed.fsdp import FSDPModule

    units: list[Any] = [one for one in model.modules() if isinstance(one, FSDPModule)]
    return any(one._get_fsdp_state()._mp_policy.param_dtype is not None for one in units)


def power_of_two_below(value: float) -> float:
    """Return the largest power of two that is not above a positive number."""
    return 2.0 ** math.floor(math.log2(value))
