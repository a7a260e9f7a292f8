"""Sees every operator of a replay, and where the first number that is not finite came from.

An operator *bears* a fault when its result is not finite though its inputs are, or is NaN though none of them is. Infinities
that the program asks for (masks filled with minus infinity) are no faults; NaN that comes of them is one. Each fault's
offspring remembers it, so that the loss or a gradient leads back to where it began, past infinities that did no harm.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from narrowcast.training.doctor.paths import Paths, Place, wrapped
from narrowcast.training.doctor.values import Range
from narrowcast.training.random_state import random_state, set_random_state

__all__ = ["Fault", "Maker", "Sentinel", "dtype_name", "range_of"]

_log = logging.getLogger(__name__)
_MOST = 64  # faults that are described; later ones are known by their offspring alone
_OTHERS = ("c10d", "_c10d", "fsdp")  # what they bring may have broken on another rank
_BLANK = ("empty", "resize", "set_")  # their results hold whatever was there


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without the module's."""
    return str(dtype).removeprefix("torch.")


_DTYPES = {dtype_name(one): one for one in vars(torch).values() if isinstance(one, torch.dtype)}
#: A dtype, by its name in JSON.
_DType = Annotated[
    torch.dtype,
    PlainValidator(lambda given: _DTYPES[given] if isinstance(given, str) else given),
    PlainSerializer(dtype_name, return_type=str),
]


@dataclass(frozen=True)
class Maker:
    """The operator that made an input: its name, its numbers among the arguments, and its result's dtype."""

    operator: str
    scalars: tuple[float, ...]
    dtype: _DType


class _Call(NamedTuple):
    """An operator that has run.

    Attributes:
        func: The operator.
        place: Layer and pass.
        number: How many times it ran there before.
        arguments: ``args`` and ``kwargs``, as they are after it.
        before: The floating-point tensors among them, as they were before it.
        maker: What its result's readers are told of it.
    """

    func: Any
    place: Place
    number: int
    arguments: tuple[Any, Any]
    before: list[Tensor]
    maker: Maker


class Fault(BaseModel):
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

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    operator: str
    place: Place
    call: int
    kind: str
    dtype: _DType
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
        out = func(*args, **kwargs)
        name = str(func.overloadpacket)
        results = _floats(out)
        maker = Maker(name, _scalars((args, kwargs)), results[0].dtype if results else torch.float32)
        call = _Call(func, place, self._calls[name, place], (args, kwargs), before, maker)
        self._calls[name, place] += 1
        if self._zeros:
            self._look_for_zeros(call, results)
        elif name.startswith(_OTHERS):
            self._origins.update({_storage(one): None for one in (*given, *results) if not _finite(one)})
        elif not name.split(".")[-1].startswith(_BLANK):
            self._look(call, results)
        for result in results:
            self._makers[_storage(result)] = maker
        return out

    def _look(self, call: _Call, results: list[Tensor]) -> None:
        """Note which results are not finite, and which memory is finite again."""
        broken = [result for result in results if not _finite(result)]
        if broken:
            self._trace(call, broken)
        kept = {_storage(one) for one in (*call.before, *broken)}
        for result in results:
            if _storage(result) not in kept:
                self._origins.pop(_storage(result), None)  # its memory held something else before

    def _trace(self, call: _Call, broken: list[Tensor]) -> None:
        """Note where results that are not finite come from, or that they begin here."""
        pairs = zip(_floats(call.arguments), call.before, strict=True)
        spoilt = [(now, before) for now, before in pairs if not _finite(before)]
        known = [self._origins.get(_storage(now)) for now, _ in spoilt]
        earliest = min((number for number in known if number is not None), default=None)
        came = any(bool(before.isnan().any()) for _, before in spoilt)
        asked = bool(spoilt) or any(not math.isfinite(number) for number in call.maker.scalars)
        for result in broken:
            nan = bool(result.isnan().any())
            if earliest is not None or (came if nan else asked):  # of a fault, of the model or the data, or asked for
                self._origins[_storage(result)] = earliest
            else:
                self._bear("nan" if nan else "inf", call, result)

    def _look_for_zeros(self, call: _Call, results: list[Tensor]) -> None:
        """Note an operator of the backward pass whose result is all zero though its inputs are not, and its offspring."""
        empty = [result for result in results if result.numel() and not bool(result.any())]
        if not call.place.node or not call.before or not empty:
            return
        pairs = zip(_floats(call.arguments), call.before, strict=True)
        parents = [now for now, before in pairs if not before.numel() or not bool(before.any())]
        known = [number for one in parents if (number := self._origins.get(_storage(one))) is not None]
        for result in empty:
            if known:
                self._origins[_storage(result)] = min(known)
            elif not parents:
                self._bear("zero", call, result)

    def _bear(self, kind: str, call: _Call, result: Tensor) -> None:
        self._origins[_storage(result)] = len(self.faults)
        if len(self.faults) >= _MOST:
            return
        ranges = [range_of(f"input {number}", one) for number, one in enumerate(call.before)]
        self.faults.append(
            Fault(
                operator=call.maker.operator,
                place=call.place,
                call=call.number,
                kind=kind,
                dtype=result.dtype,
                inputs=(*ranges, range_of("result", result)),
                scalars=call.maker.scalars,
                wide=_wide(call),
                makers=tuple(self._makers.get(_storage(one)) for one in _floats(call.arguments)),
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


def _wide(call: _Call) -> float | None:
    """Return the largest magnitude of an operator's result in float64; None where it does not run in it."""
    if any(one.is_complex() for one in call.before):
        return None
    copies = iter([one.double() for one in call.before])
    args, kwargs = tree_map_only(Tensor, lambda one: next(copies) if _floats(one) else one, call.arguments)
    kwargs = {
        key: torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value
        for key, value in kwargs.items()
    }
    states = random_state()
    try:
        results = _floats(call.func(*args, **kwargs))
    except (RuntimeError, NotImplementedError, TypeError) as error:  # what kernels without float64 raise
        _log.debug("%s does not run in float64: %s", call.maker.operator, error)
        return None
    finally:
        set_random_state(states)
    sizes = [one.abs().max() for one in results if one.numel()]
    return float(torch.stack([one.double() for one in sizes]).max()) if sizes else None
