"""Which module of a model is running, in the forward pass, in the backward pass, and where a block is computed again."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from narrowcast.training.doctor.values import Part

__all__ = ["OUTSIDE", "Paths", "Place", "bare", "in_words", "layer_names", "unseen", "wrapped"]

#: What runs outside the model: the loss function.
OUTSIDE = "loss"
_ENGINE: Any = torch._C  # pyright: ignore[reportPrivateUsage]


class Place(NamedTuple):
    """A layer and a pass; in the backward pass also the autograd node's name, and the layer that its gradient goes to."""

    layer: str
    part: Part
    node: str = ""
    towards: str = ""


def wrapped(types: Iterable[type]) -> bool:
    """Return whether an operator was called with a subclass of Tensor: a mode lets those unwrap themselves first."""
    return any(one is not torch.Tensor for one in types)


def unseen() -> AbstractContextManager[object]:
    """Return a context whose operators no dispatch mode sees."""
    return _ENGINE._DisableTorchDispatch()


def bare(model: nn.Module) -> nn.Module:
    """Return a model without the wrapper that sums its gradients over ranks."""
    return bare(model.module) if isinstance(model, DistributedDataParallel) else model


def layer_names(model: nn.Module) -> dict[int, str]:
    """Return names of modules by ``id``, the first of several, without what ``torch.compile`` and checkpointing put in."""
    names = {id(part): name for name, part in reversed(list(bare(model).named_modules(remove_duplicate=False)))}
    return {key: _plain(name) for key, name in names.items()}


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module"))


def in_words(layer: str) -> str:
    """Return what people call a layer."""
    if layer == OUTSIDE:
        return "the loss function"
    return f"layer {layer!r}" if layer else "the model's own code"


class Paths:
    """Follows which module runs; an operator of the backward pass belongs to the module whose operator it differentiates.

    Args:
        model: The model. Modules that it does not hold count as what runs them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = bare(model)
        self._names = layer_names(model)
        self._stack: list[str] = []
        self._forward: dict[int, str] = {}  # by the sequence number of the operator's autograd node

    @contextmanager
    def following(self) -> Generator[None]:
        """Follow modules while the context lasts; modules that raise are left as those that return."""

        def enter(part: nn.Module, args: Any) -> None:
            self._stack.append(self._names[id(part)])

        def leave(part: nn.Module, args: Any, out: Any) -> None:
            self._stack.pop()

        handles = [part.register_forward_pre_hook(enter) for part in self._model.modules()]
        handles += [part.register_forward_hook(leave, always_call=True) for part in self._model.modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._stack.clear()

    @property
    def forward(self) -> str:
        """The innermost module that runs forward, else ``loss``."""
        return self._stack[-1] if self._stack else OUTSIDE

    def follow(self) -> bool:
        """Remember where the operator that runs now belongs, and return whether it runs forward; as :meth:`here`, but quick."""
        if _ENGINE._current_graph_task_id() != -1 and not self._stack:  # inside a module, it is computed again
            return False
        # Autograd has numbered the operator's node by now: the number given out last is its own.
        self._forward.setdefault(_ENGINE._autograd._get_sequence_nr() - 1, self.forward)
        return True

    def here(self) -> Place:
        """Return where the operator that runs now belongs; to be asked below autograd, in a dispatch mode."""
        if self.follow():
            return Place(self.forward, Part.FORWARD)
        node = _ENGINE._current_autograd_node()
        if node is None:
            return Place(OUTSIDE, Part.BACKWARD)
        after = [self._layer(one) for one, _ in node.next_functions if one is not None]
        return Place(self._layer(node), Part.BACKWARD, type(node).__name__, after[0] if after else OUTSIDE)

    def _layer(self, node: Any) -> str:
        return self._forward.get(node._sequence_nr(), OUTSIDE)
