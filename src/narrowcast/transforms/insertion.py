"""How much noise one rounding alone brings to the outputs of a model: everything else stays exact.

The noise of many small roundings adds up, so that these numbers tell where the noise of a quantised graph comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrowcast.data.dataset import Tensors
from narrowcast.models.execution import StagedExecutor
from narrowcast.models.graph import attribute
from narrowcast.transforms.groups import Group
from narrowcast.transforms.operators import Operators, add_to_channels, mean_error
from narrowcast.transforms.ranges import Quantizer
from narrowcast.transforms.rounding import WeightLayout, channel_scales, quantise_weight

__all__ = ["Disturbance", "insertion_noise", "noise_share", "rounded_tensor", "rounded_weight", "scale_inputs"]

Array = NDArray[Any]
#: Makes a disturbed tensor of the tensors that are alive (among them the exact one).
Disturbance = Callable[[Tensors], Array]


def noise_share(exact: Array, other: Array) -> float:
    """Return the energy of the difference as a share of the energy of the signal."""
    if exact.dtype.kind != "f" or exact.size == 0:
        return 0.0
    if exact.shape != other.shape:  # as many values as the data ask for: none of them can be compared
        return 1.0
    signal, difference = exact.reshape(-1), (exact - other).reshape(-1)
    return float(np.vdot(difference, difference)) / max(float(np.vdot(signal, signal)), 1e-30)


def insertion_noise(
    executor: StagedExecutor,
    feeds: Tensors,
    disturbances: Mapping[str, Sequence[Disturbance]],
    progress: Callable[[float], None] | None = None,
    moved: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, list[float]]:
    """Return, for each disturbance of each tensor, the noise that it alone brings to the outputs.

    Args:
        executor: The FP32 graph; each disturbed tensor must be an input or the output of a stage.
        feeds: Samples.
        disturbances: What to do to each tensor, by its name.
        progress: Called with the share that is done.
        moved: Tensors that hold the values of another one, only moved about, by the name of that one.
    """
    reference = executor.run_from(0, feeds)
    found: dict[str, list[float]] = {}

    def disturb(stage: int, alive: Tensors, made: Tensors) -> None:
        for tensor in sorted(disturbances.keys() & made.keys()):
            for disturbance in disturbances[tensor]:
                changed = {tensor: disturbance(alive)}
                for name in (moved or {}).get(tensor, ()):
                    if name in alive:  # made in the same stage as the tensor, and so before it was disturbed
                        changed[name] = disturbance(alive | {tensor: alive[name]})
                outputs = executor.run_from(stage, alive | changed)
                noise = sum(noise_share(reference[name], outputs[name]) for name in reference)
                found.setdefault(tensor, []).append(noise)

    tensors = dict(feeds)
    disturb(0, tensors, tensors)
    for index in range(len(executor.stages)):
        made = executor.run_stage(index, tensors)
        disturb(index + 1, tensors | made, made)
        tensors |= made
        executor.free(index, tensors)
        if progress is not None:
            progress((index + 1) / len(executor.stages))
    return found


def rounded_tensor(tensor: str, quantizer: Quantizer, factor: Array | None = None) -> Disturbance:
    """Return the disturbance that rounds an activation tensor, its channels (axis 1) divided by a factor meanwhile."""

    def disturb(alive: Tensors) -> Array:
        values = alive[tensor]
        if factor is None:
            return quantizer.apply(values)
        shaped = factor.reshape(-1, *[1] * (values.ndim - 2))
        return quantizer.apply(values / shaped) * shaped

    return disturb


def rounded_weight(operators: Operators, group: Group, factor: Array | None = None) -> Disturbance:
    """Return the disturbance that rounds a linear group's weight to nearest and takes the mean error out.

    Args:
        operators: The graph's operators.
        group: The group.
        factor: What each input channel of a convolution's weight is multiplied by while it is rounded.
    """
    node = operators.nodes[group.name]
    weight = operators.graph.constants[group.weight or ""]
    layout = WeightLayout.of(node, weight)
    scaled = weight if factor is None else scale_inputs(weight, attribute(node, "group", 1), factor)
    matrix = layout.to_matrix(scaled)
    scale = channel_scales(matrix)
    rounded = layout.from_matrix((quantise_weight(matrix, scale) * scale).astype(np.float32))
    if factor is not None:
        rounded = scale_inputs(rounded, attribute(node, "group", 1), 1 / factor)

    def disturb(alive: Tensors) -> Array:
        feeds = {name: alive[name] for name in group.inputs}
        exact = operators.before_activation(group, feeds)
        values = operators.before_activation(group, feeds, rounded)
        return operators.activate(group, add_to_channels(group, values, mean_error(group, exact, values)))

    return disturb


def scale_inputs(weight: Array, groups: int, factor: Array) -> NDArray[np.float32]:
    """Return a convolution's weight with each input channel multiplied by a factor."""
    columns = factor.reshape(groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
    shaped = weight.reshape(groups, len(weight) // groups, *weight.shape[1:]) * columns
    return shaped.reshape(weight.shape).astype(np.float32)
