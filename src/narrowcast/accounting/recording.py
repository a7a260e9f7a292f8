"""Watching a run without numbers: every operator once, whatever it is called through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from narrowcast.accounting import grouped
from narrowcast.accounting.counting import VIEWS
from narrowcast.accounting.higher_order import FLEX, alternatives, is_composite, is_higher_order
from narrowcast.accounting.running import Running

__all__ = ["Call", "Recorder", "storage_of", "tensors_in"]


class Call(NamedTuple):
    """An operator that ran.

    Args:
        func: The operator.
        name: Its ATen name without overload, or that of an operator that takes functions.
        args: What it was called with.
        kwargs: Likewise, by name.
        out: What it returned.
    """

    func: Any
    name: str
    args: Sequence[Any]
    kwargs: dict[str, Any]
    out: Any

    @property
    def is_attention_of_functions(self) -> bool:
        """Whether it is ``flex_attention``."""
        return self.name == FLEX

    @property
    def is_view(self) -> bool:
        """Whether it makes another shape of the same bytes."""
        return self.name in VIEWS or (not self.is_attention_of_functions and self.func.is_view)

    @property
    def read(self) -> list[torch.Tensor]:
        """The tensors that it read; of ``flex_attention`` queries, keys and values."""
        operands = self.args[:3] if self.is_attention_of_functions else (*self.args, *self.kwargs.values())
        return tensors_in(operands)

    @property
    def made(self) -> list[torch.Tensor]:
        """The tensors that it returned."""
        return tensors_in([self.out])


class Recorder(TorchDispatchMode, ABC):
    """Sees every operator of a run.

    Operators that are only names for others are seen as those, and of operators that take functions what the functions do.

    Args:
        module: The module that runs.
    """

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.running = Running(module)
        self.phase = "forward"

    @abstractmethod
    def saw(self, call: Call) -> None:
        """Record an operator that has run."""

    @abstractmethod
    def known(self, func: Any) -> Any:
        """Return what an operator gives that is not run; ``NotImplemented`` for all that are."""

    @abstractmethod
    def choose(self, name: str, choices: Sequence[Callable[[], Any]]) -> Any:
        """Run what an operator that takes functions may do, and return the result that the run goes on with.

        Args:
            name: The operator's.
            choices: What it may do, which numbers decide.
        """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_higher_order(func):
            return self._higher_order(func, args, kwargs)
        answer = self.known(func)
        if answer is not NotImplemented:
            return answer
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        out = grouped.call(func, args, kwargs)
        if self.phase == "forward":
            self.running.note()
        self.saw(Call(func, func._schema.name.partition("::")[2], args, kwargs, out))
        return out

    def _higher_order(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        name = func.name()
        if name == FLEX:
            self.running.note()
            out = func(*args, **kwargs)
            self.saw(Call(func, name, args, kwargs, out))
            return out
        with self:
            return self.choose(name, alternatives(name, args))


def tensors_in(values: Iterable[Any]) -> list[torch.Tensor]:
    """Return the tensors among what an operator takes or gives: tensors, lists of them, and all else."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += tensors_in(value)  # pyright: ignore[reportUnknownArgumentType]
    return found


def storage_of(tensor: torch.Tensor) -> int:
    """Return what tells the storage of a tensor from all others that are alive."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]
