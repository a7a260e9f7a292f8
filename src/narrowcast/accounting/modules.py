"""PyTorch modules, counted: what a trace does not say, which is whose the parameters are."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import keystr, tree_flatten_with_path

from narrowcast.accounting.building import dtype_of
from narrowcast.accounting.experts import idle_parameters
from narrowcast.accounting.operators import Trace
from narrowcast.accounting.profile import Counted, Layer, Parameters
from narrowcast.accounting.trace import trace

__all__ = ["count_module"]


def count_module(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    mode: FakeTensorMode | None = None,
    train: bool = False,
) -> Counted:
    """Return what one run of a module does; takes what :func:`narrowcast.accounting.trace.trace` takes."""
    run = trace(module, args, kwargs, mode=mode, train=train)
    layers = [
        Layer(path, type(part).__name__, sum(tensor.numel() for tensor in part.parameters()))
        for path, part in module.named_modules()
    ]
    return Counted(_inputs(module, args, kwargs or {}), run, _parameters(module, run), layers)


def _inputs(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the inputs that are tensors, nested ones too, by the names that ``forward`` gives them."""
    names = [name for name, entry in inspect.signature(module.forward).parameters.items() if entry.kind in _POSITIONAL]
    names += [f"input {place}" for place in range(len(names), len(args))]  # of forward(*args)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return {
        name + keystr(path): tuple(leaf.shape)
        for name, value in given.items()
        for path, leaf in tree_flatten_with_path(value)[0]
        if hasattr(leaf, "shape")
    }


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _parameters(module: nn.Module, run: Trace) -> Parameters:
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    kinds: Counter[str] = Counter()
    total = trainable = size = 0
    for prefix, part in module.named_modules():
        for key, tensor in part.named_parameters(recurse=False, remove_duplicate=False):
            path = f"{prefix}.{key}".lstrip(".")
            if id(tensor) in first:
                tied[path] = first[id(tensor)]
                continue
            first[id(tensor)] = path
            kinds[type(part).__name__] += tensor.numel()
            total += tensor.numel()
            trainable += tensor.numel() * tensor.requires_grad
            size += tensor.numel() * tensor.element_size()
    return Parameters(
        total=total,
        trainable=trainable,
        active=total - idle_parameters(module, run),
        by_kind=dict(kinds.most_common()),
        tied=tied,
        bytes=size,
        dtype=str(dtype_of(module) or "").removeprefix("torch."),
    )
