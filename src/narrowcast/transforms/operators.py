"""Run single operator groups of a graph, with the graph's weights or with others in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from narrowcast.models.execution import session_of
from narrowcast.models.graph import Graph
from narrowcast.transforms.groups import Group

__all__ = ["Operators", "add_to_channels", "channel_axis", "mean_error"]

Array = NDArray[Any]


class Operators:
    """The operator groups of one graph, each run on its own."""

    def __init__(self, graph: Graph) -> None:
        """Take a graph; it is not changed."""
        self.graph = graph
        self.nodes = {node.name: node for node in graph.nodes}

    def run(self, group: Group, feeds: Mapping[str, Array]) -> Array:
        """Return the output of a whole group."""
        return self._run([self.nodes[name] for name in group.nodes], feeds, self.graph.constants)

    def before_activation(self, group: Group, feeds: Mapping[str, Array], weight: Array | None = None) -> Array:
        """Return what a linear group computes ahead of its activations.

        Args:
            group: The group.
            feeds: Its inputs.
            weight: What to take for its weight; None takes the graph's.
        """
        constants = self.graph.constants
        if weight is not None and group.weight is not None:
            constants = constants | {group.weight: weight}
        return self._run([self.nodes[n] for n in group.nodes if n not in group.activations], feeds, constants)

    def activate(self, group: Group, values: Array) -> Array:
        """Return what a group's activations make of values."""
        for name in group.activations:
            node = self.nodes[name]
            source = next(tensor for tensor in node.input if tensor and tensor not in self.graph.constants)
            values = self._run([node], {source: values}, self.graph.constants)
        return values

    def _run(self, nodes: list[NodeProto], feeds: Mapping[str, Array], constants: dict[str, Array]) -> Array:
        graph = Graph(self.graph.nodes, constants, [], [], self.graph.values, self.graph.opsets)
        return np.asarray(session_of(graph.subgraph(nodes, [nodes[-1].output[0]])).run(None, dict(feeds))[0])


def channel_axis(group: Group, values: Array) -> int:
    """Return the axis of a linear group's output channels."""
    return 1 if group.op_type == "Conv" else values.ndim - 1


def mean_error(group: Group, exact: Array, values: Array) -> NDArray[np.float32]:
    """Return the mean of (exact minus values) of each output channel of a linear group."""
    axes = tuple(axis for axis in range(values.ndim) if axis != channel_axis(group, values))
    return (exact.mean(axes, dtype=np.float64) - values.mean(axes, dtype=np.float64)).astype(np.float32)


def add_to_channels(group: Group, values: Array, shift: Array) -> Array:
    """Return what a linear group computed with a number added to each output channel."""
    shape = [1] * values.ndim
    shape[channel_axis(group, values)] = -1
    return values + shift.reshape(shape)
