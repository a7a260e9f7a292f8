"""Where the noise of a quantised graph comes from, tensor by tensor and weight by weight.

Each is rounded alone in the exact graph and its error is carried to the outputs. This is simulation: it guides the search
and never stands as a result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from narrowcast.artifacts.manifest import Blame
from narrowcast.data.dataset import Dataset
from narrowcast.recipes.target import FusionRules
from narrowcast.transforms.calibration import sample_batch
from narrowcast.transforms.groups import root_of
from narrowcast.transforms.insertion import Disturbance, insertion_noise, rounded_tensor, rounded_weight
from narrowcast.transforms.operators import Operators
from narrowcast.transforms.ranges import Quantizer
from narrowcast.transforms.static_int8 import INSERTION_SAMPLES, Prepared

__all__ = ["Source", "blame_of", "noise_sources"]


@dataclass(frozen=True)
class Source:
    """One rounding: of a group's weight, or of an activation tensor.

    Attributes:
        noise: Energy that it alone brings to the outputs, as a share of theirs.
        writer: Group whose weight it is, or that makes the tensor in integers; None for others.
        readers: Groups that read the tensor; none for a weight.
        elements: Values of the tensor per sample; 0 for a weight.
    """

    noise: float
    writer: str | None
    readers: tuple[str, ...] = ()
    elements: int = 0


def noise_sources(
    prepared: Prepared,
    quantizers: Mapping[str, Quantizer],
    data: Dataset,
    rules: FusionRules,
    progress: Callable[[float], None] | None = None,
) -> list[Source]:
    """Return all roundings of a graph with no group in FP32, in no special order.

    Args:
        prepared: The graph as it was quantised.
        quantizers: Its quantizers.
        data: Calibration samples.
        rules: What the target runtime fuses.
        progress: Called with the share that is done.
    """
    operators, producers = Operators(prepared.graph), prepared.graph.producers()
    disturbances: dict[str, list[Disturbance]] = {}
    about: dict[str, list[tuple[str | None, tuple[str, ...], str | None]]] = {}
    written = rules.integer_output
    makers = {g.output: g.name for g in prepared.groups if g.kind != "linear" or g.op_type in written}
    readers: dict[str, list[str]] = {}
    moved: dict[str, list[str]] = {}
    for group in prepared.groups:
        for name in group.inputs:
            root = root_of(name, producers, rules)
            readers.setdefault(root, []).append(group.name)
            if root != name:
                moved.setdefault(root, []).append(name)
        if group.kind == "linear":
            disturbances.setdefault(group.output, []).append(rounded_weight(operators, group))
            about.setdefault(group.output, []).append((group.name, (), None))
    for tensor in sorted(prepared.tensors & quantizers.keys()):
        disturbances.setdefault(tensor, []).append(rounded_tensor(tensor, quantizers[tensor]))
        about.setdefault(tensor, []).append((makers.get(tensor), tuple(readers.get(tensor, ())), tensor))
    noise = insertion_noise(prepared.executor, sample_batch(data, INSERTION_SAMPLES), disturbances, progress, moved)
    sample = sample_batch(data, 1)
    sizes = {name: values.size for name, values in sample.items()}
    for _, alive in prepared.executor.walk(sample):
        sizes |= {name: values.size for name, values in alive.items()}
    return [
        Source(value, writer, read, 0 if tensor is None else sizes[tensor])
        for name, values in noise.items()
        for value, (writer, read, tensor) in zip(values, about[name], strict=True)
    ]


def blame_of(prepared: Prepared, sources: list[Source], seconds: Mapping[str, float]) -> list[Blame]:
    """Return the blame of each group, the worst first: what its weight brings, and the tensor that it makes.

    An input of the graph is the blame of the groups that read it.

    Args:
        prepared: The graph as it was quantised.
        sources: Its roundings.
        seconds: Time of each group in FP32 on the target runtime, where it is known.
    """
    noise = {group.name: 0.0 for group in prepared.groups}
    for source in sources:
        for name in source.readers if source.writer is None else (source.writer,):
            noise[name] += source.noise
    found = [
        Blame(group=g.name, op_type=g.op_type, noise=noise[g.name], seconds=seconds.get(g.name, 0.0))
        for g in prepared.groups
    ]
    return sorted(found, key=lambda item: -item.noise)
