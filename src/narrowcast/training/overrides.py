"""Modules that run in another format than the rest, by patterns of their names."""

from __future__ import annotations

import fnmatch
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from narrowcast.errors import FormatError

__all__ = ["FORMATS", "Overrides", "cast", "format_of", "run_in"]

#: Patterns and formats, in order; the last pattern that fits a name counts.
Overrides = tuple[tuple[str, str], ...]
#: What a module may be told to run in; ``fp8`` only where the policy computes in it.
FORMATS = ("fp32", "bf16", "fp16", "fp8")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def format_of(name: str, overrides: Overrides) -> str | None:
    """Return the format that overrides name for a module, or for a module that it is part of; None if they name none.

    >>> format_of("head.norm", (("*", "bf16"), ("head", "fp32")))
    'fp32'
    """
    parts = name.split(".")
    inside = [".".join(parts[: end + 1]) for end in range(len(parts))]
    found = [format for pattern, format in overrides if any(fnmatch.fnmatchcase(one, pattern) for one in inside)]
    return found[-1] if found else None


def run_in(module: nn.Module, overrides: Overrides, *, base: str, stored: str) -> None:
    """Have the modules that overrides name run in their formats, in place.

    Args:
        module: The network.
        overrides: Patterns and formats.
        base: What the policy computes in; modules that would run in it anyway are left alone.
        stored: What the policy stores weights in: with ``bf16``, modules in another format store theirs in it, get inputs
            cast to it, and return what the rest computes in.

    Raises:
        FormatError: A pattern names no module.
    """
    names = [name for name, _ in module.named_modules() if name]
    for pattern, _ in overrides:
        if not fnmatch.filter(names, pattern):
            raise FormatError(
                f"override {pattern!r} names no module",
                allowed=", ".join(names[:8]) + (" ..." if len(names) > 8 else ""),
                next_step="give a pattern of module names, such as 'head*'",
            )
    placed: dict[str, str] = {}
    for name, part in list(module.named_modules()):
        format = format_of(name, overrides) if name else None
        around = next((placed[outer] for outer in reversed(_outer(name)) if outer in placed), base)
        if format is None or format == around or format == "fp8":
            continue
        placed[name] = format
        _place(part, _DTYPES[format], _DTYPES["bf16"] if stored == "bf16" else None)


def _outer(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _place(part: nn.Module, dtype: torch.dtype, back: torch.dtype | None) -> None:
    """Put a module's forward pass into a format, by a subclass of its class, which compiles and copies like it."""
    kind = type(part)
    if back is not None:
        part.to(dtype)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        device = _device_type(args, kwargs)
        args, kwargs = cast((args, kwargs), dtype)
        autocast = torch.autocast(device, dtype=dtype, enabled=back is None and dtype != torch.float32)
        with autocast:
            outputs = kind.forward(self, *args, **kwargs)
        return outputs if back is None else cast(outputs, back)

    part.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def cast(values: Any, dtype: torch.dtype) -> Any:
    """Return nested values with every floating-point tensor in a dtype."""
    return tree_map_only(torch.Tensor, lambda one: one.to(dtype) if one.is_floating_point() else one, values)


def _device_type(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value.device.type
    return "cuda" if torch.is_autocast_enabled("cuda") else "cpu"
