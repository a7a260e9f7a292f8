"""Sees every operator of a replay, and where the first number that is not finite came from.

An operator *bears* a fault when its result is not finite though its inputs are, or is NaN though none of them is. Infinities
that the program asks for (masks filled with minus infinity) are no faults; NaN that comes of them is one. Each fault's
offspring remembers it, so that the loss or a gradient leads back to where it began, past infinities that did no harm.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from narrowcast.training.doctor.paths import Paths, Place, wrapped
from narrowcast.training.doctor.record import Range

__all__ = ["Fault", "Maker", "Sentinel", "dtype_name", "range_of"]

_MOST = 64  # faults that are described; later ones are known by their offspring alone
_OTHERS = ("c10d", "_c10d", "fsdp")  # what they bring may have broken on another rank
_BLANK = ("empty", "resize", "set_")  # their results hold whatever was there


@dataclass(frozen=True)
class Maker:
    """The operator that made an input: its name, its numbers among the arguments, and its result's dtype."""

    operator: str
    scalars: tuple[float, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Fault:
    """An operator whose result is the first of its line that is not finite (or that is all zero).

    Attributes:
        operator: PyTorch's name, without its overload: ``aten.addmm``.
        place: Layer and pass.
        call: How many times the operator ran there before.
        kind: ``inf``, ``nan`` or ``zero``.
        dtype: Of the result.
        inputs: The tensors that went in, then the result.
        scalars: Numbers among the arguments.
        wide: The largest magnitude of the same in float64; None where it cannot be computed.
        makers: Who made the tensors that went in, as far as it was seen.
    """

    operator: str
    place: Place
    call: int
    kind: str
    dtype: torch.dtype
    inputs: tuple[Range, ...]
    scalars: tuple[float, ...]
    wide: float | None
    makers: tuple[Maker | None, ...]

    @property
    def result(self) -> Range:
        """What came out."""
        return self.inputs[-1]

    @property
    def overflows(self) -> bool:
        """Whether only the format is too narrow: float64 holds the result."""
        return self.wide is not None and math.isfinite(self.wide)


class Sentinel(TorchDispatchMode):
    """A dispatch mode that finds faults; every operator waits for its result, so it is for replays alone.

    Args:
        paths: Where operators run.
        zeros: Whether to look for gradients that become zero in the backward pass, in place of what is not finite.
    """

    def __init__(self, paths: Paths, *, zeros: bool = False) -> None:
        super().__init__()
        self.faults: list[Fault] = []
        self._paths = paths
        self._zeros = zeros
        self._calls: Counter[tuple[str, Place]] = Counter()
        self._origins: dict[int, int | None] = {}  # storage -> number of the fault; None: asked for by the program
        self._makers: dict[int, Maker] = {}

    def origin(self, tensors: Iterable[Tensor]) -> Fault | None:
        """Return the earliest fault that tensors descend from."""
        numbers = [self._origins.get(_storage(one)) for one in tensors]
        known = [number for number in numbers if number is not None and number < len(self.faults)]
        return self.faults[min(known)] if known else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if wrapped(types):
            return NotImplemented  # a subclass of Tensor goes on with plain tensors, which are seen
        place = self._paths.here()
        given = _floats((args, kwargs))
        before = [one.clone() for one in given] if func._schema.is_mutable else given
        spoilt = [not _finite(one) for one in before]
        out = func(*args, **kwargs)
        name = str(func.overloadpacket)
        call = self._calls[name, place]
        self._calls[name, place] += 1
        results = _floats(out)
        maker = Maker(name, _scalars((args, kwargs)), results[0].dtype if results else torch.float32)
        if self._zeros:
            self._look_for_zeros(func, place, call, (args, kwargs), before, results, maker)
        elif name.startswith(_OTHERS):
            self._origins.update({_storage(one): None for one in (*given, *results) if not _finite(one)})
        elif not name.split(".")[-1].startswith(_BLANK):
            for result in results:
                self._look(func, place, call, (args, kwargs), before, spoilt, result, maker)
        for result in results:
            self._makers[_storage(result)] = maker
        return out

    def _look(
        self,
        func: Any,
        place: Place,
        call: int,
        arguments: Any,
        before: Sequence[Tensor],
        spoilt: Sequence[bool],
        result: Tensor,
        maker: Maker,
    ) -> None:
        key = _storage(result)
        if _finite(result):
            if key not in {_storage(one) for one in before}:
                self._origins.pop(key, None)
            return
        parents = [one for one, bad in zip(_floats(arguments), spoilt, strict=True) if bad]
        known = [self._origins.get(_storage(one)) for one in parents]
        earliest = min((number for number in known if number is not None), default=None)
        if earliest is not None:
            self._origins[key] = earliest
            return
        nan = bool(result.isnan().any())
        asked = any(not math.isfinite(number) for number in maker.scalars) or bool(parents)
        if not nan and asked:
            self._origins[key] = None
            return
        if nan and any(bool(one.isnan().any()) for one, bad in zip(before, spoilt, strict=True) if bad):
            self._origins[key] = None  # NaN that came with the model or the data
            return
        self._bear("nan" if nan else "inf", func, place, call, arguments, before, result, maker)

    def _look_for_zeros(
        self,
        func: Any,
        place: Place,
        call: int,
        arguments: Any,
        before: Sequence[Tensor],
        results: Sequence[Tensor],
        maker: Maker,
    ) -> None:
        """Note an operator of the backward pass whose result is all zero though each of its inputs holds something else."""
        if not place.node or not before or any(not one.numel() or not bool(one.any()) for one in before):
            return
        for result in results:
            if result.numel() and not bool(result.any()):
                self._bear("zero", func, place, call, arguments, before, result, maker)

    def _bear(
        self,
        kind: str,
        func: Any,
        place: Place,
        call: int,
        arguments: Any,
        before: Sequence[Tensor],
        result: Tensor,
        maker: Maker,
    ) -> None:
        self._origins[_storage(result)] = len(self.faults)
        if len(self.faults) >= _MOST:
            return
        ranges = [range_of(f"input {number}", one) for number, one in enumerate(before)]
        self.faults.append(
            Fault(
                operator=str(func.overloadpacket),
                place=place,
                call=call,
                kind=kind,
                dtype=result.dtype,
                inputs=(*ranges, range_of("result", result)),
                scalars=maker.scalars,
                wide=_wide(func, arguments, before),
                makers=tuple(self._makers.get(_storage(one)) for one in _floats(arguments)),
            )
        )


def range_of(name: str, tensor: Tensor) -> Range:
    """Return a tensor in numbers; waits for its device."""
    numbers = tensor.detach().abs() if tensor.is_complex() else tensor.detach()
    numbers = numbers if numbers.dtype is torch.float64 else numbers.float()
    finite = numbers[numbers.isfinite()]
    away = finite[finite != 0].abs()
    return Range(
        name=name,
        dtype=dtype_name(tensor.dtype),
        shape=tuple(tensor.shape),
        low=float(finite.min()) if finite.numel() else None,
        high=float(finite.max()) if finite.numel() else None,
        smallest=float(away.min()) if away.numel() else None,
        zeros=finite.numel() - away.numel(),
        infinite=int(numbers.isinf().sum()),
        nan=int(numbers.isnan().sum()),
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without the module's."""
    return str(dtype).removeprefix("torch.")


def _floats(values: Any) -> list[Tensor]:
    return [
        one
        for one in tree_leaves(values)
        if isinstance(one, Tensor) and (one.is_floating_point() or one.is_complex()) and one.layout is torch.strided
    ]


def _scalars(values: Any) -> tuple[float, ...]:
    return tuple(float(one) for one in tree_leaves(values) if isinstance(one, float))


def _finite(tensor: Tensor) -> bool:
    if tensor.dtype.itemsize == 1:  # the FP8 formats have no kernels of their own
        tensor = tensor.float()
    return bool(tensor.isfinite().all())


def _storage(tensor: Tensor) -> int:
    storage: Any = tensor.untyped_storage()
    return storage._cdata


def _wide(func: Any, arguments: Any, before: Sequence[Tensor]) -> float | None:
    """Return the largest magnitude of an operator's result in float64; None where it does not run in it."""
    if any(one.is_complex() for one in before):
        return None
    copies = iter([one.double() for one in before])
    args, kwargs = tree_map_only(Tensor, lambda one: next(copies) if _floats(one) else one, arguments)
    kwargs = {
        key: torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value
        for key, value in kwargs.items()
    }
    try:
        results = _floats(func(*args, **kwargs))
    except (RuntimeError, NotImplementedError, TypeError):  # not every kernel takes float64
        return None
    sizes = [one.abs().max() for one in results if one.numel()]
    return float(torch.stack([one.double() for one in sizes]).max()) if sizes else None
