"""The protocol's element types, and tensors of them as bytes.

Source: Open Inference Protocol, version 2, "Tensor Data Types" and the binary tensor data extension.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

__all__ = ["DATATYPES", "LENGTH", "REAL", "Datatype", "as_bytes", "datatype_of", "encode_binary"]

Array = NDArray[Any]

#: Types of JSON values that stand for a real number.
REAL = frozenset({int, float})
_INTEGER = frozenset({int})
#: Stands before each element of BYTES.
LENGTH = struct.Struct("<I")


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
        limit: Smallest magnitude that is rounded to infinity, of a type that a JSON number may overflow unnoticed.
    """

    name: str
    dtype: np.dtype[Any]
    json: frozenset[type]
    config: str
    contents: str
    size: int
    limit: float | None


def _limit(info: Any) -> float:
    """Return the middle between the largest number of a type and the next one, which it does not have (IEEE 754, 4.3.1)."""
    return 2.0**info.maxexp - 2.0 ** (info.maxexp - info.nmant - 2)


_LIMITS = {
    "FP16": _limit(np.finfo(np.float16)),
    "BF16": _limit(ml_dtypes.finfo(ml_dtypes.bfloat16)),
    "FP32": _limit(np.finfo(np.float32)),
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
        ("FP16", np.float16, REAL, "TYPE_FP16", ""),
        ("BF16", ml_dtypes.bfloat16, REAL, "TYPE_BF16", ""),
        ("FP32", np.float32, REAL, "TYPE_FP32", "fp32_contents"),
        ("FP64", np.float64, REAL, "TYPE_FP64", "fp64_contents"),
        ("BYTES", np.object_, frozenset({str}), "TYPE_STRING", "bytes_contents"),
    )
}
_BY_DTYPE = {datatype.dtype: datatype for datatype in DATATYPES.values()}


def datatype_of(dtype: np.dtype[Any]) -> Datatype | None:
    """Return the protocol's name for a NumPy element type, or None where it has none."""
    return _BY_DTYPE.get(dtype)


def encode_binary(datatype: Datatype, array: Array) -> bytes | memoryview:
    """Return a tensor as bytes: a view of its own, where they lie in order already."""
    if datatype.size == 0:
        return b"".join(
            part for element in array.flat for text in (as_bytes(element),) for part in (LENGTH.pack(len(text)), text)
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def as_bytes(element: bytes | str) -> bytes:
    """Return an element of BYTES; texts are UTF-8.

    Raises:
        TypeError: It is neither text nor bytes.
    """
    return element.encode() if isinstance(element, str) else memoryview(element).tobytes()
