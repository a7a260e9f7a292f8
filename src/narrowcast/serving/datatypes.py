"""The protocol's element types, and tensors of them as bytes and as JSON.

Source: Open Inference Protocol, version 2, "Tensor Data Types" and the binary tensor data extension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from narrowcast.oip.datatypes import DATATYPES, LENGTH, REAL, Datatype, as_bytes, datatype_of, encode_binary
from narrowcast.serving.refusals import Refusal, shown

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


#: Up to so many values, Python finds the largest sooner than NumPy.
_FEW = 64


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
    if datatype.name == "BOOL" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise Refusal(400, f"input {name!r}: a byte of BOOL is neither 0 nor 1")
    return np.frombuffer(data, datatype.dtype).reshape(shape)


def _decode_strings(name: str, count: int, data: memoryview) -> Array:
    """Return elements that each follow their length in four bytes."""
    if count * LENGTH.size > len(data):
        raise Refusal(400, f"input {name!r}: {len(data)} bytes cannot hold {count} elements of BYTES")
    elements = np.empty(count, object)
    at = 0
    for index in range(count):
        if at + LENGTH.size > len(data):
            raise Refusal(400, f"input {name!r}: the data end before element {index} of {count}")
        start = at + LENGTH.size
        at = start + cast(int, LENGTH.unpack_from(data, at)[0])
        if at > len(data):
            raise Refusal(400, f"input {name!r}: element {index} reaches past the end of the data")
        elements[index] = bytes(data[start:at])
    if at != len(data):
        raise Refusal(400, f"input {name!r}: {len(data) - at} bytes follow the last of {count} elements")
    return elements


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
        raise Refusal(400, f"input {name!r}: {shown(wrong)} is no value of {datatype.name}")
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
    if len(flat) > _FEW or datatype.name == "BF16":  # which ml_dtypes makes of no integer above 63 bits
        wide = np.array(flat, np.float64)
        if np.abs(wide).max(initial=0) >= datatype.limit:
            raise OverflowError
        return wide.astype(datatype.dtype)
    if flat and (max(flat) >= datatype.limit or min(flat) <= -datatype.limit):
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


def encode_json(name: str, datatype: Datatype, array: Array) -> Array | list[str]:
    """Return a tensor as the JSON serialiser takes it: flat, in row-major order.

    Values that are not finite, which JSON has not, come out as null: see :func:`finite`.

    Raises:
        Refusal: A text is not UTF-8 (400: the client can ask for bytes instead), or is none (500: the model is at fault).
    """
    if datatype.size == 0:
        try:
            return [as_bytes(element).decode() for element in array.flat]
        except UnicodeDecodeError:
            raise Refusal(400, f"output {name!r} is not UTF-8 text; ask for it with 'binary_data'") from None
        except TypeError as error:
            raise Refusal(500, f"the model gave an element of output {name!r} that is no text: {error}") from error
    if datatype.name == "BF16":
        array = array.astype(np.float32)
    return array.ravel()


def finite(datatype: Datatype, array: Array) -> bool:
    """Whether JSON has a number for every element."""
    return datatype.json is not REAL or bool(np.isfinite(array).all())
