"""Backward through an autograd graph, one node after another, as PyTorch's own engine goes but on any machine.

PyTorch's engine hands the nodes of a CUDA graph to a thread of the card, which is missing where memory is planned for a
card that is not there; and it copies gradients of tensors without numbers that it would take over from real ones. This one
keeps the engine's order (the latest node first, gradients of parameters before all), frees what a node has saved once the
node has run, adds gradients in place where the engine does, and says which node is running.
"""

from __future__ import annotations

import heapq
import sys
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

__all__ = ["Backward", "summed_loss", "tensors_of"]

_ENGINE: Any = torch._C  # pyright: ignore[reportPrivateUsage]
_ACCUMULATE = "AccumulateGrad"
_FIRST = 1 << 64  # gradients of parameters are put away before anything else runs
_GRAPH_TASK = 0  # what saved tensors are told of the run that asks for them


class Backward:
    """One backward pass from a loss; the caller drops the loss before it runs, so that nodes can be freed.

    Args:
        loss: A tensor of one element.
        enter: Called with the sequence number of every node before it runs; None for the gradient of a parameter.
    """

    def __init__(self, loss: torch.Tensor, enter: Callable[[int | None], None] = lambda number: None) -> None:
        if loss.grad_fn is None:
            raise ValueError("no output depends on a parameter that is trained")
        self._enter = enter
        self._waiting = _dependencies(loss.grad_fn)
        self._gradients: dict[Any, list[torch.Tensor | None]] = {loss.grad_fn: [torch.ones_like(loss)]}
        self._ready: list[tuple[int, int, Any]] = []
        self._pushed = 0
        self._push(loss.grad_fn)

    def run(self) -> None:
        """Run every node, and leave gradients in ``.grad`` of the parameters."""
        with torch.no_grad(), _graph_task():
            while self._ready:
                node = heapq.heappop(self._ready)[-1]
                del self._waiting[node]
                self._run(node, self._gradients.pop(node))

    def _push(self, node: Any) -> None:
        self._pushed += 1
        order = _FIRST if _accumulates(node) else node._sequence_nr()
        heapq.heappush(self._ready, (-order, self._pushed, node))

    def _run(self, node: Any, gradients: list[torch.Tensor | None]) -> None:
        if _accumulates(node):
            self._enter(None)
            _accumulate(node.variable, gradients.pop())
            return
        self._enter(node._sequence_nr())
        found = _call(node, gradients)
        del gradients
        shared = {number for number, count in Counter(map(id, found)).items() if count > 1}
        for (after, place), gradient in zip(node.next_functions, found, strict=False):
            if after is None:
                continue
            if gradient is not None:
                gradient = _fitted(gradient, after._input_metadata[place])
                if id(gradient) in shared and _accumulates(after):
                    gradient = gradient.clone()
                self._add(after, place, gradient)
            self._waiting[after] -= 1
            if not self._waiting[after]:
                if after in self._gradients:
                    self._push(after)
                else:
                    self._skip(after)

    def _add(self, node: Any, place: int, gradient: torch.Tensor) -> None:
        gradients = self._gradients.setdefault(node, [None] * len(node._input_metadata))
        if gradients[place] is None:
            gradients[place] = gradient
        elif _is_last_reference(gradients, place):
            gradients[place].add_(gradient)  # pyright: ignore[reportOptionalMemberAccess]
        else:
            gradients[place] = gradients[place] + gradient  # pyright: ignore[reportOptionalOperand]

    def _skip(self, node: Any) -> None:
        """Pass on that no gradient comes to a node: it runs with none, as the engine runs it."""
        self._gradients[node] = [None] * len(node._input_metadata)
        self._push(node)


def _accumulates(node: Any) -> bool:
    """Return whether a node puts away the gradient of a parameter; nodes of autograd functions refuse ``name()`` in 2.11."""
    return type(node).__name__.endswith(_ACCUMULATE)


def _dependencies(start: Any) -> Counter[Any]:
    """Return how many edges lead to each node."""
    waiting: Counter[Any] = Counter({start: 0})
    stack = [start]
    while stack:
        for after, _ in stack.pop().next_functions:
            if after is None:
                continue
            if after not in waiting:
                stack.append(after)
            waiting[after] += 1
    return waiting


def _call(node: Any, gradients: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    if all(gradient is None for gradient in gradients):
        return [None] * len(node.next_functions)
    if _is_python(node):
        given = [  # zeros where no gradient comes, which functions get unless they ask for None
            torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) if gradient is None else gradient
            for gradient, meta in zip(gradients, node._input_metadata, strict=True)
        ]
        found = node.apply(*given)
    else:
        found = node(*gradients)
    return list(found) if isinstance(found, tuple | list) else [found]


def _is_python(node: object) -> bool:
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def _fitted(gradient: torch.Tensor, meta: Any) -> torch.Tensor:
    """Return a gradient in the shape and dtype of what it is the gradient of."""
    if gradient.shape != meta.shape:
        gradient = gradient.sum_to_size(meta.shape)
    return gradient if gradient.dtype == meta.dtype else gradient.to(meta.dtype)


def _accumulate(parameter: torch.Tensor, gradient: torch.Tensor | None) -> None:
    if gradient is None:
        return
    if parameter.grad is not None:
        parameter.grad += gradient
    elif _same_layout(gradient, parameter):
        parameter.grad = gradient
    else:  # the gradient is laid out like its parameter
        laid_out = torch.empty_like(parameter, dtype=gradient.dtype, memory_format=torch.preserve_format)
        parameter.grad = laid_out.copy_(gradient)


def _same_layout(gradient: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Tell whether a gradient may be kept as it is, by the gradient layout contract of PyTorch's AccumulateGrad."""
    axes = zip(gradient.shape, gradient.stride(), parameter.stride(), strict=True)
    return all(stride == wanted if size != 1 else stride != 0 for size, stride, wanted in axes)


def _is_last_reference(gradients: list[torch.Tensor | None], place: int) -> bool:
    """Tell whether nobody else holds a gradient or its storage, so that it may be added to in place."""
    held = gradients[place]
    assert held is not None
    # The list, the name above and getrefcount's own argument hold the tensor; the tensor and Python's handle of the
    # storage hold the storage.
    alone = sys.getrefcount(held) <= 3 and _ENGINE._storage_Use_Count(_handle(held)) <= 2
    return alone and held.is_contiguous()


def _handle(tensor: Any) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def _graph_task() -> Generator[None]:
    """Let checkpointed blocks see one backward pass: each is computed again once, not for every tensor it saved."""
    asked = _ENGINE._current_graph_task_id
    _ENGINE._current_graph_task_id = lambda: _GRAPH_TASK
    try:
        yield
    finally:
        _ENGINE._current_graph_task_id = asked


def tensors_of(out: Any) -> list[torch.Tensor]:
    """Return the tensors of an output, also those in attributes of objects, such as a cache of keys and values."""
    found: list[torch.Tensor] = []
    seen: set[int] = set()
    waiting = [out]
    while waiting:
        for leaf in tree_leaves(waiting.pop()):
            if isinstance(leaf, torch.Tensor):
                found.append(leaf)
            elif id(leaf) not in seen and hasattr(leaf, "__dict__") and not isinstance(leaf, type | nn.Module):
                seen.add(id(leaf))
                waiting.append(list(vars(leaf).values()))
    return found


def summed_loss(out: Any) -> torch.Tensor:
    """Return the loss that a model gives itself, else the sum of all its outputs."""
    if isinstance(out, Mapping) and isinstance(out.get("loss"), torch.Tensor):
        return out["loss"]
    floating = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if not floating:
        raise ValueError("no output depends on a parameter that is trained")
    return torch.stack([leaf.float().sum() for leaf in floating]).sum()
