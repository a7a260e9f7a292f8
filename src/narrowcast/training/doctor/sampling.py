"""One step's histograms: which tensors are counted, where, and how the counts come to main memory without a wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from narrowcast.training.doctor.casts import CastCounter
from narrowcast.training.doctor.histograms import Counter, sampled
from narrowcast.training.doctor.paths import Paths, bare, layer_names, unseen
from narrowcast.training.doctor.record import Part
from narrowcast.training.doctor.replay import local
from narrowcast.training.doctor.updates import ratios, thinned

__all__ = ["Mailbox", "Sampler", "Target", "compiled", "targets"]

_PARTS = tuple(Part)
_ENGINE: Any = torch._C  # pyright: ignore[reportPrivateUsage]


@dataclass(frozen=True)
class Target:
    """A module to watch, its name, and the parameters that are its own and trained."""

    name: str
    module: nn.Module
    parameters: tuple[tuple[str, nn.Parameter], ...]


def targets(model: nn.Module) -> list[Target]:
    """Return the modules that hold parameters of their own, and those without children, each once."""
    names = layer_names(model)
    found: list[Target] = []
    for part in bare(model).modules():
        own = tuple((name, one) for name, one in part.named_parameters(recurse=False) if one.requires_grad)
        if own or not any(True for _ in part.children()):
            found.append(Target(names[id(part)], part, own))
    return found


def compiled(model: nn.Module) -> bool:
    """Return whether a part of a model is compiled, so that hooks of its inside do not run."""
    return any(type(part).__name__ == "OptimizedModule" or _compiled_call(part) is not None for part in model.modules())


def _compiled_call(part: Any) -> object:
    return part._compiled_call_impl


class Mailbox:
    """Brings numbers from a device to main memory; they are read once they have arrived, in order."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._waiting: list[tuple[Any, list[Tensor], Callable[[list[Tensor]], None]]] = []

    def send(self, tensors: Sequence[Tensor], read: Callable[[list[Tensor]], None]) -> None:
        """Copy tensors, and have a function read the copies later; at once where there is no device to wait for."""
        if self._device.type != "cuda":
            read([one.detach().cpu() for one in tensors])
            return
        copies = [one.detach().to("cpu", non_blocking=True) for one in tensors]
        event = torch.cuda.Event()
        event.record()
        self._waiting.append((event, copies, read))

    def collect(self, *, wait: bool = False) -> None:
        """Read what has arrived, or all."""
        while self._waiting:
            event, copies, read = self._waiting[0]
            if wait:
                event.synchronize()
            elif not event.query():
                return
            del self._waiting[0]
            read(copies)


class Sampler:
    """Counts the tensors of single steps.

    Args:
        model: The model.
        cap: Numbers of a tensor that a cheap sample counts at most; deep ones count all activations.
    """

    def __init__(self, model: nn.Module, *, cap: int = 1 << 18) -> None:
        self.targets = targets(model)
        self.device = next(model.parameters()).device
        self._cap = cap
        self._counter = Counter(len(self.targets) * len(_PARTS), self.device)
        self._stuck = torch.zeros(len(self.targets), 2, dtype=torch.float64, device=self.device)
        self._used: dict[int, tuple[int, float]] = {}  # slot -> step and the scale that its numbers were divided by
        self._before: list[tuple[int, nn.Parameter, Tensor]] = []
        self._hooks = ExitStack()
        self._casts: CastCounter | None = None
        self._model = model

    def watch_activations(self, step: int, scale: float) -> None:
        """Count outputs and their gradients in the pass that follows, and casts that saturate; compiled parts run eagerly."""
        self._hooks = ExitStack()
        self._hooks.enter_context(torch.compiler.set_stance("force_eager"))
        paths = Paths(self._model)
        self._hooks.enter_context(paths.following())
        for number, target in enumerate(self.targets):
            handle = target.module.register_forward_hook(self._hook(number, step, scale))
            self._hooks.callback(handle.remove)
        self._casts = CastCounter(paths)
        self._hooks.enter_context(self._casts)

    def stop(self) -> None:
        """Take hooks and modes away."""
        self._hooks.close()

    def _hook(self, number: int, step: int, scale: float) -> Callable[[nn.Module, Any, Any], None]:
        def see(part: nn.Module, args: Any, out: Any) -> None:
            again = _ENGINE._current_graph_task_id() != -1  # computed again in the backward pass: counted before
            for one in tree_leaves(out):
                if not isinstance(one, Tensor) or not one.is_floating_point() or one.device != self.device:
                    continue
                if not again:
                    self._add(number, Part.FORWARD, step, 1.0, local(one))
                if one.requires_grad:
                    one.register_hook(seen_gradient)

        def seen_gradient(gradient: Tensor) -> None:
            self._add(number, Part.BACKWARD, step, scale, local(gradient))

        return see

    def _add(self, number: int, part: Part, step: int, scale: float, tensor: Tensor) -> None:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        if not plain or tensor.device != self.device or not tensor.numel():
            return
        slot = number * len(_PARTS) + _PARTS.index(part)
        self._used[slot] = (step, scale)
        with unseen():
            self._counter.add(slot, tensor, scale)

    @torch.no_grad()
    def gradients(self, chosen: Sequence[int], step: int, scale: float) -> None:
        """Count the gradients of some targets' parameters."""
        for number in chosen:
            for _, one in self.targets[number].parameters:
                if one.grad is not None and not one.grad.is_sparse:
                    self._add(number, Part.GRADIENT, step, scale, sampled(local(one.grad), self._cap))

    @torch.no_grad()
    def before_update(self, chosen: Sequence[int]) -> None:
        """Keep some of the weights of some targets."""
        self._before = [
            (number, one, thinned(local(one)).clone())
            for number in chosen
            for _, one in self.targets[number].parameters
            if one.grad is not None and not one.grad.is_sparse and one.device == self.device
        ]

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Count these weights, what was added to them, and how many have a gradient and did not move."""
        for number, parameter, old in self._before:
            new = thinned(local(parameter))
            moved = new.float() - old.float()
            self._add(number, Part.WEIGHT, step, 1.0, new)
            self._add(number, Part.UPDATE, step, 1.0, moved)
            self._add(number, Part.RATIO, step, 1.0, ratios(moved, old))
            if parameter.grad is not None and parameter.dtype in (torch.bfloat16, torch.float16):
                wanted = thinned(local(parameter.grad)) != 0
                self._stuck[number] += torch.stack([(wanted & (moved == 0)).sum(), wanted.sum()])
        self._before = []

    def take(self) -> tuple[list[tuple[int, Part, int, float]], list[Tensor], Any]:
        """Return what was counted since the last time, and count from zero again.

        Returns:
            Number of the target, part, step and scale of each row; the rows ``counts`` and ``largest``, the stuck numbers,
            and the rows of casts, on the device; and the places of casts.
        """
        slots = list(self._used)
        rows = [
            (slot // len(_PARTS), _PARTS[slot % len(_PARTS)], step, scale) for slot, (step, scale) in self._used.items()
        ]
        pinned = self.device.type == "cuda"  # from pageable memory a copy would wait for the device
        index = torch.tensor(slots, dtype=torch.int64, pin_memory=pinned).to(self.device, non_blocking=True)
        places, casts = self._casts.take() if self._casts is not None else ([], None)
        tensors = [
            self._counter.counts[index],
            self._counter.largest[index],
            self._stuck.clone(),
            torch.zeros(0, 4) if casts is None else casts,
        ]
        self._counter.counts[index] = 0
        self._counter.largest[index] = 0
        self._stuck.zero_()
        self._used = {}
        self._casts = None
        return rows, tensors, places
