"""The backend's hidden workspace: what libraries allocate for themselves, which no operator's result shows.

Two sorts: what a library keeps from its first call on (cuBLAS), and what a kernel allocates and frees within one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Backend", "backend"]

MIB = 1 << 20


@dataclass(frozen=True)
class Backend:
    """How one sort of device allocates.

    Args:
        device: Its type, ``cpu`` or ``cuda``.
        granularity: Bytes that its allocator rounds up to.
        foreach: Whether optimizers go over lists of tensors by default.
        kept: Bytes that libraries keep from their first call on, for each thread that calls them.
        hidden: Bytes that a kernel allocates for itself, from the operator's name, arguments and result.
    """

    device: str
    granularity: int
    foreach: bool
    kept: int
    hidden: Callable[[str, Sequence[Any], Any], int]


def backend(device: str, capability: tuple[int, int] = (8, 0)) -> Backend:
    """Return how a device allocates.

    Args:
        device: ``cpu`` or ``cuda``.
        capability: CUDA's compute capability, which the size of cuBLAS's workspace depends on.

    The caching allocator of CUDA rounds to 512 bytes (``kMinBlockSize`` of CUDACachingAllocator). cuBLAS gets a workspace
    of 2 x 4 MiB + 8 x 16 KiB, and of 32 MiB from Hopper on, for each thread and stream (``parseChosenWorkspaceSize`` of
    CublasHandlePool.cpp); cuBLASLt shares it.
    """
    if device == "cpu":
        return Backend("cpu", 1, foreach=False, kept=0, hidden=_hidden_cpu)
    kept = 32 * MIB if capability[0] >= 9 else 2 * 4 * MIB + 8 * 16 * 1024
    return Backend("cuda", 512, foreach=True, kept=kept, hidden=_hidden_cuda)


def _hidden_cpu(name: str, args: Sequence[Any], out: Any) -> int:
    return 0


def _hidden_cuda(name: str, args: Sequence[Any], out: Any) -> int:
    return 0
