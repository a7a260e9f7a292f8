"""Operator groups: what the target runtime executes as one kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import onnx

from narrowcast.models.graph import Graph, attribute
from narrowcast.recipes.target import FusionRules

__all__ = ["Group", "activation_bounds", "boundaries", "find_groups", "quantised_groups", "root_of", "rounded_tensors"]

Kind = Literal["linear", "elementwise", "pooling"]


@dataclass(frozen=True)
class Group:
    """Operators that run as one kernel.

    Attributes:
        name: Node name of the main operator.
        op_type: Type of the main operator.
        kind: Whether it has a constant weight, combines tensors, or pools one.
        nodes: Names of its nodes, the main operator first.
        inputs: Activation tensors that the main operator reads.
        output: Tensor that the last node makes.
        weight: Name of the constant weight (linear groups).
        bias: Name of the constant bias, if there is one.
        bias_node: Node that adds the bias, if it is a node of its own.
        activations: Nodes of the activation, in order.
    """

    name: str
    op_type: str
    kind: Kind
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str
    weight: str | None = None
    bias: str | None = None
    bias_node: str | None = None
    activations: tuple[str, ...] = ()


def find_groups(graph: Graph, rules: FusionRules) -> list[Group]:
    """Return the groups that the target runtime could compute in integers, in topological order."""
    consumers, outputs = graph.consumers(), graph.output_names()
    groups: list[Group] = []
    for node in graph.nodes:
        group = _group(graph, node, rules)
        if group is None or not graph.is_float(group.output):
            continue
        groups.append(_with_followers(graph, group, rules, consumers, outputs))
    return groups


def _group(graph: Graph, node: onnx.NodeProto, rules: FusionRules) -> Group | None:
    output = node.output[0]
    activations = tuple(name for name in node.input if name and name not in graph.constants)
    if node.op_type in rules.linear and len(node.input) > 1 and activations == (node.input[0],):
        weight = node.input[1]
        if node.op_type == "MatMul" and graph.constants[weight].ndim != 2:
            return None
        if node.op_type == "Gemm" and (attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1.0):
            return None
        if not graph.is_float(weight):
            return None
        bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
        if bias is not None and graph.constants[bias].ndim != 1:
            return None
        return Group(node.name, node.op_type, "linear", (node.name,), activations, output, weight, bias)
    if node.op_type in rules.elementwise and len(activations) == len(node.input) > 1:
        return Group(node.name, node.op_type, "elementwise", (node.name,), activations, output)
    if node.op_type in rules.pooling and len(activations) == 1:
        return Group(node.name, node.op_type, "pooling", (node.name,), activations, output)
    return None


def _with_followers(
    graph: Graph, group: Group, rules: FusionRules, consumers: dict[str, list[onnx.NodeProto]], outputs: set[str]
) -> Group:
    """Add the bias and the activations that run in the same kernel."""
    nodes, output, bias, bias_node = list(group.nodes), group.output, group.bias, None
    activations: list[str] = []
    while True:
        readers = consumers.get(output, [])
        if len(readers) != 1 or output in outputs:
            break
        reader = readers[0]
        others = [name for name in reader.input if name and name != output]
        if not all(name in graph.constants for name in others):
            break
        adds_bias = group.op_type == "MatMul" and bias is None and reader.op_type == "Add" and not activations
        if adds_bias and graph.constants[others[0]].ndim == 1:
            bias, bias_node = others[0], reader.name
        elif reader.op_type in rules.activations:
            activations.append(reader.name)
        else:
            break
        nodes.append(reader.name)
        output = reader.output[0]
    return replace(
        group, nodes=tuple(nodes), output=output, bias=bias, bias_node=bias_node, activations=tuple(activations)
    )


def boundaries(groups: list[Group]) -> list[frozenset[str]]:
    """Return the sets of nodes that must be stages of their own when the graph is executed."""
    return [frozenset(group.nodes) for group in groups]


def activation_bounds(graph: Graph, node: onnx.NodeProto) -> tuple[float, float]:
    """Return the lowest and highest value that an activation lets through in every channel."""
    infinity = float("inf")
    if node.op_type == "Relu":
        return 0.0, infinity
    if node.op_type in ("Min", "Max"):
        bounds = [graph.constants[name] for name in node.input if name in graph.constants]
        if node.op_type == "Min":
            return -infinity, min(float(bound.min()) for bound in bounds)
        return max(float(bound.max()) for bound in bounds), infinity
    low, high = attribute(node, "min", -infinity), attribute(node, "max", infinity)
    if len(node.input) > 1 and node.input[1]:
        low = float(graph.constants[node.input[1]])
    if len(node.input) > 2 and node.input[2]:
        high = float(graph.constants[node.input[2]])
    return low, high


def root_of(tensor: str, producers: dict[str, onnx.NodeProto], rules: FusionRules) -> str:
    """Return the tensor whose values a tensor holds, only moved about by transparent operators."""
    while tensor in producers and producers[tensor].op_type in rules.transparent:
        tensor = producers[tensor].input[0]
    return tensor


def quantised_groups(graph: Graph, groups: list[Group], rules: FusionRules, keep_float: frozenset[str]) -> list[Group]:
    """Return the groups that compute in integers when some are kept in FP32.

    Linear groups do so on their own. The others only where integers reach them anyway: turning an FP32 tensor into
    integers for the sake of an addition costs more than the addition.
    """
    producers = graph.producers()
    integer: set[str] = set()
    chosen: list[Group] = []
    for group in groups:
        if group.name in keep_float:
            continue
        roots = [root_of(name, producers, rules) for name in group.inputs]
        if group.kind != "linear" and not any(root in integer for root in roots):
            continue
        if group.kind == "elementwise" and not all(graph.is_float(name) for name in group.inputs):
            continue
        chosen.append(group)
        if group.kind != "linear" or group.op_type in rules.integer_output:
            integer.add(group.output)
    return chosen


def rounded_tensors(graph: Graph, groups: list[Group], rules: FusionRules) -> set[str]:
    """Return the tensors that get a quantizer when some groups compute in integers."""
    producers = graph.producers()
    read = {root_of(name, producers, rules) for group in groups for name in group.inputs}
    return read | {g.output for g in groups if g.kind != "linear" or g.op_type in rules.integer_output}
