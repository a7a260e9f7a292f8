"""One step's histograms: which tensors are counted, where, and how the counts come to main memory without a wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from narrowcast.training.doctor.casts import CastCounter
from narrowcast.training.doctor.histograms import Counter, index_on, sampled
from narrowcast.training.doctor.paths import Paths, bare, layer_names, unseen
from narrowcast.training.doctor.replay import local
from narrowcast.training.doctor.updates import ratios, thinned
from narrowcast.training.doctor.values import Part
from narrowcast.training.multi_tensor import norms

__all__ = ["Counted", "Mailbox", "Sampler", "Target", "compiled", "targets"]

_PLACES = {part: place for place, part in enumerate(Part)}
_ACTIVATIONS = (Part.FORWARD, Part.BACKWARD)  # counted by hooks, in the passes themselves
_HALF = (torch.bfloat16, torch.float16)
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


class Counted(NamedTuple):
    """What a histogram counted.

    Attributes:
        target: Number of the target.
        part: What was counted.
        step: The latest one.
        scale: What the numbers were divided by.
        numbers: How many the tensors hold, of which a sample may have been counted.
    """

    target: int
    part: Part
    step: int
    scale: float
    numbers: int


class Sampler:
    """Counts the tensors of single steps.

    Args:
        model: The model.
        cap: Numbers that are counted at most, beside the least and the greatest, of an activation or a gradient.
    """

    def __init__(self, model: nn.Module, *, cap: int = 1 << 18) -> None:
        self.targets = targets(model)
        self.device = next((one.device for one in model.parameters()), torch.device("cpu"))
        self._cap = cap
        self._counter = Counter(len(self.targets) * len(_PLACES), self.device)
        self._stuck = torch.zeros(len(self.targets), 2, dtype=torch.float64, device=self.device)
        self._used: dict[int, Counted] = {}  # by slot
        self._before: tuple[dict[int, list[nn.Parameter]], Tensor] | None = None
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
            for one in (out,) if type(out) is Tensor else tree_leaves(out):
                if not isinstance(one, Tensor) or not one.is_floating_point() or one.device != self.device:
                    continue
                if not again:
                    self._sample(number, Part.FORWARD, step, 1.0, local(one))
                if one.requires_grad:
                    one.register_hook(seen_gradient)

        def seen_gradient(gradient: Tensor) -> None:
            self._sample(number, Part.BACKWARD, step, scale, local(gradient))

        return see

    def _sample(self, number: int, part: Part, step: int, scale: float, tensor: Tensor) -> None:
        """Count a sample of a tensor, which may change from now on."""
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        if plain and tensor.is_floating_point() and tensor.device == self.device and tensor.numel():
            with unseen():
                self._add(Counted(number, part, step, scale, tensor.numel()), sampled(tensor, self._cap))

    def _add(self, counted: Counted, numbers: Tensor) -> None:
        slot = counted.target * len(_PLACES) + _PLACES[counted.part]
        before = self._used.get(slot)
        held = counted.numbers + (before.numbers if before is not None else 0)
        self._used[slot] = counted._replace(numbers=held)
        self._counter.add(slot, numbers, counted.scale)

    @torch.no_grad()
    def gradients(self, chosen: Sequence[int], step: int, scale: float) -> None:
        """Count the gradients of some targets' parameters."""
        for number in chosen:
            for _, one in self.targets[number].parameters:
                if one.grad is not None and not one.grad.is_sparse:
                    self._sample(number, Part.GRADIENT, step, scale, local(one.grad))

    @torch.no_grad()
    def before_update(self, chosen: Sequence[int]) -> None:
        """Keep some of the weights of some targets."""
        moving: dict[int, list[nn.Parameter]] = {}
        for number in chosen:
            for _, one in self.targets[number].parameters:
                dense = one.grad is not None and not one.grad.is_sparse and one.is_floating_point()
                if dense and one.device == self.device and local(one).numel():
                    moving.setdefault(number, []).append(one)
        self._before = (moving, _weights(moving)) if moving else None

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Count these weights, what was added to them, and how many have a gradient and did not move."""
        if self._before is None:
            return
        (moving, old), self._before = self._before, None
        new = _weights(moving)
        moved = new - old
        lengths = [sum(thinned(local(one)).numel() for one in parameters) for parameters in moving.values()]
        held = [sum(local(one).numel() for one in parameters) for parameters in moving.values()]
        for part, numbers in ((Part.WEIGHT, new), (Part.UPDATE, moved), (Part.RATIO, ratios(moved, old))):
            for number, count, piece in zip(moving, held, numbers.split(lengths), strict=True):
                self._add(Counted(number, part, step, 1.0, count), piece)
        self._count_stuck(moving, moved)

    def _count_stuck(self, moving: dict[int, list[nn.Parameter]], moved: Tensor) -> None:
        """Count, of weights in 16 bits, the numbers that have a gradient, and those of them that did not move."""
        every = [(number, one) for number, parameters in moving.items() for one in parameters]
        pieces = moved.split([thinned(local(one)).numel() for _, one in every])
        narrow = [
            (number, thinned(local(one.grad)), piece)
            for (number, one), piece in zip(every, pieces, strict=True)
            if one.grad is not None and one.dtype in _HALF
        ]
        if not narrow:
            return
        owners, gradients, still = zip(*narrow, strict=True)
        wanted = torch.cat(gradients) != 0
        stuck = wanted & (torch.cat(still) == 0)
        lengths = [one.numel() for one in still]
        counts = [torch.stack(norms(mask.float().split(lengths), 1.0)) for mask in (stuck, wanted)]
        self._stuck.index_add_(0, index_on(owners, self.device), torch.stack(counts, -1).double())

    def take(self, *, activations: bool = True) -> tuple[list[Counted], list[Tensor], Any]:
        """Return what was counted since the last time, and count from zero again.

        Args:
            activations: Whether activations, their gradients and casts are among it; else these are kept for the next time.

        Returns:
            What each row counts; the rows ``counts`` and ``largest``, the stuck numbers, and the rows of casts, on the device;
            and the places of casts.
        """
        taken = {slot: one for slot, one in self._used.items() if activations or one.part not in _ACTIVATIONS}
        self._counter.flush()
        index = index_on(list(taken), self.device)
        places, casts = self._casts.take() if activations and self._casts is not None else ([], None)
        tensors = [
            self._counter.counts[index],
            self._counter.largest[index],
            self._stuck.clone(),
            torch.zeros(0, 4) if casts is None else casts,
        ]
        self._stuck.zero_()
        self._clear(list(taken))
        if activations:
            self._casts = None
        return list(taken.values()), tensors, places

    def forget_activations(self) -> None:
        """Drop what was counted of activations, their gradients and casts since the last time."""
        self._counter.flush()
        self._clear([slot for slot, one in self._used.items() if one.part in _ACTIVATIONS])
        self._casts = None

    def _clear(self, slots: list[int]) -> None:
        """Count from zero in some slots."""
        index = index_on(slots, self.device)
        self._counter.counts[index] = 0
        self._counter.largest[index] = 0
        for slot in slots:
            del self._used[slot]


def _weights(moving: dict[int, list[nn.Parameter]]) -> Tensor:
    """Return some numbers of each parameter, one parameter after the other, in FP32."""
    return torch.cat([thinned(local(one)) for parameters in moving.values() for one in parameters]).float()
