"""Tensors in memory that two processes share: one writes them, the other looks at them in place."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrowcast.serving.datatypes import DATATYPES, Datatype, decode_binary, encode_binary

__all__ = ["Arena", "Placed", "anonymous_file"]

#: Runtimes load vectors of up to 64 bytes, and a cache line has as many.
_ALIGNMENT = 64
_SMALLEST = 1 << 16
#: What is no view of the memory, or has values to check.
_READ_EACH_TIME = frozenset({"BYTES", "BOOL"})

#: Name, datatype, shape, first byte, number of bytes: what the other process needs to see a tensor.
Placed = tuple[str, str, list[int], int, int]


def anonymous_file() -> int:
    """Return the descriptor of a file in memory that has no name, so that it ends with its last user."""
    if hasattr(os, "memfd_create"):  # Linux has it, macOS has not
        return os.memfd_create("narrowcast-tensors", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Arena:
    """One direction of a worker's shared memory; one side writes, the other reads.

    Both keep their views of the last tensors: most batches have the shapes of the batch before, and then only values move.

    Args:
        descriptor: The file behind it, which both processes have.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._size = 0
        self._memory: mmap.mmap | None = None
        self._plan: list[Placed] = []  # of what was written or read last, if its views are kept
        self._views: list[NDArray[Any]] = []

    def write(self, tensors: Sequence[tuple[str, Datatype, Sequence[NDArray[Any]]]]) -> list[Placed]:
        """Write tensors, each given as its parts along the first axis, and return where they are."""
        if self._written_alike(tensors):
            for (_, _, parts), place in zip(tensors, self._views, strict=True):
                _fill(place, parts)
            return self._plan
        self._plan, self._views = [], []
        plan, texts = _plan(tensors)
        end = plan[-1][3] + plan[-1][4] if plan else 0
        if end > self._size:
            self._grow(end)
        assert self._memory is not None or not end
        views: list[NDArray[Any]] = []
        for (name, datatype, parts), (_, _, shape, start, size) in zip(tensors, plan, strict=True):
            if not size or self._memory is None:
                continue
            if datatype.size == 0:
                self._memory[start : start + size] = texts[name]
                continue
            place = np.frombuffer(self._memory, datatype.dtype, size // datatype.size, start).reshape(shape)
            _fill(place, parts)
            views.append(place)
        if len(views) == len(plan):
            self._plan, self._views = plan, views
        return plan

    def _written_alike(self, tensors: Sequence[tuple[str, Datatype, Sequence[NDArray[Any]]]]) -> bool:
        """Return whether tensors go where the last ones went."""
        if not self._plan or len(tensors) != len(self._plan):
            return False
        for (name, datatype, parts), (known, kind, shape, _, _) in zip(tensors, self._plan, strict=True):
            rows = sum([part.shape[0] for part in parts]) if len(parts) > 1 else None
            first = parts[0].shape
            given = [*first] if rows is None else [rows, *first[1:]]
            if given != shape or name != known or datatype.name != kind:
                return False
        return True

    def read(self, placed: Sequence[Placed]) -> dict[str, NDArray[Any]]:
        """Return views of tensors that the other process wrote; they hold until it writes again."""
        if self._plan and placed == self._plan:
            return {item[0]: view for item, view in zip(placed, self._views, strict=True)}
        self._plan, self._views = [], []
        end = max((start + size for _, _, _, start, size in placed), default=0)
        if end > self._size:
            self._map(os.fstat(self.descriptor).st_size)
        view = memoryview(self._memory) if self._memory is not None else memoryview(b"")
        found = {
            name: decode_binary(name, DATATYPES[datatype], shape, view[start : start + size])
            for name, datatype, shape, start, size in placed
        }
        if all(datatype not in _READ_EACH_TIME for _, datatype, _, _, _ in placed):
            self._plan, self._views = list(placed), list(found.values())
        return found

    def close(self) -> None:
        """Give the memory back when the last view of it is gone."""
        self._plan, self._views = [], []
        self._memory = None
        os.close(self.descriptor)

    def _grow(self, size: int) -> None:
        whole = max(_SMALLEST, 1 << (size - 1).bit_length())
        os.ftruncate(self.descriptor, whole)
        self._map(whole)

    def _map(self, size: int) -> None:
        self._memory = mmap.mmap(self.descriptor, size)
        self._size = size


def _fill(place: NDArray[Any], parts: Sequence[NDArray[Any]]) -> None:
    if len(parts) == 1:
        place[...] = parts[0]
    else:
        np.concatenate(parts, out=place)


def _plan(
    tensors: Sequence[tuple[str, Datatype, Sequence[NDArray[Any]]]],
) -> tuple[list[Placed], dict[str, bytes]]:
    """Return where each tensor goes, and the bytes of those whose elements differ in length."""
    plan: list[Placed] = []
    texts: dict[str, bytes] = {}
    at = 0
    for name, datatype, parts in tensors:
        shape = list(parts[0].shape)
        if len(parts) > 1:
            shape[0] = sum(part.shape[0] for part in parts)
        if datatype.size == 0:
            texts[name] = b"".join(bytes(encode_binary(datatype, part)) for part in parts)
        size = len(texts[name]) if datatype.size == 0 else math.prod(shape) * datatype.size
        plan.append((name, datatype.name, shape, at, size))
        at += -(-size // _ALIGNMENT) * _ALIGNMENT
    return plan, texts
