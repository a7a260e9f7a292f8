"""A step of training, run again with the same random numbers, and without a trace left in the model.

Where ranks run it together they agree beforehand that all have room for it: one that gives up on the way would leave the
others in an exchange, so that ends training on all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.errors import TrainingError
from narrowcast.training.doctor.exchange import gather, ranks
from narrowcast.training.doctor.paths import bare
from narrowcast.training.policies import Precision
from narrowcast.training.random_state import random_state, set_random_state
from narrowcast.training.window import Loss, outputs_of

__all__ = ["NoRoomError", "Outcome", "PartedError", "Scene", "has_room", "local", "restored", "run", "spread", "whole"]

Batch = tuple[Any, Any]
#: A replay takes more than the step that it repeats: nothing is compiled, and ranges are counted in copies. One too many that
#: is given up costs less than one that ends training.
_MARGIN = 1.5


class NoRoomError(RuntimeError):
    """A replay does not fit the memory beside the run; where ranks run it together, on all of them."""


class PartedError(TrainingError):
    """This rank has left a replay that the others are in."""


@dataclass(frozen=True)
class Scene:
    """All that one micro-batch of a step depends on.

    Attributes:
        model: The model as it is now; replicas of other ranks stay out of it.
        loss: As :class:`narrowcast.training.Trainer` takes it.
        batch: Inputs and targets.
        precision: The policy.
        scale: What the loss is multiplied by.
        random: Where the generators stood; None to go on from where they are.
        step: Updates done before.
        rank: Number of this process.

    Where parameters are spread over ranks, whatever came together for a forward pass is apart again: what names parameters,
    and what keeps their gradients aside, sees each rank's own.
    """

    model: nn.Module
    loss: Callable[[Any, Any], Any]
    batch: Batch
    precision: Precision
    scale: float = 1.0
    random: Mapping[str, Any] | None = field(default=None, repr=False)
    step: int = 0
    rank: int = 0

    def __post_init__(self) -> None:
        if self.together:
            from narrowcast.training.sharding import reshard

            reshard(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model is; the CPU if it holds no parameters, as where a loss holds all of them."""
        return next((one.device for one in self.model.parameters()), torch.device("cpu"))

    @property
    def together(self) -> bool:
        """Whether the parameters are spread over ranks: then no rank can run the scene alone, and all have to."""
        return spread(self.model)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """What may keep something between steps: the model, and the loss if it is a module."""
        return (self.model, self.loss) if isinstance(self.loss, nn.Module) else (self.model,)

    def but(self, **changes: Any) -> Scene:
        """Return the scene with something changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Outcome:
    """What a replay came to on this rank; its last four are of all ranks that ran it together.

    Attributes:
        loss: The mean loss.
        loss_tensor: The tensor it was read from.
        broken: Parameters whose gradients are not finite, in the order of the backward pass.
        gradients: Gradients by parameter.
        loss_finite: Whether the loss is finite.
        finite: Whether loss and gradients are.
        filled: How many numbers of each gradient are not zero.
        nonzero: Share of the gradients' numbers that are not zero.
    """

    loss: float
    loss_tensor: Tensor
    broken: tuple[str, ...]
    gradients: Mapping[str, Tensor]
    loss_finite: bool
    finite: bool
    filled: Mapping[str, int]
    nonzero: float

    @property
    def broken_tensors(self) -> tuple[Tensor, ...]:
        """The gradients that are not finite."""
        return tuple(self.gradients[name] for name in self.broken)


def spread(model: nn.Module) -> bool:
    """Return whether a model's parameters are spread over ranks."""
    if ranks() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule  # its parameters are plain tensors while they are together
    from torch.distributed.tensor import DTensor

    found = any(isinstance(one, DTensor) for one in model.parameters())
    return found or any(isinstance(one, FSDPModule) for one in model.modules())


def run(scene: Scene, *around: AbstractContextManager[Any]) -> Outcome:
    """Run a scene's forward and backward pass.

    Args:
        scene: What to run; all ranks have to run theirs where it runs together. Of the model, and of a loss that is a module,
            parameters, gradients, buffers and attributes are as before afterwards, and so are random states; the optimizer is
            not asked. Compiled parts run uncompiled.
        around: Contexts in which it runs, the outermost first.

    Raises:
        NoRoomError: Memory is missing; nothing has run where ranks run together.
        PartedError: Memory is missing on this rank alone, after all had agreed that there is enough.
    """
    with ExitStack() as stack:
        _prepare(scene, stack)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if scene.random is not None:
            set_random_state(scene.random)
        for context in around:
            stack.enter_context(context)
        try:
            return _run(scene)
        except torch.OutOfMemoryError as error:
            if not scene.together:
                raise NoRoomError(str(error)) from error
            raise PartedError(
                f"the doctor's replay of step {scene.step} ran out of memory on rank {scene.rank}, where there had seemed to "
                "be room",
                next_step="train in smaller batches or without the doctor (--set doctor=off, or watch=None); --resume goes on "
                "from the last checkpoint",
            ) from error


def _prepare(scene: Scene, stack: ExitStack) -> None:
    """Keep what is to be put back, on all ranks or on none."""
    ready = not scene.together or has_room(scene)
    try:
        if ready:
            stack.enter_context(restored(*scene.modules))
    except torch.OutOfMemoryError:
        ready = False
    if scene.together:
        ready = all(text == "ready" for text in gather("ready" if ready else "no room", scene.device))
    if not ready:
        raise NoRoomError("the replay does not fit the device's memory")


def has_room(scene: Scene) -> bool:
    """Return whether a GPU has room for what its largest step so far took, with the gradients of the run kept aside."""
    device = scene.device
    if device.type != "cuda":
        return True  # the system gives main memory until there is none
    held = torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - held
    aside = sum(local(one.grad).nbytes for one in scene.model.parameters() if one.grad is not None)
    return free >= _MARGIN * (torch.cuda.max_memory_allocated(device) - held + aside)


def _run(scene: Scene) -> Outcome:
    model = bare(scene.model)
    inputs, targets = scene.batch
    with torch.enable_grad(), scene.precision.running(scene.device):
        with scene.precision.autocast(scene.device):
            value = scene.loss(outputs_of(model, scene.precision.inputs(inputs)), targets)
        mean = value.total / value.weight if isinstance(value, Loss) else value
        if mean.requires_grad:
            (mean.float() * scene.scale).backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    broken = tuple(name for name in reversed(gradients) if not bool(local(gradients[name]).isfinite().all()))
    filled = {name: int(torch.count_nonzero(local(grad))) for name, grad in gradients.items()}
    numbers = sum(local(grad).numel() for grad in gradients.values())
    loss_finite = bool(torch.isfinite(mean.detach()).all())
    said = [(loss_finite, not broken, filled, numbers)]
    if scene.together:
        said = [json.loads(text) for text in gather(json.dumps(said[0]), scene.device)]
    losses, sound, filled_on, numbers_on = zip(*said, strict=True)
    filled = {name: sum(one[name] for one in filled_on) for name in filled}
    return Outcome(
        loss=float(mean.detach()),
        loss_tensor=mean.detach(),
        broken=broken,
        gradients=gradients,
        loss_finite=all(losses),
        finite=all(losses) and all(sound),
        filled=filled,
        nonzero=sum(filled.values()) / max(sum(numbers_on), 1),
    )


def local(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor that this process holds."""
    if tensor.is_sparse:
        return tensor.coalesce().values()
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor that all processes hold; every process has to ask for those of a sharded one."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def restored(*roots: nn.Module) -> Generator[None]:
    """Put back gradients, buffers, each module's class and attributes, and the random states when the context ends.

    Of attributes it is the binding: what a forward pass writes into a list that a module holds stays there.
    """
    states = random_state()
    gradients = [(one, one.grad) for root in roots for one in root.parameters()]
    buffers = [(one, one.clone()) for root in roots for one in root.buffers()]
    parts = [part for root in roots for part in root.modules()]
    modules = [(part, part.__class__, dict(vars(part)), dict(_named_buffers(part))) for part in parts]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, grad in gradients:
                parameter.grad = grad
            for part, kind, attributes, named in modules:
                part.__class__ = kind
                for name in vars(part).keys() - attributes.keys():
                    del vars(part)[name]
                vars(part).update(attributes)
                _named_buffers(part).update(named)
            for buffer, value in buffers:
                buffer.copy_(value)
        set_random_state(states)


def _named_buffers(part: Any) -> dict[str, Tensor | None]:
    """Return a module's own buffers, which a forward pass may replace as well as write to."""
    return part._buffers
