"""Building a module whose tensors have shapes and no memory.

Constructors look at small numbers (``torch.linspace(0, rate, depth).tolist()`` for the rates of stochastic depth), which
tensors without numbers refuse. So what a constructor computes from known, small tensors keeps its numbers, and all else,
weights first, is a shape.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from narrowcast.errors import ModelError, NarrowcastError

__all__ = ["dtype_of", "failed", "fake_copy", "fake_module", "in_dtype_of"]

_SMALL = 4096  # elements
_KNOWN = frozenset(
    f"aten::{name}" for name in ("linspace", "logspace", "arange", "scalar_tensor", "zeros", "ones", "full")
)


def fake_module(build: Callable[[], nn.Module]) -> tuple[nn.Module, FakeTensorMode]:
    """Return a module whose parameters have shapes and no memory, and the mode that they live in.

    A constructor that looks at numbers of its own weights cannot be built so; it is built for real and converted.

    Args:
        build: Makes the module; called once or twice.
    """
    mode = _OneMode(allow_non_fake_inputs=True)
    try:
        with warnings.catch_warnings(), _SmallNumbers(mode):
            warnings.filterwarnings(
                "ignore", message="Accessing the data pointer of FakeTensor"
            )  # copying a layer does
            built = build()
    except Exception as error:
        if isinstance(error, NarrowcastError) and error.__cause__ is None:
            raise  # said on purpose, and not of what the user's code did
        # Constructors fail in many ways on tensors without numbers; a real one tells whether the fault is theirs.
        built = _really(build)
    return fake_copy(built, mode), mode


def _really(build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except NarrowcastError:
        raise
    except Exception as error:
        raise ModelError(
            f"the model cannot be built: {type(error).__name__}: {_first_line(error)}",
            next_step="mend the configuration or the function that builds it; --debug shows where it fails",
        ) from error


def failed(error: Exception, where: str) -> ModelError:
    """Return the typed error for what a module raised while its run was traced.

    Args:
        error: What it raised.
        where: The layer.
    """
    if isinstance(error, NotImplementedError):
        return ModelError(
            f"{where} does what runs without numbers cannot follow: {_first_line(error)}",
            next_step="count the module with another operator in its place, or only its inference",
        )
    if isinstance(error, RuntimeError | TypeError | ValueError | IndexError):
        return ModelError(
            f"the inputs do not fit at {where}: {_first_line(error)}",
            next_step="give inputs of the right shapes and dtypes; --debug shows where it fails",
        )
    return ModelError(
        f"the model fails at {where}: {type(error).__name__}: {_first_line(error)}",
        next_step="see that it runs on such inputs; --debug shows where it fails",
    )


def _first_line(error: Exception) -> str:
    """Return what an error says, in one line; its class if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """Return what all floating parameters of a module are in; None if there are none, or if they differ."""
    found = {one.dtype for one in module.parameters() if one.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def in_dtype_of(module: nn.Module, inputs: Any) -> Any:
    """Return inputs that a module in half precision takes: those of FP32 in its own dtype."""
    dtype = dtype_of(module)
    if dtype not in (torch.float16, torch.bfloat16):
        return inputs
    return tree_map_only(torch.Tensor, lambda one: one.to(dtype) if one.dtype is torch.float32 else one, inputs)


def fake_copy(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Return a copy of a module with shapes in place of its tensors; the module itself keeps its numbers."""
    shapes: dict[int, Any] = {}  # what deepcopy takes in place of a copy: tied weights stay tied
    for tensor in (*module.parameters(), *module.buffers()):
        if isinstance(tensor, FakeTensor):
            shapes[id(tensor)] = tensor
            continue
        shape = mode.from_tensor(tensor.detach())
        shapes[id(tensor)] = nn.Parameter(shape, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shape
    return copy.deepcopy(module, shapes)


class _OneMode(FakeTensorMode):
    """A mode that stays one when tensors are copied, as constructors do that repeat a layer (``nn.TransformerEncoder``)."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _OneMode:
        return self


class _SmallNumbers(TorchDispatchMode):
    """Computes what follows from small, known tensors, and gives shapes for everything else."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._fake = fake

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves([args, kwargs]) if isinstance(leaf, torch.Tensor)]
        if tensors and all(map(_is_known, tensors)):
            return func(*args, **kwargs)
        if any(map(_is_known, _written(func, args, kwargs))):  # its numbers would be wrong from here on
            raise DataDependentOutputException(func)
        with self._fake:
            shape = func(*args, **kwargs)
        if not tensors and func._schema.name in _KNOWN and shape.numel() <= _SMALL:
            return func(*args, **kwargs)
        return shape


def _is_known(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, FakeTensor) and tensor.numel() <= _SMALL


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the tensors that an operator writes into."""
    if not func._schema.is_mutable:
        return []
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    written = [argument.name for argument in func._schema.arguments if argument.is_write]
    return [leaf for leaf in tree_leaves([named.get(name) for name in written]) if isinstance(leaf, torch.Tensor)]
