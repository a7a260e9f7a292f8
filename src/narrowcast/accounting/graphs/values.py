"""The tensors of a run of an ONNX graph, and which of them are alive."""

from __future__ import annotations

from dataclasses import dataclass

from narrowcast.accounting.graphs.rules import Tensor
from narrowcast.accounting.kinds import Kind

__all__ = ["Memory", "Value"]


@dataclass(frozen=True)
class Value:
    """A tensor of a run.

    Args:
        tensor: Its shape and dtype.
        storage: Whose bytes it is: its own name, or that of the tensor that it is a view of.
        constant: Whether it is the same in every run.
        sources: Constants of the model that it is, or that it holds in another form.
        writer: The place in the run of the operator that wrote it; -1 for constants and inputs.
        product: Which kind of product with weights it is, if no bias was added to it yet.
    """

    tensor: Tensor
    storage: str
    constant: bool = False
    sources: frozenset[str] = frozenset()
    writer: int = -1
    product: Kind | None = None


class Memory:
    """Bytes that are alive, by storages that several tensors may share.

    Args:
        static: Bytes that are always alive.

    Attributes:
        total: Bytes alive now.
        peak: The most that were alive at once.
    """

    def __init__(self, static: int) -> None:
        self.total = self.peak = static
        self._sizes: dict[str, int] = {}
        self._holders: dict[str, int] = {}

    def hold(self, storage: str, size: int) -> None:
        """Note a new storage, with one tensor that holds it."""
        self._sizes[storage], self._holders[storage] = size, 1
        self.total += size
        self.peak = max(self.peak, self.total)

    def share(self, storage: str) -> None:
        """Note one more tensor on a storage; nothing happens for constants, which are always alive."""
        if storage in self._holders:
            self._holders[storage] += 1

    def release(self, storage: str) -> None:
        """Note one tensor less; the last one frees the storage."""
        if storage not in self._holders:
            return
        self._holders[storage] -= 1
        if not self._holders[storage]:
            del self._holders[storage]
            self.total -= self._sizes.pop(storage)
