"""The protocol's element types, and tensors of them as bytes and as JSON.

Source: Open Inference Protocol, version 2, "Tensor Data Types" and the binary tensor data extension.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from narrowcast.serving.refusals import Refusal

__all__ = [
    "DATATYPES",
    "Datatype",
    "datatype_of",
    "decode_binary",
    "decode_json",
    "encode_binary",
    "encode_json",
    "finite",
]

Array = NDArray[Any]


@dataclass(frozen=True)
class Datatype:
    """One element type.

    Attributes:
        name: As the protocol calls it.
        dtype: As NumPy calls it; elements of BYTES are objects of type ``bytes``.
        json: Python types of the JSON values that stand for an element.
        config: As a model configuration calls it.
        contents: Field of the gRPC message ``InferTensorContents`` that can hold it; empty where only raw bytes can.
        size: Bytes of one element; 0 where elements differ in length.
        limit: Largest finite value of a type that a JSON number may overflow unnoticed, else None.
    """

    name: str
    dtype: np.dtype[Any]
    json: frozenset[type]
    config: str
    contents: str
    size: int
    limit: float | None


#: Up to so many values, Python finds the largest sooner than NumPy.
_FEW = 64
_REAL = frozenset({int, float})
_INTEGER = frozenset({int})

_LIMITS = {
    "FP16": float(np.finfo(np.float16).max),
    "BF16": float(ml_dtypes.finfo(ml_dtypes.bfloat16).max),
    "FP32": float(np.finfo(np.float32).max),
}


def _size(dtype: type) -> int:
    return 0 if dtype is np.object_ else np.dtype(dtype).itemsize


#: All element types by name.
DATATYPES: dict[str, Datatype] = {
    name: Datatype(name, np.dtype(dtype), json, config, contents, _size(dtype), _LIMITS.get(name))
    for name, dtype, json, config, contents in (
        ("BOOL", np.bool_, frozenset({bool}), "TYPE_BOOL", "bool_contents"),
        ("UINT8", np.uint8, _INTEGER, "TYPE_UINT8", "uint_contents"),
        ("UINT16", np.uint16, _INTEGER, "TYPE_UINT16", "uint_contents"),
        ("UINT32", np.uint32, _INTEGER, "TYPE_UINT32", "uint_contents"),
        ("UINT64", np.uint64, _INTEGER, "TYPE_UINT64", "uint64_contents"),
        ("INT8", np.int8, _INTEGER, "TYPE_INT8", "int_contents"),
        ("INT16", np.int16, _INTEGER, "TYPE_INT16", "int_contents"),
        ("INT32", np.int32, _INTEGER, "TYPE_INT32", "int_contents"),
        ("INT64", np.int64, _INTEGER, "TYPE_INT64", "int64_contents"),
        ("FP16", np.float16, _REAL, "TYPE_FP16", ""),
        ("BF16", ml_dtypes.bfloat16, _REAL, "TYPE_BF16", ""),
        ("FP32", np.float32, _REAL, "TYPE_FP32", "fp32_contents"),
        ("FP64", np.float64, _REAL, "TYPE_FP64", "fp64_contents"),
        ("BYTES", np.object_, frozenset({str}), "TYPE_STRING", "bytes_contents"),
    )
}
_BY_DTYPE = {datatype.dtype: datatype for datatype in DATATYPES.values()}
_LENGTH = struct.Struct("<I")


def datatype_of(dtype: np.dtype[Any]) -> Datatype | None:
    """Return the protocol's name for a NumPy element type, or None where it has none."""
    return _BY_DTYPE.get(dtype)


# Bytes ----------------------------------------------------------------------------------------------------------------


def decode_binary(name: str, datatype: Datatype, shape: Sequence[int], data: memoryview) -> Array:
    """Return the tensor that bytes hold: a view of them, except for BYTES.

    Args:
        name: Name of the tensor, for messages.
        datatype: Its element type.
        shape: Its shape; no axis is negative.
        data: Little-endian elements in row-major order, without padding.

    Raises:
        Refusal: The number of bytes does not fit the shape, or the bytes are no such elements.
    """
    count = math.prod(shape)
    if datatype.size == 0:
        return _decode_strings(name, count, data).reshape(shape)
    if len(data) != count * datatype.size:
        raise Refusal(
            400,
            f"input {name!r}: {len(data)} bytes were sent, but {datatype.name} {list(shape)} "
            f"takes {count * datatype.size}",
        )
    if datatype.dtype == np.bool_ and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise Refusal(400, f"input {name!r}: a byte of BOOL is neither 0 nor 1")
    return np.frombuffer(data, datatype.dtype).reshape(shape)


def _decode_strings(name: str, count: int, data: memoryview) -> Array:
    """Return elements that each follow their length in four bytes."""
    if count * _LENGTH.size > len(data):
        raise Refusal(400, f"input {name!r}: {len(data)} bytes cannot hold {count} elements of BYTES")
    elements = np.empty(count, object)
    at = 0
    for index in range(count):
        if at + _LENGTH.size > len(data):
            raise Refusal(400, f"input {name!r}: the data end before element {index} of {count}")
        start = at + _LENGTH.size
        at = start + cast(int, _LENGTH.unpack_from(data, at)[0])
        if at > len(data):
            raise Refusal(400, f"input {name!r}: element {index} reaches past the end of the data")
        elements[index] = bytes(data[start:at])
    if at != len(data):
        raise Refusal(400, f"input {name!r}: {len(data) - at} bytes follow the last of {count} elements")
    return elements


def encode_binary(datatype: Datatype, array: Array) -> bytes | memoryview:
    """Return a tensor as bytes: a view of its own, where they lie in order already."""
    if datatype.size == 0:
        return b"".join(
            part for element in array.flat for text in (_as_bytes(element),) for part in (_LENGTH.pack(len(text)), text)
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _as_bytes(element: bytes | str) -> bytes:
    return element.encode() if isinstance(element, str) else bytes(element)


# JSON -----------------------------------------------------------------------------------------------------------------


def decode_json(name: str, datatype: Datatype, shape: Sequence[int], data: object) -> Array:
    """Return the tensor that a JSON array holds, flat in row-major order or nested like its shape.

    Raises:
        Refusal: The array does not fit the shape, or a value is not of the element type or out of its range.
    """
    flat = _flatten(name, shape, data)
    if len(flat) != math.prod(shape):
        raise Refusal(400, f"input {name!r} has {len(flat)} values, but shape {list(shape)} takes {math.prod(shape)}")
    kinds = set(map(type, flat))
    if not kinds <= datatype.json:
        wrong = next(value for value in flat if type(value) not in datatype.json)
        raise Refusal(400, f"input {name!r}: {_shown(wrong)} is no value of {datatype.name}")
    if datatype.size == 0:
        elements = np.empty(len(flat), object)
        elements[:] = [text.encode() for text in cast(list[str], flat)]
        return elements.reshape(shape)
    try:
        return _cast(flat, datatype).reshape(shape)
    except OverflowError:
        raise Refusal(400, f"input {name!r}: a value is out of the range of {datatype.name}") from None


def _cast(flat: list[Any], datatype: Datatype) -> Array:
    """Return numbers as an array, of which none is out of range.

    Raises:
        OverflowError: One is.
    """
    if datatype.limit is None:
        return np.array(flat, datatype.dtype)  # refuses integers that do not fit by itself
    if len(flat) > _FEW:
        wide = np.array(flat, np.float64)
        if np.abs(wide).max() > datatype.limit:
            raise OverflowError
        return wide.astype(datatype.dtype)
    if flat and (max(flat) > datatype.limit or min(flat) < -datatype.limit):
        raise OverflowError
    return np.array(flat, datatype.dtype)


def _flatten(name: str, shape: Sequence[int], data: object) -> list[object]:
    """Return the values of a flat or nested array; every nested level must be as long as its axis."""
    if not isinstance(data, list):
        raise Refusal(400, f"input {name!r} needs an array in 'data'")
    level = cast(list[object], data)
    if not level or not isinstance(level[0], list):
        return level
    nested = [level]
    for axis, size in enumerate(shape):
        if any(len(part) != size for part in nested):
            raise Refusal(400, f"input {name!r}: axis {axis} of the nested data is not {size} long everywhere")
        level = list(chain.from_iterable(nested))
        if axis + 1 < len(shape):
            if set(map(type, level)) - {list}:
                raise Refusal(400, f"input {name!r}: the data are not nested as deep as shape {list(shape)}")
            nested = cast(list[list[object]], level)
    return level


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def encode_json(name: str, datatype: Datatype, array: Array) -> Array | list[str]:
    """Return a tensor as the JSON serialiser takes it: flat, in row-major order.

    Values that are not finite, which JSON has not, come out as null: see :func:`finite`.

    Raises:
        Refusal: A text is not UTF-8; the client can ask for bytes instead.
    """
    if datatype.size == 0:
        try:
            return [_as_bytes(element).decode() for element in array.flat]
        except UnicodeDecodeError:
            raise Refusal(400, f"output {name!r} is not UTF-8 text; ask for it with 'binary_data'") from None
    if datatype.name == "BF16":
        array = array.astype(np.float32)
    return np.ascontiguousarray(array).reshape(-1)


def finite(datatype: Datatype, array: Array) -> bool:
    """Whether JSON has a number for every element."""
    return datatype.json is not _REAL or bool(np.isfinite(array).all())
