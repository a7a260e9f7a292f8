"""Gradients of one update: their norm, the factor that unscales and clips them, and where they are not finite.

Everything runs on whole lists of tensors (:mod:`narrowcast.training.multi_tensor`), stays on the device and copies
nothing: the norm is taken of the scaled gradients, and unscaling, normalisation and clipping are one multiplication.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from narrowcast.training import multi_tensor

__all__ = ["Broken", "CountingUpdate", "FusedUpdate", "Gradients", "Ranks"]


class Ranks(Protocol):
    """The processes that train together."""

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        ...

    @property
    def world(self) -> int:
        """How many there are."""
        ...

    def maximum(self, tensor: Tensor) -> Tensor:
        """Return the greatest of all ranks' numbers, element by element, without a host synchronisation."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, without a host synchronisation."""
        ...


@runtime_checkable
class FusedUpdate(Protocol):
    """An optimizer that unscales, clips and updates in passes of its own, without a host synchronisation."""

    def update(self, inverse_scale: Tensor | float, clip_norm: float | None) -> tuple[Tensor, Tensor]:
        """Update all parameters that have a gradient, unless a gradient is not finite.

        Args:
            inverse_scale: What gradients are multiplied with first; 0-d if it is a tensor.
            clip_norm: The largest norm of all gradients together, after that; None to leave them.

        Returns:
            The norm before clipping (0-d, FP32) and whether it is finite (0-d, bool), both on the device. Where it is not,
            neither weights nor states have changed.
        """
        ...


@runtime_checkable
class CountingUpdate(FusedUpdate, Protocol):
    """An optimizer that also counts what is not finite, so that nobody needs the gradients to say where numbers broke."""

    def broken(self) -> list[tuple[Tensor, int, int]]:
        """Return the parameters with such gradients in the last update, with their infinite elements and their NaN."""
        ...


class Broken(NamedTuple):
    """A parameter whose gradient is not finite, or has a norm that is not, with how many elements are infinite and NaN.

    Where only its norm was seen, one of them counts for all.
    """

    name: str
    inf: int
    nan: int

    @property
    def kind(self) -> Literal["inf", "nan"]:
        """``nan`` if any element is NaN."""
        return "nan" if self.nan else "inf"


class Gradients:
    """The gradients that parameters hold now.

    Args:
        parameters: Parameters by name, in the order of the forward pass.
        device: Where norms are gathered.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], device: torch.device) -> None:
        self._names = tuple(parameters)
        self._named = {name: one for name, one in parameters.items() if one.grad is not None}
        self._device = device
        self._values = [_stored(one) for one in self._named.values()]
        self._each: Tensor | None = None  # norms

    def __len__(self) -> int:
        return len(self._values)

    @torch.no_grad()
    def norm(self, ranks: Ranks | None = None) -> Tensor:
        """Return the L2 norm of all gradients together, as they stand: 0-d, FP32, on the device.

        Gradients that are sharded over ranks (``DTensor``) count in full on every rank.
        """
        if not self._values:
            return torch.zeros((), dtype=torch.float32, device=self._device)
        self._each = self._norms(self._values)
        sharded = self._sharded() if ranks is not None and ranks.world > 1 else set[int]()
        if ranks is None or not sharded:
            return torch.linalg.vector_norm(self._each)
        if len(sharded) == len(self._values):
            return ranks.sum(self._each.square().sum()).sqrt()
        each = list(zip(self._values, self._each.square().unbind(), strict=True))
        squares = ranks.sum(torch.stack([square for one, square in each if id(one) in sharded]).sum())
        return (squares + torch.stack([square for one, square in each if id(one) not in sharded]).sum()).sqrt()

    def norms(self) -> Tensor:
        """Return the norms that :meth:`norm` took, of all parameters, 0 where there is no gradient: FP32, [parameters]."""
        each = self._each if self._each is not None else torch.empty(0, dtype=torch.float32, device=self._device)
        if len(self._named) == len(self._names):
            return each
        found = dict(zip(self._named, each.unbind(), strict=True))
        nothing = torch.zeros((), dtype=torch.float32, device=self._device)
        return torch.stack([found.get(name, nothing) for name in self._names])

    def counted(self, optimizer: CountingUpdate) -> Callable[[], tuple[Broken, ...]]:
        """Return what asks an optimizer which gradients were not finite in its last update, in the order of the backward pass.

        No gradient is kept by it.
        """
        names = {id(one): name for name, one in self._named.items()}

        def count() -> tuple[Broken, ...]:
            found = {id(one): (inf, nan) for one, inf, nan in optimizer.broken()}
            return tuple(Broken(names[key], *found[key]) for key in reversed(list(names)) if key in found)

        return count

    @torch.no_grad()
    def multiply(self, factor: Tensor | float) -> None:
        """Multiply all gradients in place; a factor of exactly 1.0 touches nothing."""
        if isinstance(factor, float) and factor == 1.0:
            return
        for device, values in _by_device(self._values).items():
            multi_tensor.multiply_(values, factor.to(device) if isinstance(factor, Tensor) else factor)

    @torch.no_grad()
    def broken(self) -> tuple[Broken, ...]:
        """Return the parameters whose gradients are not finite, in the order of the backward pass; waits for the device."""
        if not self._values:
            return ()
        found: list[Broken] = []
        for name, values, finite in zip(
            self._named, self._values, self._norms(self._values).isfinite().tolist(), strict=True
        ):
            if not finite:
                found.append(Broken(name, int(values.isinf().sum()), int(values.isnan().sum())))
        return tuple(reversed(found))

    def _norms(self, tensors: list[Tensor]) -> Tensor:
        """Return the norm of each tensor, FP32."""
        groups = _by_device(tensors)
        if len(groups) == 1:
            return torch.stack(multi_tensor.norms(tensors)).to(self._device, torch.float32)
        norms = {
            id(one): norm
            for values in groups.values()
            for one, norm in zip(values, multi_tensor.norms(values), strict=True)
        }
        return torch.stack([norms[id(one)].to(self._device, torch.float32) for one in tensors])

    def _sharded(self) -> set[int]:
        """Return the ids of the stored numbers that are a part of what all ranks hold together."""
        from torch.distributed.tensor import DTensor

        return {
            id(values)
            for one, values in zip(self._named.values(), self._values, strict=True)
            if isinstance(one, DTensor) and any(place.is_shard() for place in one.placements)
        }


def _by_device(tensors: list[Tensor]) -> dict[torch.device, list[Tensor]]:
    groups: dict[torch.device, list[Tensor]] = {}
    for one in tensors:
        groups.setdefault(one.device, []).append(one)
    return groups


def _stored(parameter: torch.nn.Parameter) -> Tensor:
    """Return the numbers of a parameter's gradient that this process holds, as a view."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.is_sparse:
        parameter.grad = gradient = gradient.coalesce()
        return gradient._values()
    if type(gradient) is Tensor:
        return gradient
    from torch.distributed.tensor import DTensor

    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
