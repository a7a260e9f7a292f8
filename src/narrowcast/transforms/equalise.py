"""Cross-layer equalisation: even out the channel ranges of activations, at the cost of the weights that read them.

Channel c of a tensor is divided by r[c] and the weights that read it are multiplied by r[c]; the function stays the
same. Tensors tied by additions and pooling share one r. Source: M. Nagel et al., "Data-Free Quantization Through Weight
Equalization and Bias Correction", 2019, section 4.1; extended here to residual classes.

Tensors with an upper bound (after a ReLU6) are left alone: their bound would become one per channel, which a single
quantizer cannot stand for, and with it they gain nothing on inputs that were not calibrated on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from narrowcast.models.graph import Graph, attribute
from narrowcast.transforms.groups import Group, activation_bounds
from narrowcast.transforms.insertion import scale_inputs
from narrowcast.transforms.ranges import TensorStatistics

__all__ = ["EqualisedClass", "equalise", "find_classes"]

Array = NDArray[Any]

#: Largest ratio between two channels that is evened out.
SPREAD = 64.0
#: How far the channels come together. All the way, every channel would fill the range to its end, and none would have
#: room for inputs a little larger than those calibrated on.
STRENGTH = 0.75
_TIES = {"Relu", "Clip", "Add", "GlobalAveragePool", "AveragePool", "MaxPool"}


@dataclass
class EqualisedClass:
    """Tensors that share one factor per channel, and the weights around them.

    Attributes:
        tensors: Names of the tensors.
        factor: What each channel is divided by, at most 1.
        writers: Names of the operators whose weights make the tensors.
        readers: Names of the operators whose weights read them.
    """

    tensors: frozenset[str]
    factor: Array
    writers: tuple[str, ...]
    readers: tuple[str, ...]


@dataclass
class _Class:
    tensors: set[str] = field(default_factory=set[str])
    writers: list[NodeProto] = field(default_factory=list[NodeProto])
    readers: list[NodeProto] = field(default_factory=list[NodeProto])
    blocked: bool = False


def find_classes(graph: Graph, groups: list[Group], statistics: Mapping[str, TensorStatistics]) -> list[EqualisedClass]:
    """Return the classes of tensors whose channels can be evened out, with the factor that does it.

    Args:
        graph: The FP32 graph.
        groups: The groups that may be quantised; classes that touch other weights are left alone.
        statistics: Statistics per tensor, with channel extremes.
    """
    found: list[EqualisedClass] = []
    for item in _classes(graph, {group.name for group in groups}):
        ranges = [_channel_range(statistics[name]) for name in sorted(item.tensors) if name in statistics]
        ranges = [r for r in ranges if r is not None]
        if item.blocked or not item.writers or not item.readers or len({len(r) for r in ranges}) != 1:
            continue
        found.append(
            EqualisedClass(
                frozenset(item.tensors),
                _factor(np.max(ranges, axis=0)),
                tuple(node.name for node in item.writers),
                tuple(node.name for node in item.readers),
            )
        )
    return found


def equalise(graph: Graph, classes: list[EqualisedClass]) -> Graph:
    """Return an equalised copy of a graph."""
    graph = graph.copy()
    nodes = {node.name: node for node in graph.nodes}
    for found in classes:
        for node in (nodes[name] for name in found.writers):
            for position, name in list(enumerate(node.input))[1:]:
                if name:
                    value = graph.constants[name]
                    scaled = value / found.factor.reshape(-1, *[1] * (value.ndim - 1))
                    node.input[position] = graph.constant(f"{name}.eq", scaled.astype(np.float32))
        for node in (nodes[name] for name in found.readers):
            weight = scale_inputs(graph.constants[node.input[1]], attribute(node, "group", 1), found.factor)
            node.input[1] = graph.constant(f"{node.input[1]}.eq", weight)
    return graph


def _classes(graph: Graph, anchors: set[str]) -> list[_Class]:
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    ties = [node for node in graph.nodes if _is_tie(graph, node)]
    for node in ties:
        for name in node.input:
            if name and name not in graph.constants:
                parent[find(name)] = find(node.output[0])
    classes: dict[str, _Class] = {}

    def of(name: str) -> _Class:
        found = classes.setdefault(find(name), _Class())
        found.tensors.add(name)
        return found

    tied = {id(node) for node in ties}
    for node in graph.nodes:
        if id(node) in tied:
            of(node.output[0]).blocked |= node.op_type == "Clip" and activation_bounds(graph, node)[1] < np.inf
            continue
        is_weighted = node.op_type == "Conv" and node.name in anchors and node.input[1] in graph.constants
        for name in filter(None, node.input):
            if name not in graph.constants and graph.rank(name) == 4:
                of(name).readers.append(node)
                of(name).blocked |= not is_weighted
        for name in filter(None, node.output):
            if graph.rank(name) == 4:
                of(name).writers.append(node)
                of(name).blocked |= not is_weighted
    for info in (*graph.inputs, *graph.outputs):
        if len(info.shape) == 4:
            of(info.name).blocked = True
    return list(classes.values())


def _is_tie(graph: Graph, node: NodeProto) -> bool:
    if node.op_type not in _TIES or graph.rank(node.output[0]) != 4:
        return False
    activations = [name for name in node.input if name and name not in graph.constants]
    if node.op_type == "Add":
        return len(activations) == 2 and all(graph.rank(name) == 4 for name in activations)
    if node.op_type == "Clip":
        return len(activations) == 1 and activation_bounds(graph, node)[0] == 0.0
    return True


def _channel_range(stats: TensorStatistics) -> Array | None:
    if stats.channel_low is None or stats.channel_high is None:
        return None
    return np.maximum(np.abs(stats.channel_low), np.abs(stats.channel_high)).astype(np.float64)


def _factor(activation: Array) -> Array:
    """Return r, at most 1.

    The channel with the largest magnitude keeps its values and no other grows beyond it.
    """
    largest = activation.max()
    share = np.maximum(activation / largest, 1 / SPREAD) if largest > 0 else np.ones_like(activation)
    return (share**STRENGTH).astype(np.float32)
