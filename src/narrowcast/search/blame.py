"""Which operator groups are to blame for the error, from one pass over a few calibration samples.

Each group is quantised alone in the exact graph and its error is carried to the outputs. This is simulation: it orders the
groups for the search and never stands as a result.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrowcast.data.dataset import Dataset
from narrowcast.models.execution import StagedExecutor, session_of
from narrowcast.models.graph import Graph
from narrowcast.recipes.target import FusionRules
from narrowcast.transforms.calibration import calibrate, sample_batch
from narrowcast.transforms.groups import Group, boundaries, find_groups, quantised_groups, root_of
from narrowcast.transforms.ranges import METHODS, Quantizer, quantizer_of
from narrowcast.transforms.rounding import WeightLayout, channel_scales, quantise_weight
from narrowcast.transforms.walk import noise_share

__all__ = ["GroupBlame", "blame_groups"]

Array = NDArray[Any]

SAMPLES = 6
CALIBRATION_SAMPLES = 48


@dataclass(frozen=True)
class GroupBlame:
    """A group, the noise that it alone brings to the outputs (as a share of their energy), and its time in FP32."""

    group: str
    op_type: str
    noise: float
    seconds: float


def blame_groups(
    graph: Graph,
    data: Dataset,
    rules: FusionRules,
    progress: Callable[[float], None] | None = None,
) -> list[GroupBlame]:
    """Return the groups by the noise that each alone brings to the outputs, the worst first.

    Args:
        graph: The FP32 graph.
        data: Calibration samples.
        rules: What the target runtime fuses.
        progress: Called with the share that is done.
    """
    every = find_groups(graph, rules)
    groups = {group.name: group for group in quantised_groups(graph, every, rules, frozenset())}
    producers = graph.producers()
    roots = {root_of(name, producers, rules) for group in groups.values() for name in group.inputs}
    executor = StagedExecutor(graph, boundaries(every), roots)
    quantizers = _quantizers(graph, list(groups.values()), roots, executor, data, rules)
    feeds = sample_batch(data, SAMPLES)
    reference = executor.run_from(0, feeds)
    found: list[GroupBlame] = []
    tensors = dict(feeds)
    for index, stage in enumerate(executor.stages):
        begin = time.perf_counter()
        made = executor.run_stage(index, tensors)
        seconds = (time.perf_counter() - begin) / SAMPLES
        group = groups.get(stage.name)
        if group is not None:
            disturbed = _alone(
                graph, group, tensors, quantizers, {n: root_of(n, producers, rules) for n in group.inputs}
            )
            if group.output in quantizers and group.op_type in rules.integer_output | rules.elementwise | rules.pooling:
                disturbed = quantizers[group.output].apply(disturbed)
            outputs = executor.run_from(index + 1, tensors | made | {group.output: disturbed})
            noise = sum(noise_share(reference[name], outputs[name]) for name in reference)
            found.append(GroupBlame(group.name, group.op_type, noise, seconds))
        tensors |= made
        executor.free(index, tensors)
        if progress is not None:
            progress((index + 1) / len(executor.stages))
    return sorted(found, key=lambda item: -item.noise)


def _quantizers(
    graph: Graph, groups: list[Group], roots: set[str], executor: StagedExecutor, data: Dataset, rules: FusionRules
) -> dict[str, Quantizer]:
    tensors = roots | {group.output for group in groups}
    few = data.take(np.unique(np.linspace(0, data.size - 1, min(data.size, CALIBRATION_SAMPLES)).astype(np.int64)))
    statistics = calibrate(executor, few, tensors)
    return {name: quantizer_of(*METHODS["mse"](s), rules.signed_activations, "mse") for name, s in statistics.items()}


def _alone(
    graph: Graph, group: Group, tensors: dict[str, Array], quantizers: dict[str, Quantizer], roots: dict[str, str]
) -> Array:
    """Return a group's output when it alone reads quantised inputs through quantised weights."""
    nodes = {node.name: node for node in graph.nodes}
    feeds = {n: quantizers[roots[n]].apply(tensors[n]) if roots[n] in quantizers else tensors[n] for n in group.inputs}
    constants = dict(graph.constants)
    if group.weight is not None:
        layout = WeightLayout.of(nodes[group.name], constants[group.weight])
        matrix = layout.to_matrix(constants[group.weight])
        scale = channel_scales(matrix)
        constants[group.weight] = layout.from_matrix(quantise_weight(matrix, scale) * scale)
    inner = Graph(graph.nodes, constants, [], [], graph.values, graph.opsets)
    session = session_of(inner.subgraph([nodes[name] for name in group.nodes], [group.output]))
    return np.asarray(session.run(None, feeds)[0])
