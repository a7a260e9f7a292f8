"""Features of a network: the outputs of its modules, and a student that hands them out in the teacher's width.

Channels are the last axis of tensors with up to three axes (``[N, C]``, ``[N, tokens, C]``), and the second of those with more
(``[N, C, height, width]``).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.errors import TrainingError, choices

__all__ = [
    "Inputs",
    "Student",
    "StudentOutputs",
    "Taps",
    "called",
    "channels",
    "distance",
    "evaluating",
    "first",
    "matching",
    "mean_square",
    "tensors",
]

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


class StudentOutputs(NamedTuple):
    """What a `Student` in training returns: the network's outputs, and its features in the teacher's width."""

    outputs: Any
    features: tuple[Tensor, ...]


class Student(nn.Module):
    """A network that in training also hands out features, projected to the teacher's widths.

    In evaluation mode it returns what the network returns. The network keeps its own state: save ``network.state_dict()``.

    Args:
        network: The network that learns.
        names: Modules whose outputs are the features.
        example: A few samples, from which the features' shapes are read.
        wanted: The teacher's features of these samples.

    Raises:
        TrainingError: Two features cannot be compared.
    """

    def __init__(self, network: nn.Module, names: Sequence[str], example: Inputs, wanted: Sequence[Tensor]) -> None:
        super().__init__()
        self.network = network
        self._taps = Taps(network, names)
        with torch.no_grad(), evaluating(network), self._taps:
            called(network, example)
            found = self._taps.take()
        self.projections = nn.ModuleList(map(_projection, names, found, wanted))

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return the network's outputs; in training, `StudentOutputs`."""
        if not self.training:
            return self.network(*inputs, **named)
        with self._taps:
            outputs = self.network(*inputs, **named)
            features = self._taps.take()
        return StudentOutputs(outputs, tuple(map(_project, self.projections, features)))


class Taps:
    """The outputs of some modules, kept while it is entered, in the order of their names; of several calls, the last."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        self._names = list(names)
        self._kept: dict[str, Any] = {}
        self._open = False
        for name in dict.fromkeys(names):
            network.get_submodule(name).register_forward_hook(self._keeper(name))

    def _keeper(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._open:
                self._kept[name] = output

        return keep

    def __enter__(self) -> None:
        self._open = True

    def __exit__(self, *error: object) -> None:
        self._open = False
        self._kept.clear()

    def take(self) -> tuple[Tensor, ...]:
        """Return what was kept.

        Raises:
            TrainingError: A module did not run, or returned no tensor.
        """
        taken: list[Tensor] = []
        for name in self._names:
            if name not in self._kept:
                raise TrainingError(
                    f"module {name!r} did not run, so it has no feature",
                    next_step="name a module that the forward pass calls",
                )
            kept = self._kept[name]
            kept = kept[0] if isinstance(kept, tuple) and kept else kept
            if not isinstance(kept, Tensor):
                raise TrainingError(
                    f"module {name!r} returns {type(kept).__name__}, which is no feature",
                    allowed="modules that return a tensor, or a tuple that begins with one",
                )
            taken.append(kept)
        return tuple(taken)


def matching(network: nn.Module, pattern: str, whose: str) -> list[str]:
    """Return the names of a network's modules that a pattern matches.

    Raises:
        TrainingError: It matches none.
    """
    parts = pattern.split(".")
    names = [name for name, _ in network.named_modules() if name]
    found = [
        name for name in names if len(name.split(".")) == len(parts) and all(map(fnmatchcase, name.split("."), parts))
    ]
    if not found:
        shown = names if len(names) <= 24 else [name for name in names if name.count(".") <= pattern.count(".")][:24]
        raise TrainingError(f"{whose} has no module {pattern!r}", allowed=choices(pattern, shown))
    return found


def _projection(name: str, student: Tensor, teacher: Tensor) -> nn.Module:
    """Return a layer from the student's width to the teacher's; the identity where they are equal.

    Raises:
        TrainingError: The features cannot be compared.
    """
    axis = channels(teacher)
    mine, theirs = list(student.shape), list(teacher.shape)
    same = mine[:axis] == theirs[:axis] if teacher.ndim <= 3 else mine[0] == theirs[0]
    if student.ndim != teacher.ndim or not 2 <= teacher.ndim <= 5 or not same:
        raise TrainingError(
            f"the student's feature {name!r} is {mine}, the teacher's {theirs}: they cannot be compared",
            allowed="2 to 5 axes alike; widths may differ, and so may heights and widths of maps",
        )
    if mine[axis] == theirs[axis]:
        return nn.Identity()
    if teacher.ndim <= 3:
        return nn.Linear(mine[axis], theirs[axis], device=student.device)
    pointwise = nn.Conv2d if teacher.ndim == 4 else nn.Conv3d
    return pointwise(mine[axis], theirs[axis], kernel_size=1, device=student.device)


def _project(projection: nn.Module, feature: Tensor) -> Tensor:
    return projection(feature)


def channels(tensor: Tensor) -> int:
    """Return the axis of the channels: see the module."""
    return 1 if tensor.ndim > 3 else tensor.ndim - 1


def mean_square(feature: Tensor) -> Tensor:
    """Return the mean square of a feature, above 0: FP32, 0-d."""
    return feature.float().square().mean().clamp(min=torch.finfo(torch.float32).tiny)


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of two features, FP32, 0-d; the larger map is averaged down."""
    student, teacher = student.float(), teacher.float()
    if student.ndim > 3:
        sizes = torch.Size(min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True))
        student, teacher = _pooled(student, sizes), _pooled(teacher, sizes)
    return F.mse_loss(student, teacher)


def _pooled(feature: Tensor, sizes: torch.Size) -> Tensor:
    if feature.shape[2:] == sizes:
        return feature
    if len(sizes) == 2:
        return F.adaptive_avg_pool2d(feature, (sizes[0], sizes[1]))
    return F.adaptive_avg_pool3d(feature, (sizes[0], sizes[1], sizes[2]))


def called(network: nn.Module, inputs: Inputs) -> Any:
    """Return what a network gives for inputs: one tensor, positional ones, or keywords."""
    if isinstance(inputs, dict):
        return network(**inputs)
    return network(*inputs) if isinstance(inputs, tuple) else network(inputs)


def tensors(inputs: Inputs) -> list[Tensor]:
    """Return the tensors of inputs, in their order."""
    if isinstance(inputs, Tensor):
        return [inputs]
    return list(inputs.values() if isinstance(inputs, dict) else inputs)


def first(inputs: Inputs) -> Tensor:
    """Return the first tensor of inputs."""
    return tensors(inputs)[0]


@contextmanager
def evaluating(network: nn.Module) -> Generator[None]:
    """Keep statistics and dropout still; every module is put back into the mode that it had."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
