"""When each storage of a run is allocated and freed, and what it holds: what memory is counted from."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from narrowcast.accounting.recording import Call, Recorder, storage_of
from narrowcast.accounting.workspace import Backend

__all__ = ["Life", "LifeRecorder", "Lives", "Moment"]

_SCALAR = torch.ops.aten._local_scalar_dense.default


@dataclass
class Life:
    """One storage.

    Args:
        bytes: As the device's allocator hands them out.
        born: The operator that it is there from, by its place in the run.
        died: The first operator before which it is gone; None if it outlives the run.
        role: What it holds, if that is known; empty for results of operators.
    """

    bytes: int
    born: int
    died: int | None = None
    role: str = ""


@dataclass(frozen=True)
class Moment:
    """One operator of the run.

    Args:
        name: Its ATen name.
        path: The module that it, or the operator whose gradient it computes, ran in.
        phase: ``forward``, ``backward`` or ``optimizer``.
        hidden: Bytes that its kernel allocates for itself and frees before it returns.
    """

    name: str
    path: str
    phase: str
    hidden: int


@dataclass
class Lives:
    """A run as storages that come and go.

    Args:
        storages: Every storage.
        moments: Every operator that is no view, in order.
        marks: Names of points in the run, the operators before which they lie, and the bytes alive there.
    """

    storages: list[Life] = field(default_factory=list[Life])
    moments: list[Moment] = field(default_factory=list[Moment])
    marks: list[tuple[str, int, int]] = field(default_factory=list[tuple[str, int, int]])


class LifeRecorder(Recorder):
    """Follows the storages of one device.

    Args:
        module: The module that runs.
        backend: How the device allocates.
        sizes: Bytes of tensors that are stored in another form than the run sees them in, by the tensors' ids.
        follow_casts: Whether a copy of a parameter in another dtype is a weight, and the parameter a master weight.
        bits: What floating inputs and results are stored in; what the run sees unless given.
    """

    def __init__(
        self,
        module: nn.Module,
        backend: Backend,
        *,
        sizes: Mapping[int, int] | None = None,
        follow_casts: bool = False,
        bits: int | None = None,
    ) -> None:
        super().__init__(module)
        self.lives = Lives()
        self._backend = backend
        self._total = 0
        self._follow_casts = follow_casts
        self._bits = bits
        self._open: dict[int, Life] = {}
        for tensor in (*module.parameters(), *module.buffers()):
            self.watch([tensor], "weights", size=(sizes or {}).get(id(tensor)))
        self._parameters = frozenset(map(storage_of, module.parameters()))

    def mark(self, name: str) -> None:
        """Give the present point in the run a name."""
        self.lives.marks.append((name, len(self.lives.moments), self._total))

    def watch(self, tensors: Iterable[Any], role: str = "", *, size: int | None = None) -> None:
        """Follow storages of tensors, new ones from now on, and say what they hold.

        Args:
            tensors: Tensors; what is none is passed over.
            role: What they hold; a role that was said before stays if this is empty.
            size: Bytes that each takes; those of its storage unless given.
        """
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor) or tensor.device.type != self._backend.device:
                continue
            key = storage_of(tensor)
            life = self._open.get(key)
            if life is None:
                storage = tensor.untyped_storage()
                taken = storage.nbytes() if size is None else size
                if self._bits and role != "weights" and tensor.is_floating_point():
                    taken = -(-taken * self._bits // (8 * tensor.element_size()))
                unit = self._backend.granularity
                life = Life(-(-taken // unit) * unit, len(self.lives.moments))
                self.lives.storages.append(life)
                self._total += life.bytes
                self._open[key] = life
                weakref.finalize(storage, self._died, key)
            life.role = role or life.role

    def _died(self, key: int) -> None:
        life = self._open.pop(key, None)
        if life is not None:
            life.died = len(self.lives.moments)
            self._total -= life.bytes

    def known(self, func: Any) -> Any:
        """Return a number for a learning rate or a norm of an optimizer, as no size depends on it."""
        return 1.0 if func is _SCALAR and self.phase == "optimizer" else NotImplemented

    def choose(self, name: str, choices: Sequence[Callable[[], Any]]) -> Any:
        """Run all branches, and one pass of a loop."""
        return [choice() for choice in choices][-1]

    def saw(self, call: Call) -> None:
        """Follow the storages that an operator made."""
        if call.is_view:
            return
        for tensor, size in self._backend.opaque(call.name, call.args, call.out):
            self.watch([tensor], size=size)
        made = call.made
        self.watch(made)
        if self._follow_casts and call.name == "_to_copy" and self.phase == "forward":
            self._cast(call.args[0], made[0])
        hidden = self._backend.hidden(call.name, call.args, call.out)
        self.lives.moments.append(Moment(call.name, self.running.path, self.phase, hidden))

    def _cast(self, source: torch.Tensor, copy: torch.Tensor) -> None:
        if storage_of(source) in self._parameters and copy.dtype != source.dtype:
            self.watch([source], "master")
            self.watch([copy], "weights")
