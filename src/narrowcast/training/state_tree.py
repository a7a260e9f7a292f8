"""Nested states taken apart into a JSON tree and named tensors, and put together again, without pickle.

A state holds dictionaries (any of the following may be a key), lists, tuples, strings, None, booleans, integers of any
size, floats (infinite and NaN too), tensors of every dtype, NumPy arrays and scalars, dtypes, ``torch.Size`` and counters.
Each comes back with its own type and, bit for bit, its own value; other kinds of mappings come back as dictionaries. JSON
has fewer types: what it lacks is an object with one marked key, such as ``{"$tuple": [...]}``.

Tensors that are the same view of the same storage, whole or sharded, are stored once and come back as one tensor (tied
weights). Views that only overlap are stored by value, each for itself. Strides come back where they are dense (channels last).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import numpy as np
import torch
from torch import nn

from narrowcast.errors import TrainingError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["Leaf", "Packed", "is_sharded", "leaves", "pack", "unpack"]

_MARK = "$"
_DEEPEST = 100  # nested containers; a state that goes deeper holds itself
_EXACT = (
    1 << 53
)  # beyond it integers are hexadecimal: other readers of JSON round them, and Python limits decimal digits

#: Dtypes that every safetensors reader names.
_NAMED = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
#: Dtypes that are stored as their bytes.
_AS_BYTES = (
    *(torch.uint64, torch.uint32, torch.uint16, torch.complex128, torch.complex64, torch.complex32),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*_NAMED, *_AS_BYTES)}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PLAIN_TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer)

_ALLOWED = (
    "dictionaries, lists, tuples, strings, numbers, None, dense tensors, NumPy arrays of numbers, dtypes and counters"
)


@dataclass(frozen=True)
class Leaf:
    """What the tree says of a tensor.

    Attributes:
        name: Its name among the tensors.
        dtype: Its dtype, which may be stored as bytes.
        shape: Its shape, of all ranks together where it is sharded.
        stride: Its strides where it is dense but not contiguous.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype in the file."""
        return torch.uint8 if self.dtype in _AS_BYTES else self.dtype

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in the file."""
        return (math.prod(self.shape) * self.dtype.itemsize,) if self.dtype in _AS_BYTES else self.shape

    def to_json(self) -> dict[str, Any]:
        """Return what JSON holds beside the mark."""
        strides = {} if self.stride is None else {"stride": list(self.stride)}
        return {"name": self.name, "dtype": _NAMES[self.dtype], "shape": list(self.shape), **strides}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Leaf:
        """Return the leaf that JSON describes."""
        stride = tuple(stored["stride"]) if "stride" in stored else None
        return cls(stored["name"], _DTYPES[stored["dtype"]], tuple(stored["shape"]), stride)


@dataclass(frozen=True)
class Packed:
    """A state taken apart.

    Attributes:
        tree: JSON without NaN and infinity; tensors are objects that name them.
        tensors: By name, as a safetensors file holds them: contiguous, in dtypes that it has, none sharing memory with
            another. Sharded tensors (``DTensor``) are as they were.
    """

    tree: Any
    tensors: dict[str, torch.Tensor]


def pack(state: Any) -> Packed:
    """Return a state as JSON and tensors; tensors are not copied where they need not be.

    Raises:
        TrainingError: The state holds something that is neither a number nor a container of them, such as an object.
    """
    packer = _Packer()
    return Packed(packer.encode(state, ()), packer.tensors)


def unpack(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return the state that :func:`pack` took apart.

    Raises:
        TrainingError: The tree is none that :func:`pack` made, or a tensor is missing.
    """
    try:
        return _Unpacker(tensors).decode(tree)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise TrainingError(f"the state's tree does not fit its tensors: {error!r}") from error


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Leaf]]:
    """Go through the tensors that a tree names, with the keys that lead to them; shared ones come as often as held."""
    if isinstance(tree, list):
        for place, part in enumerate(cast("list[Any]", tree)):
            yield from leaves(part, (*path, str(place)))
    elif isinstance(tree, dict):
        for key, part in cast("dict[str, Any]", tree).items():
            if key in _LEAVES:
                yield path, Leaf.from_json(part)
            elif key in ("$dict", "$counter"):
                for name, value in part:
                    yield from leaves(value, (*path, str(name)))
            else:
                yield from leaves(part, path if key.startswith(_MARK) else (*path, key))


class _Packer:
    """Goes through a state once; keeps the names of the tensors that it saw."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._views: dict[Any, Leaf] = {}
        self._storages: set[Any] = set()

    def encode(self, value: Any, path: tuple[str, ...]) -> Any:
        if len(path) > _DEEPEST:
            raise TrainingError(f"state at {_place(path[:3])} nests deeper than {_DEEPEST}", allowed="no cycles")
        for kinds, encode in self._by_class:
            if isinstance(value, kinds):
                return encode(self, value, path)
        encode = self._by_type.get(type(value))
        if encode is None:
            raise _refused(f"an object of class {type(value).__name__}", path)
        return encode(self, value, path)

    def _same(self, value: Any, path: tuple[str, ...]) -> Any:
        return value

    def _int(self, value: int, path: tuple[str, ...]) -> Any:
        return value if abs(value) <= _EXACT else {"$int": hex(value)}

    def _float(self, value: float, path: tuple[str, ...]) -> Any:
        return value if math.isfinite(value) else {"$float": repr(value)}

    def _list(self, value: list[Any] | tuple[Any, ...], path: tuple[str, ...]) -> list[Any]:
        return [self.encode(part, (*path, str(place))) for place, part in enumerate(value)]

    def _tuple(self, value: tuple[Any, ...], path: tuple[str, ...]) -> Any:
        return {"$tuple": self._list(value, path)}

    def _size(self, value: torch.Size, path: tuple[str, ...]) -> Any:
        return {"$size": list(value)}

    def _dtype(self, value: torch.dtype, path: tuple[str, ...]) -> Any:
        if value not in _NAMES:
            raise _refused(f"dtype {value}", path)
        return {"$dtype": _NAMES[value]}

    def _mapping(self, value: Mapping[Any, Any], path: tuple[str, ...]) -> Any:
        if all(type(key) is str and not key.startswith(_MARK) for key in value):
            return {key: self.encode(part, (*path, key)) for key, part in value.items()}
        return {"$dict": self._pairs(value, path)}

    def _counter(self, value: Counter[Any], path: tuple[str, ...]) -> Any:
        return {"$counter": self._pairs(value, path)}

    def _pairs(self, value: Mapping[Any, Any], path: tuple[str, ...]) -> list[Any]:
        return [[self.encode(key, (*path, "key")), self.encode(part, (*path, str(key)))] for key, part in value.items()]

    def _array(self, value: np.ndarray | np.generic, path: tuple[str, ...]) -> Any:
        mark = "$array" if isinstance(value, np.ndarray) else "$number"
        try:
            tensor = torch.from_numpy(np.array(value))  # a copy: torch warns of arrays that it must not write
        except TypeError as error:
            raise _refused(f"a NumPy value of dtype {value.dtype}", path) from error
        return {mark: self._store(tensor, path).to_json()}

    def _tensor(self, value: torch.Tensor, path: tuple[str, ...]) -> Any:
        return {"$tensor": self._leaf(value.detach(), path).to_json()}

    def _leaf(self, value: torch.Tensor, path: tuple[str, ...]) -> Leaf:
        if value.layout != torch.strided or value.device.type == "meta" or value.dtype not in _NAMES:
            raise _refused(f"a tensor of dtype {value.dtype}, layout {value.layout} on {value.device}", path)
        if is_sharded(value):
            if value.dtype in _AS_BYTES:
                raise _refused(f"a sharded tensor of dtype {value.dtype}", path)
            return self._sharded(value, path)
        if type(value) not in _PLAIN_TENSORS:
            raise _refused(f"a tensor of class {type(value).__name__}", path)
        if value.numel() == 0:
            return self._store(value, path)
        view = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if view not in self._views:
            self._views[view] = self._store(value, path)
        return self._views[view]

    def _sharded(self, value: DTensor, path: tuple[str, ...]) -> Leaf:
        local = value.to_local()
        storage = local.untyped_storage().data_ptr()  # the part of a rank may be empty, which has no address of its own
        place = (local.device, storage)
        view = (*place, local.storage_offset(), local.dtype, tuple(local.shape), local.stride(), tuple(value.shape))
        if storage and view in self._views:
            return self._views[view]
        stored = value.clone() if storage and place in self._storages else value
        self._storages.add(place)
        leaf = self._named(stored, Leaf("", value.dtype, tuple(value.shape)), path)
        self._views[view] = leaf
        return leaf

    def _store(self, value: torch.Tensor, path: tuple[str, ...]) -> Leaf:
        stride = None if value.is_contiguous() or not _is_dense(value) else value.stride()
        leaf = Leaf("", value.dtype, tuple(value.shape), stride)
        plain = value.resolve_conj().resolve_neg().contiguous()
        storage = plain.untyped_storage()
        place = (plain.device, storage.data_ptr())
        if plain.numel() and (place in self._storages or storage.nbytes() != plain.nbytes):
            plain = plain.clone()
        self._storages.add(place)
        return self._named(plain.reshape(-1).view(torch.uint8) if value.dtype in _AS_BYTES else plain, leaf, path)

    def _named(self, stored: torch.Tensor, leaf: Leaf, path: tuple[str, ...]) -> Leaf:
        name = "/".join(path) or "state"
        while name in self.tensors or name == "__metadata__":  # which the file format keeps for itself
            name += "~"
        self.tensors[name] = stored
        return Leaf(name, leaf.dtype, leaf.shape, leaf.stride)

    _by_class: tuple[tuple[Any, Callable[..., Any]], ...] = (
        (torch.Tensor, _tensor),
        ((np.ndarray, np.generic), _array),
        (Counter, _counter),
        (Mapping, _mapping),
    )
    _by_type: Mapping[type, Callable[..., Any]] = {
        type(None): _same,
        bool: _same,
        str: _same,
        int: _int,
        float: _float,
        list: _list,
        tuple: _tuple,
        torch.Size: _size,
        torch.dtype: _dtype,
    }


class _Unpacker:
    """Builds a state; a name that comes twice gives the same tensor."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._made: dict[str, torch.Tensor] = {}

    def decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.decode(part) for part in cast("list[Any]", value)]
        if not isinstance(value, dict):
            return value
        stored = cast("dict[str, Any]", value)
        if len(stored) == 1:
            (mark, content) = next(iter(stored.items()))
            if mark.startswith(_MARK):
                return self._marked[mark](self, content)
        return {key: self.decode(part) for key, part in stored.items()}

    def _pairs(self, content: list[Any]) -> dict[Any, Any]:
        return {self.decode(key): self.decode(part) for key, part in content}

    def _tensor(self, content: Mapping[str, Any]) -> torch.Tensor:
        leaf = Leaf.from_json(content)
        if leaf.name not in self._made:
            self._made[leaf.name] = _restored(self._tensors[leaf.name], leaf)
        return self._made[leaf.name]

    def _array(self, content: Mapping[str, Any]) -> np.ndarray:
        return self._tensor(content).cpu().numpy()

    _marked: Mapping[str, Callable[[Any, Any], Any]] = {
        "$tuple": lambda self, content: tuple(self.decode(content)),
        "$int": lambda self, content: int(content, 16),
        "$float": lambda self, content: float(content),
        "$size": lambda self, content: torch.Size(content),
        "$dtype": lambda self, content: _DTYPES[content],
        "$dict": _pairs,
        "$counter": lambda self, content: Counter(self._pairs(content)),
        "$tensor": _tensor,
        "$array": _array,
        "$number": lambda self, content: self._array(content)[()],
    }


_LEAVES = frozenset({"$tensor", "$array", "$number"})


def _restored(stored: torch.Tensor, leaf: Leaf) -> torch.Tensor:
    """Return a tensor as it was before it was stored."""
    if is_sharded(stored):
        return stored
    if stored.dtype != leaf.dtype:
        stored = stored.view(leaf.dtype)
    stored = stored.reshape(leaf.shape)
    if leaf.stride is None:
        return stored
    return torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device=stored.device).copy_(stored)


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether ranks hold parts of a tensor (``DTensor``)."""
    if type(tensor) in _PLAIN_TENSORS:
        return False
    from torch.distributed.tensor import DTensor  # loads torch's distributed part

    return isinstance(tensor, DTensor)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill a block without holes or overlaps, in any order of the axes."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _place(path: tuple[str, ...]) -> str:
    return "/".join(path) or "its root"


def _refused(what: str, path: tuple[str, ...]) -> TrainingError:
    return TrainingError(
        f"the state at {_place(path)} is {what}, which a checkpoint without pickle cannot hold",
        allowed=_ALLOWED,
        next_step="leave it out of the state and build it again when training is resumed",
    )
