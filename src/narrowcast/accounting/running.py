"""Which module is running, in forward and in backward."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["Running"]

_AUTOGRAD: Any = torch._C  # pyright: ignore[reportPrivateUsage]


class Running:
    """Follows which module of a model is running; a gradient belongs to the module whose result it is the gradient of.

    Args:
        module: The model; a module that it has under several names goes by the first.
    """

    def __init__(self, module: nn.Module) -> None:
        self._names = {id(part): name for name, part in reversed(list(module.named_modules(remove_duplicate=False)))}
        self._stack: list[str] = []
        self._forward: dict[int, str] = {}  # by the sequence number of the operator's autograd node

    @property
    def path(self) -> str:
        """The innermost module that is running; empty outside all."""
        return self._stack[-1] if self._stack else ""

    def where(self) -> str:
        """Return the same for an error."""
        return f"layer {self.path!r}" if self.path else "the model"

    @contextmanager
    def following(self) -> Generator[None]:
        """Follow the modules that run forward."""

        def enter(part: nn.Module, args: Any) -> None:
            self._stack.append(self._names.get(id(part), self.path))  # a branch of torch.cond belongs to what runs it

        def leave(part: nn.Module, args: Any, out: Any) -> None:
            self._stack.pop()

        handles = [
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def note(self) -> None:
        """Note that an operator ran forward: the autograd node made last is its own, or that of one around it."""
        self._forward.setdefault(_AUTOGRAD._autograd._get_sequence_nr() - 1, self.path)

    def enter_node(self, number: int | None) -> None:
        """Say that the autograd node with this sequence number runs next; None for what belongs to no module."""
        self._stack = [self._forward.get(number, "")] if number is not None else []
