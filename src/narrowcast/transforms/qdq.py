"""Write a quantised graph with standard QuantizeLinear and DequantizeLinear nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from narrowcast.models.graph import Graph, make_node
from narrowcast.recipes.target import FusionRules
from narrowcast.transforms.groups import Group, activation_bounds
from narrowcast.transforms.ranges import Quantizer

__all__ = ["QuantizedWeight", "absorbed", "add_bias_after", "write_qdq"]

Array = NDArray[Any]


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes of a weight, and what goes with them.

    Attributes:
        codes: The codes, in the weight's own shape.
        scale: A scale per output channel.
        axis: The axis of the output channels.
        bias: The operator's bias, FP32, if it has one.
        remedies: What was done for the operator's accuracy.
    """

    codes: NDArray[np.int8]
    scale: NDArray[np.float32]
    axis: int
    bias: NDArray[np.float32] | None
    remedies: tuple[str, ...] = ()

    def dequantise(self) -> NDArray[np.float32]:
        """Return the real weight that the codes stand for."""
        shape = [1] * self.codes.ndim
        shape[self.axis] = -1
        return self.codes.astype(np.float32) * self.scale.reshape(shape)


def absorbed(graph: Graph, group: Group, quantizer: Quantizer | None) -> bool:
    """Return whether saturation of the output's quantizer does all that the group's activations would do."""
    if quantizer is None or not group.activations:
        return False
    nodes = {node.name: node for node in graph.nodes}
    bounds = [activation_bounds(graph, nodes[name]) for name in group.activations]
    slack = 1e-5 * max(quantizer.high - quantizer.low, 1e-30)
    low, high = max(low for low, _ in bounds), min(high for _, high in bounds)
    return quantizer.low >= low - slack and quantizer.high <= high + slack


def write_qdq(
    graph: Graph,
    groups: list[Group],
    weights: Mapping[str, QuantizedWeight],
    quantizers: Mapping[str, Quantizer],
    rules: FusionRules,
) -> Graph:
    """Return the quantised graph.

    Args:
        graph: The FP32 graph that the groups were found in.
        groups: The groups that compute in integers.
        weights: Codes of the linear groups' weights, by group name.
        quantizers: Quantizers of tensors, by the name of the tensor that they are the root of.
        rules: What the target runtime fuses.
    """
    return _Writer(graph.copy(), groups, weights, quantizers, rules).write()


class _Writer:
    def __init__(
        self,
        graph: Graph,
        groups: list[Group],
        weights: Mapping[str, QuantizedWeight],
        quantizers: Mapping[str, Quantizer],
        rules: FusionRules,
    ) -> None:
        self.graph, self.groups, self.weights, self.quantizers, self.rules = graph, groups, weights, quantizers, rules
        self.nodes = {node.name: node for node in graph.nodes}
        self.producers = graph.producers()
        moved = [node for node in graph.nodes if node.op_type in rules.transparent]
        self.sources = {node.output[0]: node.input[0] for node in moved}
        self.added: list[NodeProto] = []

    def write(self) -> Graph:
        graph = self.graph
        integer: dict[str, Group] = {}
        for group in self.groups:
            if group.kind != "linear" or group.op_type in self.rules.integer_output:
                integer[group.output] = group
        members = {name for group in self.groups for name in group.nodes}
        dropped: set[str] = set()
        for group in self.groups:
            if group.output in integer and absorbed(graph, group, self.quantizers.get(group.output)):
                dropped |= self._absorb(group)
        wanted = dict.fromkeys(name for group in self.groups for name in group.inputs)
        for tensor in dict.fromkeys((*integer, *wanted)):
            self._quantise(tensor, tensor in integer, members)
        for group in self.groups:
            if group.kind == "linear":
                self._write_weight(group)
        graph.nodes = [node for node in graph.nodes if node.name not in dropped] + self.added
        graph.sort()
        graph.remove_unused()
        return graph

    def _absorb(self, group: Group) -> set[str]:
        """Let the node before the activations make the group's output itself."""
        first = self.nodes[group.activations[0]]
        maker = next(self.nodes[name] for name in group.nodes if self.nodes[name].output[0] in first.input)
        maker.output[0] = group.output
        return set(group.activations)

    def _quantise(self, tensor: str, integer: bool, members: set[str]) -> None:
        """Put Quantize and Dequantize behind a tensor.

        If integers make it, every reader gets the dequantised tensor; else only the quantised groups do.
        """
        graph = self.graph
        dequantised = f"{tensor}::dq"
        if any(node.output[0] == dequantised for node in self.added):
            return
        source = self.sources.get(tensor)
        if source is not None:  # the operators between a root and a tensor move integers
            self._quantise(source, integer=False, members=members)
            self.producers[tensor].input[0] = f"{source}::dq"
        readers = None if integer or source is not None else members
        self._pair(tensor, tensor, dequantised, self.quantizers[self._root(tensor)])
        self._redirect(tensor, dequantised, readers)
        if tensor in graph.output_names() and readers is None:
            self._keep_output_name(tensor, dequantised)

    def _root(self, tensor: str) -> str:
        while tensor in self.sources:
            tensor = self.sources[tensor]
        return tensor

    def _pair(self, tensor: str, source: str, target: str, quantizer: Quantizer) -> None:
        graph = self.graph
        scale = graph.constant(f"{tensor}::scale", np.array(quantizer.scale, np.float32))
        zero = graph.constant(f"{tensor}::zero_point", np.array(quantizer.zero_point, quantizer.dtype))
        codes = f"{tensor}::q"
        self.added.append(make_node("QuantizeLinear", [source, scale, zero], [codes], f"{tensor}::quantize"))
        self.added.append(make_node("DequantizeLinear", [codes, scale, zero], [target], f"{tensor}::dequantize"))

    def _redirect(self, tensor: str, target: str, readers: set[str] | None) -> None:
        for node in self.graph.nodes:
            if readers is not None and node.name not in readers:
                continue
            for position, name in enumerate(node.input):
                if name == tensor:
                    node.input[position] = target

    def _keep_output_name(self, tensor: str, dequantised: str) -> None:
        """Give the dequantised tensor the name of the graph output."""
        raw = f"{tensor}::raw"
        for node in (*self.graph.nodes, *self.added):
            for names in (node.input, node.output):
                for position, name in enumerate(names):
                    if name == tensor:
                        names[position] = raw
                    elif name == dequantised:
                        names[position] = tensor

    def _write_weight(self, group: Group) -> None:
        graph, node, weight = self.graph, self.nodes[group.name], self.weights[group.name]
        name = node.input[1]
        codes = graph.constant(f"{name}::q", weight.codes)
        scale = graph.constant(f"{name}::scale", weight.scale)
        zero = graph.constant(f"{name}::zero_point", np.zeros(len(weight.scale), np.int8))
        self.added.append(
            make_node(
                "DequantizeLinear",
                [codes, scale, zero],
                [f"{name}::dq_{group.name}"],
                f"{group.name}::weight",
                axis=weight.axis,
            )
        )
        node.input[1] = f"{name}::dq_{group.name}"
        if weight.bias is not None:
            self._write_bias(group, node, weight)

    def _write_bias(self, group: Group, node: NodeProto, weight: QuantizedWeight) -> None:
        """Write the bias: INT32 in steps of input scale x weight scale inside the kernel, FP32 where it is added after."""
        assert weight.bias is not None
        graph = self.graph
        if group.op_type == "MatMul" and group.bias_node is None:
            self.added.append(add_bias_after(graph, node, group.name, weight.bias))
            return
        if group.bias_node is not None:
            adder = self.nodes[group.bias_node]
            position = list(adder.input).index(group.bias or "")
            adder.input[position] = graph.constant(f"{group.bias}::corrected", weight.bias)
            return
        input_scale = np.float32(self.quantizers[self._root(group.inputs[0])].scale)
        scale = (input_scale * weight.scale).astype(np.float32)
        codes = np.clip(np.rint(weight.bias.astype(np.float64) / scale), -(2**31), 2**31 - 1).astype(np.int32)
        name = f"{group.name}::bias"
        inputs = [graph.constant(f"{name}::q", codes), graph.constant(f"{name}::scale", scale)]
        inputs.append(graph.constant(f"{name}::zero_point", np.zeros(len(scale), np.int32)))
        self.added.append(make_node("DequantizeLinear", inputs, [f"{name}::dq"], name, axis=0))
        if len(node.input) > 2:
            node.input[2] = f"{name}::dq"
        else:
            node.input.append(f"{name}::dq")


def add_bias_after(graph: Graph, node: NodeProto, group: str, bias: NDArray[np.float32]) -> NodeProto:
    """Return a node that adds the bias which correction gave to a matrix product without one; the product is renamed."""
    output, product = node.output[0], f"{node.output[0]}::product"
    node.output[0] = product
    constant = graph.constant(f"{group}::bias", bias)
    return make_node("Add", [product, constant], [output], f"{group}::bias_add")
