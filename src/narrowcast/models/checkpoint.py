"""safetensors files read by rows, so that a file larger than memory can be walked through.

The header is read and checked here, not by the ``safetensors`` package: its NumPy side has no BF16 and no 8-bit floats, and
its other sides need their array library. The format is 8 bytes of header length (little-endian), a JSON object of
``name: {dtype, shape, data_offsets}``, and the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from narrowcast.errors import ModelError

__all__ = ["StoredTensor", "read_header", "shards", "unique"]

_LARGEST_HEADER = 100_000_000  # bytes; what the safetensors package refuses as well
_SHORTEST = 8  # bytes of the header's length

#: Bits of an element, and the number format that it is in (or the name of what is no floating-point number).
_DTYPES: dict[str, tuple[int, str]] = {
    "F64": (64, "fp64"),
    "F32": (32, "fp32"),
    "F16": (16, "fp16"),
    "BF16": (16, "bf16"),
    "F8_E4M3": (8, "e4m3fn"),
    "F8_E5M2": (8, "e5m2"),
    "F8_E4M3FNUZ": (8, "e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "e5m2fnuz"),
    "F8_E8M0": (8, "e8m0"),
    "F6_E2M3": (6, "e2m3"),
    "F6_E3M2": (6, "e3m2"),
    "F4": (4, "e2m1"),
    "C64": (64, "complex64"),
    "BOOL": (8, "bool"),
    **{f"I{bits}": (bits, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": (bits, f"uint{bits}") for bits in (8, 16, 32, 64)},
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file.

    Attributes:
        path: The file.
        name: The tensor's name.
        dtype: Its number format: ``fp32``, ``bf16``, ``e4m3fn``, ``int64`` ...
        bits: Bits of an element.
        shape: Its shape.
        offset: Its first byte in the file.
        nbytes: Its bytes.
    """

    path: Path
    name: str
    dtype: str
    bits: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self, start: int, count: int) -> np.ndarray:
        """Return elements as they are stored: numbers of FP64, FP32 and FP16, codes of the others; shape [count].

        Raises:
            ModelError: The file has changed and ends too early.
        """
        kind = {"fp64": "<f8", "fp32": "<f4", "fp16": "<f2"}.get(self.dtype, f"<u{self.bits // 8}")
        where = self.offset + start * self.bits // 8
        found = np.fromfile(self.path, kind, count, offset=where)
        if found.size != count:
            raise ModelError(f"{self.path} ends within tensor {self.name!r}", next_step="it changed while it was read")
        return found


def shards(path: Path) -> list[Path]:
    """Return the safetensors files that a path stands for: the file itself, or those of a folder.

    A folder's ``*.safetensors.index.json`` says which files belong to the model; without one, all of them do.

    Raises:
        ModelError: There is none, or the index cannot be read or names a file that is not there.
    """
    if not path.is_dir():
        if not path.is_file():
            raise ModelError(f"file {path} does not exist", next_step="check the path")
        return [path]
    indexes = sorted(path.glob("*.safetensors.index.json"))
    if not indexes:
        return sorted(path.glob("*.safetensors"))
    try:
        named = json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values()
        files = [path / Path(str(name)).name for name in dict.fromkeys(named)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{indexes[0]} is no index of safetensors files: {error!r}", next_step="name one of the files"
        ) from None
    for file in files:
        if not file.is_file():
            raise ModelError(f"{indexes[0]} names {file.name}, which is not there", next_step="copy the missing file")
    return sorted(files)


def read_header(path: Path) -> list[StoredTensor]:
    """Return the tensors of a safetensors file, in the order of their data.

    Raises:
        ModelError: The file is missing or is no complete safetensors file; the message says what does not fit.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_SHORTEST), "little")
            if size < _SHORTEST or length > min(size - _SHORTEST, _LARGEST_HEADER):
                raise _damaged(path, f"{size:,} bytes with a header said to be {length:,} bytes long")
            header = json.loads(file.read(length), object_pairs_hook=_once)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", next_step="check the path") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is no JSON object: {error}") from None
    if not isinstance(header, dict):
        raise _damaged(path, f"its header is a {type(header).__name__}, no object")
    start = _SHORTEST + length
    found = [_tensor(path, name, entry, start, size) for name, entry in header.items() if name != "__metadata__"]
    return sorted(found, key=lambda tensor: (tensor.offset, tensor.name))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name that occurs twice")
    return found


def _tensor(path: Path, name: str, entry: Any, start: int, size: int) -> StoredTensor:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(first), int(last)]}:
            pass
        case _:
            raise _damaged(path, f"tensor {name!r} is described by {str(entry)[:200]}")
    if dtype not in _DTYPES:
        raise ModelError(f"{path}: tensor {name!r} has dtype {dtype}", allowed=", ".join(_DTYPES))
    if not all(isinstance(length, int) and length >= 0 for length in shape):
        raise _damaged(path, f"tensor {name!r} has shape {shape}")
    bits, known = _DTYPES[dtype]
    wanted = -(-math.prod(shape) * bits // 8)
    if last - first != wanted:
        raise _damaged(path, f"tensor {name!r} has {last - first:,} bytes; {dtype} of shape {shape} takes {wanted:,}")
    if first < 0 or start + last > size:
        raise _damaged(path, f"tensor {name!r} ends at byte {start + last:,} of a file of {size:,} bytes")
    return StoredTensor(path, name, known, bits, tuple(shape), start + first, wanted)


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError(
        f"{path} is no complete safetensors file: {why}",
        allowed="a whole file",
        next_step="copy or download it again",
    )


def unique(tensors: list[StoredTensor]) -> Mapping[str, StoredTensor]:
    """Return tensors of several files by name.

    Raises:
        ModelError: Two files hold the same name.
    """
    found: dict[str, StoredTensor] = {}
    for tensor in tensors:
        other = found.setdefault(tensor.name, tensor)
        if other is not tensor:
            raise ModelError(
                f"{tensor.path.name} and {other.path.name} both hold a tensor {tensor.name!r}",
                allowed="a folder whose files are parts of one model",
                next_step="name one of the files",
            )
    return found
