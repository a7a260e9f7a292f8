"""Data as the project sees them: samples by index, with labels, and groups that must not be torn apart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrowcast.data.rows import Rows, blocks
from narrowcast.errors import DataError
from narrowcast.models.graph import TensorInfo

__all__ = ["Dataset", "Splits", "check_fits", "check_no_more", "digest_of", "split"]

Array = NDArray[Any]
Tensors = dict[str, Array]

#: Shares of the calibration, search and report parts.
SHARES = (0.45, 0.25, 0.3)


@dataclass(frozen=True)
class Dataset:
    """Samples by index; nothing is held in memory but what ``load`` keeps.

    Attributes:
        source: The reference it came from.
        sha256: Hash over the samples (or over the files and settings that decide them).
        size: Number of samples.
        load: From an array of indices, ``[N]``, to one array per model input, ``[N, ...]``.
        labels: Class indices, int64 ``[size]``, or None.
        groups: Source of each sample, int64 ``[size]``; samples of a group go to the same part. None: each its own.
        note: What a reader of a report should know about these data.
    """

    source: str
    sha256: str
    size: int
    load: Callable[[NDArray[np.int64]], Tensors]
    labels: NDArray[np.int64] | None = None
    groups: NDArray[np.int64] | None = None
    note: str = ""

    def batches(self, size: int) -> Iterator[tuple[NDArray[np.int64], Tensors]]:
        """Yield indices and samples, batch by batch, in order."""
        for start in range(0, self.size, size):
            indices = np.arange(start, min(start + size, self.size), dtype=np.int64)
            yield indices, self.load(indices)

    def take(self, indices: NDArray[np.int64]) -> Dataset:
        """Return a dataset of some of the samples."""
        load = self.load
        return replace(
            self,
            size=len(indices),
            load=lambda wanted: load(indices[wanted]),
            labels=None if self.labels is None else self.labels[indices],
            groups=None if self.groups is None else self.groups[indices],
        )


@dataclass(frozen=True)
class Splits:
    """The three parts of the data: what ranges are calibrated on, what the search looks at, what is reported."""

    calibration: Dataset
    search: Dataset
    report: Dataset


def split(data: Dataset, seed: int) -> Splits:
    """Return the three parts, drawn by seed, groups kept whole.

    Raises:
        DataError: There are too few samples (or groups) for three parts.
    """
    groups = np.arange(data.size) if data.groups is None else data.groups
    names = np.unique(groups)
    if len(names) < 3:
        unit = "sample" if data.groups is None else "group of samples"
        raise DataError(
            f"{data.source} has {len(names)} {unit}{'' if len(names) == 1 else 's'}, so a part of the split is empty",
            allowed=f"at least 3 {unit}s: one each for calibration, search and report",
            next_step="give more data",
        )
    order = np.random.default_rng(seed).permutation(names)
    first = max(1, round(len(names) * SHARES[0]))
    second = first + max(1, round(len(names) * SHARES[1]))
    second = min(second, len(names) - 1)
    parts = [np.flatnonzero(np.isin(groups, part)) for part in np.split(order, [first, second])]
    return Splits(*(data.take(part.astype(np.int64)) for part in parts))


def digest_of(*parts: bytes | str | Array | Rows) -> str:
    """Return the SHA-256 over texts, bytes and arrays (with their dtype and shape)."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, (np.ndarray, Rows)):
            digest.update(f"{part.dtype}{part.shape}".encode())
            for _, block in blocks(part):
                digest.update(block.tobytes())
        else:
            digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def check_fits(data: Dataset, inputs: list[TensorInfo]) -> None:
    """Check the first samples against a model's inputs: names, dtypes, shapes, finite values.

    Raises:
        DataError: Something does not fit; the message names the input and both sides.
    """
    sample = data.load(np.arange(min(2, data.size), dtype=np.int64))
    wanted = {info.name: info for info in inputs}
    missing, extra = sorted(wanted.keys() - sample.keys()), sorted(sample.keys() - wanted.keys())
    if missing:
        raise DataError(
            f"{data.source} has no array for the model's input {missing[0]!r}"
            + (f" (it has {', '.join(map(repr, extra))} instead)" if extra else ""),
            allowed=f"arrays named {', '.join(map(repr, sorted(wanted)))}",
            next_step="rename the array, or export the model with that input name",
        )
    for name, info in wanted.items():
        array = sample[name]
        if array.dtype != info.dtype:
            raise DataError(
                f"{data.source}: {name!r} is {array.dtype}",
                allowed=f"{info.dtype}, the element type of the model's input",
                next_step=f"convert it with .astype({str(info.dtype)!r})",
            )
        fits = array.ndim == len(info.shape) and all(
            not isinstance(dim, int) or dim == size for dim, size in zip(info.shape[1:], array.shape[1:], strict=True)
        )
        if not fits:
            shape = ", ".join(str(dim or "any") for dim in info.shape)
            raise DataError(
                f"{data.source}: {name!r} has shape {list(array.shape)}",
                allowed=f"[{shape}], the shape of the model's input (first axis: samples)",
                next_step="reshape or resize the data to what the model was built for",
            )
        check_finite(data.source, name, array)


def check_no_more(data: Dataset, inputs: list[TensorInfo]) -> None:
    """Check that samples hold no array that a model has no input for; training may read such arrays, a runtime may not.

    Raises:
        DataError: They do; the message names the array.
    """
    wanted = {info.name for info in inputs}
    extra = sorted(data.load(np.arange(1, dtype=np.int64)).keys() - wanted)
    if extra:
        raise DataError(
            f"{data.source} has an array {extra[0]!r}, and the model has no input of that name",
            allowed=f"arrays named {', '.join(map(repr, sorted(wanted)))}, and labels or groups",
            next_step="leave the array out, or rename it",
        )


def check_finite(source: str, name: str, array: Array | Rows) -> None:
    """Check that an array has no NaN or infinity.

    Raises:
        DataError: It has; the message says where the first one is.
    """
    if array.dtype.kind != "f":
        return
    number, first = 0, ""
    for start, block in blocks(array):
        bad = ~np.isfinite(block)
        if not number and bad.any():
            place = [int(index) for index in np.argwhere(bad)[0]]
            first = f"{block[tuple(place)]} at {[start + place[0], *place[1:]]}"
        number += int(bad.sum())
    if number:
        raise DataError(
            f"{source}: {name!r} holds {first} ({number} such values)",
            allowed="finite numbers",
            next_step="drop or repair those samples: one NaN in the calibration data spoils every range",
        )
