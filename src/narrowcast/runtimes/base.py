"""The boundary between narrowcast and a runtime: load a graph file, run a batch."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrowcast.errors import DataError, RuntimeMissingError, choices
from narrowcast.models.graph import TensorInfo
from narrowcast.recipes.target import FusionRules

__all__ = ["OperatorTime", "Runtime", "Session", "check_batch", "get_runtime", "runtime_names"]

Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class OperatorTime:
    """Where a runtime spent its time.

    Attributes:
        name: Name of the operator as the runtime calls it.
        op_type: Type of the kernel that ran, fusions included.
        seconds: Mean time per run.
    """

    name: str
    op_type: str
    seconds: float


class Session(ABC):
    """A graph loaded on one runtime."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[str, ...]

    @abstractmethod
    def run(self, batch: Tensors) -> Tensors:
        """Return the outputs by name for a batch of inputs by name."""

    def close(self) -> None:  # noqa: B027  most runtimes free a session with the last reference to it
        """Free what the session holds."""


class Runtime(ABC):
    """One runtime: what it is, how it fuses, and how it loads a graph."""

    name: str
    #: Extra that installs it, as in ``pip install 'narrowcast[EXTRA]'``; empty for the core.
    extra: str
    rules: FusionRules
    #: Types of the kernels that turn FP32 into integers, as profiles call them.
    conversions: frozenset[str]

    @abstractmethod
    def version(self) -> str:
        """Return the version of the installed runtime.

        Raises:
            RuntimeMissingError: It is not installed.
        """

    @abstractmethod
    def load(self, path: Path, *, threads: int = 1, batch: int | None = None, shares: bool = False) -> Session:
        """Return a session on a graph file.

        Args:
            path: An ONNX file.
            threads: Threads to compute with.
            batch: The only batch size that will run; a runtime that gains from it fixes the batch axis.
            shares: Whether others want the cores between two runs: threads that wait for the next give theirs up at once.

        Raises:
            RuntimeMissingError: The runtime is not installed.
            RuntimeFailedError: The runtime refuses the graph.
        """

    @abstractmethod
    def profile(self, path: Path, batch: Tensors, *, threads: int = 1, runs: int = 20) -> list[OperatorTime]:
        """Return the time of each operator that ran, the longest first."""


def runtime_names() -> list[str]:
    """Return the names of all registered runtimes, installed or not."""
    return sorted(entry.name for entry in entry_points(group="narrowcast.runtimes"))


@functools.cache
def get_runtime(name: str) -> Runtime:
    """Return the adapter of a runtime by name.

    Raises:
        RuntimeMissingError: No adapter has that name.
    """
    for entry in entry_points(group="narrowcast.runtimes"):
        if entry.name == name:
            return entry.load()()
    raise RuntimeMissingError(f"runtime {name!r} is unknown", allowed=choices(name, runtime_names()))


def check_batch(inputs: tuple[TensorInfo, ...], batch: Tensors, source: str) -> None:
    """Check a batch against a graph's inputs before a runtime sees it.

    Raises:
        DataError: A name, element type or shape does not fit.
    """
    for info in inputs:
        if info.name not in batch:
            raise DataError(
                f"{source}: the batch has no input {info.name!r} (it has {', '.join(map(repr, sorted(batch))) or 'none'})",
                allowed=f"arrays named {', '.join(repr(i.name) for i in inputs)}",
            )
        array = batch[info.name]
        fits = len(array.shape) == len(info.shape) and all(
            not isinstance(dim, int) or dim == size for dim, size in zip(info.shape, array.shape, strict=True)
        )
        if array.dtype != info.dtype or not fits:
            shape = ", ".join(str(dim or "any") for dim in info.shape)
            raise DataError(
                f"{source}: input {info.name!r} is {array.dtype} {list(array.shape)}", allowed=f"{info.dtype} [{shape}]"
            )
    extra = sorted(batch.keys() - {info.name for info in inputs})
    if extra:
        raise DataError(
            f"{source}: the graph has no input {extra[0]!r}", allowed=", ".join(repr(info.name) for info in inputs)
        )


def same_batch(batch: Tensors) -> int:
    """Return the size of the batch: the first axis of the first input that has one."""
    return next((int(np.shape(array)[0]) for array in batch.values() if np.ndim(array)), 1)
