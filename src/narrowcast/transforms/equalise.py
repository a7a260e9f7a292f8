"""Cross-layer equalisation: even out the channel ranges of activations, at the cost of the weights that read them.

Channel c of a tensor is divided by r[c] and the weights that read it are multiplied by r[c]; the function stays the
same. Tensors tied by additions and pooling share one r. Source: M. Nagel et al., "Data-Free Quantization Through Weight
Equalization and Bias Correction", 2019, section 4.1; extended here to residual classes and to clipped activations, whose
upper bound becomes a constant per channel (quantisation then stands for it, so that nothing is computed for it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from narrowcast.models.graph import Graph, attribute, make_node
from narrowcast.transforms.groups import Group, activation_bounds
from narrowcast.transforms.ranges import TensorStatistics

__all__ = ["equalise"]

Array = NDArray[Any]

#: Largest ratio between the factors of two channels of one tensor.
SPREAD = 64.0
#: Share of the strength where weights of several channels share a scale: the weights pay for what the activations gain.
DENSE = 0.5
_TIES = {"Relu", "Clip", "Add", "GlobalAveragePool", "AveragePool", "MaxPool"}


@dataclass
class _Class:
    """Tensors that share one factor per channel, and the weights around them."""

    tensors: set[str] = field(default_factory=set[str])
    writers: list[NodeProto] = field(default_factory=list[NodeProto])
    readers: list[NodeProto] = field(default_factory=list[NodeProto])
    clips: list[NodeProto] = field(default_factory=list[NodeProto])
    blocked: bool = False


def equalise(
    graph: Graph, groups: list[Group], statistics: Mapping[str, TensorStatistics], strength: float = 0.5
) -> tuple[Graph, dict[str, Array]]:
    """Return an equalised copy of a graph, and the factors of each tensor that was changed.

    Args:
        graph: The FP32 graph.
        groups: The groups that will be quantised; classes that touch other weights are left alone, because a clipped
            activation may only be rewritten where quantisation stands for it.
        statistics: Statistics per tensor, with channel extremes.
        strength: How far the weights pay for the activations where both are read with one scale (0 to 1).
    """
    graph = graph.copy()
    anchors = {group.name for group in groups}
    factors: dict[str, Array] = {}
    for found in _classes(graph, anchors):
        ranges = [_channel_range(statistics[name]) for name in sorted(found.tensors) if name in statistics]
        ranges = [r for r in ranges if r is not None]
        if found.blocked or not found.writers or not found.readers or not ranges:
            continue
        if len({len(r) for r in ranges}) > 1:
            continue
        factor = _factor(graph, found, np.max(ranges, axis=0), strength)
        _apply(graph, found, factor)
        factors |= dict.fromkeys(found.tensors, factor)
    return graph, factors


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
            of(node.output[0])
            if node.op_type == "Clip":
                of(node.output[0]).clips.append(node)
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
        return activation_bounds(graph, node)[0] == 0.0
    return True


def _channel_range(stats: TensorStatistics) -> Array | None:
    if stats.channel_low is None or stats.channel_high is None:
        return None
    return np.maximum(np.abs(stats.channel_low), np.abs(stats.channel_high)).astype(np.float64)


def _factor(graph: Graph, found: _Class, activation: Array, strength: float) -> Array:
    """Return r, at most 1.

    The largest channel keeps its values and no other grows beyond it, so that the step of the tensor's scale stays and
    the noise of a channel can only shrink.
    """
    share = np.maximum(activation / activation.max(), 1 / SPREAD)
    dense = any(not _is_depthwise(graph, node) for node in found.readers)
    return (share ** (strength * DENSE if dense else strength)).astype(np.float32)


def _is_depthwise(graph: Graph, node: NodeProto) -> bool:
    return attribute(node, "group", 1) > 1 and graph.constants[node.input[1]].shape[1] == 1


def _apply(graph: Graph, found: _Class, factor: Array) -> None:
    for node in found.writers:
        weight = graph.constants[node.input[1]]
        scaled = weight / factor.reshape(-1, *[1] * (weight.ndim - 1))
        node.input[1] = graph.constant(node.input[1] + ".eq", scaled.astype(np.float32))
        if len(node.input) > 2 and node.input[2]:
            node.input[2] = graph.constant(
                node.input[2] + ".eq", (graph.constants[node.input[2]] / factor).astype(np.float32)
            )
    for node in found.readers:
        weight = graph.constants[node.input[1]]
        groups = attribute(node, "group", 1)
        columns = factor.reshape(groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
        shaped = weight.reshape(groups, len(weight) // groups, *weight.shape[1:]) * columns
        node.input[1] = graph.constant(node.input[1] + ".eq", shaped.reshape(weight.shape).astype(np.float32))
    for node in found.clips:
        _split_clip(graph, node, factor)


def _split_clip(graph: Graph, node: NodeProto, factor: Array) -> None:
    """Write Clip(0, h) of an equalised tensor as Relu and a minimum with h / r per channel."""
    _, high = activation_bounds(graph, node)
    position = next(i for i, item in enumerate(graph.nodes) if item is node)
    middle = node.output[0] + "::relu"
    bound = graph.constant(node.name + "::bound", (high / factor).astype(np.float32).reshape(1, -1, 1, 1))
    graph.values[middle] = graph.values[node.output[0]]
    graph.nodes[position : position + 1] = [
        make_node("Relu", [node.input[0]], [middle], node.name),
        make_node("Min", [middle, bound], [node.output[0]], node.name + "::bound"),
    ]
