"""Arrays of an .npz file that are read sample by sample, so that memory does not grow with their number."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from narrowcast.errors import DataError

__all__ = ["Rows", "blocks", "open_rows"]

Array = NDArray[Any]

#: About how many bytes are read at once where all samples are looked at.
BLOCK = 1 << 24

#: Version of the .npy header to what reads it (NumPy, ``numpy.lib.format``).
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}

#: A local file header of a ZIP archive, without the name and the extra field that follow it (APPNOTE 4.3.7).
_LOCAL = struct.Struct("<4s5H3I2H")


@dataclass(frozen=True)
class Rows:
    """An array in C order in a file, ``[N, ...]``; indexing reads only the rows that are asked for.

    Attributes:
        path: The file.
        offset: Where the first row begins, in bytes.
        dtype: Element type.
        shape: Shape, ``[N, ...]``.
    """

    path: Path
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, wanted: NDArray[np.int64] | slice) -> Array:
        """Return rows by their indices from 0 to N - 1, ``[len(wanted), ...]``; neighbours are read at once.

        Raises:
            DataError: The file is shorter than it was.
        """
        indices = np.arange(*wanted.indices(len(self))) if isinstance(wanted, slice) else wanted
        rows = np.empty((len(indices), *self.shape[1:]), self.dtype)
        if not rows.size:
            return rows
        size = rows.nbytes // len(rows)
        raw = rows.reshape(-1).view(np.uint8)
        starts = [0, *(np.flatnonzero(np.diff(indices) != 1) + 1), len(indices)]
        with self.path.open("rb") as file:
            for start, end in pairwise(starts):
                file.seek(self.offset + int(indices[start]) * size)
                if file.readinto(raw[start * size : end * size].data) != (end - start) * size:
                    raise DataError(
                        f"{self.path} ends before sample {int(indices[end - 1])} does",
                        allowed="a file that nobody changes while it is read",
                        next_step="write the file again, and run the command again",
                    )
        return rows


def blocks(array: Array | Rows) -> Iterator[tuple[int, Array]]:
    """Yield an array in pieces of some megabytes along its first axis, each with the index of its first row."""
    if isinstance(array, np.ndarray) and not array.ndim:
        yield 0, array.reshape(1)
        return
    step = max(1, BLOCK // max(1, array.dtype.itemsize * int(np.prod(array.shape[1:]))))
    for start in range(0, len(array), step):
        yield start, array[start : start + step]


def open_rows(path: Path) -> dict[str, Array | Rows]:
    """Return the arrays of an .npz file: as rows where they are stored plainly, else (compressed ones) in memory.

    Every checksum of the archive is checked.

    Raises:
        OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error: The file is damaged, or holds objects.
    """
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive, zipfile.ZipFile(path) as members:
        found: dict[str, Array | Rows] = {}
        for key, info in zip(archive.files, members.infolist(), strict=True):
            rows = _rows(path, members, info)
            found[key] = archive[key] if rows is None else rows
        return found


def _rows(path: Path, members: zipfile.ZipFile, info: zipfile.ZipInfo) -> Rows | None:
    """Return a member as rows; None if it is compressed, or no array in C order with a first axis."""
    if info.compress_type != zipfile.ZIP_STORED or not info.filename.endswith(".npy"):
        return None
    with members.open(info) as member:
        read_header = _HEADERS.get(npy.read_magic(member))
        if read_header is None:
            return None
        shape, fortran_order, dtype = read_header(member)
        begin = member.tell()
        if fortran_order or dtype.hasobject or not shape:
            return None
        if info.file_size - begin != dtype.itemsize * int(np.prod(shape)):
            raise ValueError(f"array {info.filename} has {info.file_size - begin} bytes for shape {list(shape)}")
        while member.read(BLOCK):  # checks the checksum at the end
            pass
    with path.open("rb") as file:
        file.seek(info.header_offset)
        *_, name, extra = _LOCAL.unpack(file.read(_LOCAL.size))
    return Rows(path.absolute(), info.header_offset + _LOCAL.size + name + extra + begin, dtype, shape)
