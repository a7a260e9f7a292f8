"""Subgraphs of ONNX graphs: what they read, how often they run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx.reference
from onnx import numpy_helper

from narrowcast.accounting.graphs.files import attributes_in, element_of, graphs_in
from narrowcast.accounting.graphs.rules import Tensor

__all__ = ["Numbers", "Passes", "captured", "closed_graph", "loop_of", "scan_of"]

_LARGEST = 1 << 25  # numbers of a tensor that is worth computing


@dataclass(frozen=True)
class Passes:
    """How a body runs.

    Args:
        passes: How often; None if numbers decide.
        inputs: What it reads in the first pass, by the names of its inputs.
        states: Names of what a pass hands on to the next: as it reads it, and as it makes it.
    """

    passes: int | None
    inputs: dict[str, Tensor]
    states: tuple[tuple[str, str], ...]


def loop_of(
    node: onnx.NodeProto, body: onnx.GraphProto, model: onnx.ModelProto, tensors: Mapping[str, Tensor]
) -> Passes:
    """Return how a Loop runs its body.

    Args:
        node: The Loop.
        body: Its body.
        model: The graph that it is in, with small constants.
        tensors: All tensors around it, as far as they have shapes.
    """
    given = (Tensor((), "int64", 64), Tensor((), "bool", 8), *(tensors.get(name) for name in node.input[2:]))
    states = tuple((entry.name, made.name) for entry, made in zip(body.input[2:], body.output[1:], strict=False))
    return Passes(_trips(node, body, model, tensors), _named(body, given), states)


def _trips(
    node: onnx.NodeProto, body: onnx.GraphProto, model: onnx.ModelProto, tensors: Mapping[str, Tensor]
) -> int | None:
    limit, condition = [*node.input, "", ""][:2]
    if not limit or not _goes_on(body):
        return None
    numbers = Numbers(model, tensors)
    if condition:
        runs = numbers.of(condition)
        if runs is None:
            return None
        if not runs.all():
            return 0
    found = numbers.of(limit)
    return None if found is None else max(0, int(found.reshape(-1)[0]))


def _goes_on(body: onnx.GraphProto) -> bool:
    """Return whether a Loop's body never stops it: its condition is the one that it was given, or always true."""
    name, given = body.output[0].name, body.input[1].name
    makers = {made: node for node in body.node for made in node.output}
    while name in makers and makers[name].op_type in ("Identity", "Cast"):
        name = makers[name].input[0]
    if name == given:
        return True
    constant = next((tensor for tensor in body.initializer if tensor.name == name), None)
    return constant is not None and bool(numpy_helper.to_array(constant).all())


def scan_of(node: onnx.NodeProto, body: onnx.GraphProto, tensors: Mapping[str, Tensor]) -> Passes:
    """Return how a Scan runs its body: once for each slice; see :func:`loop_of`."""
    attributes = {
        entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute if entry.name != "body"
    }
    given = [tensors.get(name) for name in node.input]
    count = len(given) - int(attributes["num_scan_inputs"])
    axes: Sequence[int] = attributes.get("scan_input_axes") or [0] * (len(given) - count)
    passes: int | None = None
    for place, axis in enumerate(axes, start=count):
        tensor = given[place]
        if tensor is not None:
            axis %= len(tensor.shape)
            passes = tensor.shape[axis]
            given[place] = replace(tensor, shape=tensor.shape[:axis] + tensor.shape[axis + 1 :])
    states = tuple((entry.name, made.name) for entry, made in zip(body.input[:count], body.output, strict=False))
    return Passes(passes, _named(body, given), states)


def _named(body: onnx.GraphProto, given: Sequence[Tensor | None]) -> dict[str, Tensor]:
    pairs = zip(body.input, given, strict=False)
    return {value.name: tensor for value, tensor in pairs if tensor is not None}


# Graphs of their own --------------------------------------------------------------------------------------------------


def captured(node: onnx.NodeProto) -> set[str]:
    """Return the tensors that a node's subgraphs read from around it."""
    return set[str]().union(*(_free(graph) for _, graph in graphs_in(node)))


def _free(graph: onnx.GraphProto) -> set[str]:
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    own |= {made for node in graph.node for made in node.output}
    read = {name for node in graph.node for name in (*node.input, *captured(node))}
    return (read | {value.name for value in graph.output}) - own - {""}


def closed_graph(
    body: onnx.GraphProto, model: onnx.ModelProto, inputs: Mapping[str, Tensor], around: Mapping[str, Tensor]
) -> onnx.ModelProto:
    """Return a subgraph as a model of its own.

    Args:
        body: The subgraph.
        model: The graph that it is in: its small constants are taken along.
        inputs: What it reads, by the names of its inputs.
        around: All tensors around it, as far as they have shapes.
    """
    closed = onnx.ModelProto(ir_version=model.ir_version)
    closed.opset_import.extend(model.opset_import)
    closed.graph.CopyFrom(body)
    del closed.graph.input[:]
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in sorted(_free(body)):
        if name in constants:
            closed.graph.initializer.append(constants[name])
        elif name in around:
            closed.graph.input.append(_described(name, around[name]))
    closed.graph.input.extend(_described(name, tensor) for name, tensor in inputs.items())
    return closed


def _described(name: str, tensor: Tensor) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, element_of(tensor.dtype), list(tensor.shape))


# Numbers --------------------------------------------------------------------------------------------------------------


class Numbers:
    """The tensors of a graph that follow from small constants and shapes alone.

    Args:
        model: The graph.
        tensors: Its tensors, as far as they have shapes.
    """

    def __init__(self, model: onnx.ModelProto, tensors: Mapping[str, Tensor]) -> None:
        self._model = model
        self._tensors = tensors
        self._makers = {made: node for node in model.graph.node for made in node.output}
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._known: dict[str, Any] = {}

    def of(self, name: str) -> np.ndarray[Any, Any] | None:
        """Return the numbers of a tensor; None if they are not known, or too many."""
        if name not in self._known:
            self._known[name] = None  # a cycle would end here
            constant = self._constants.get(name)
            self._known[name] = self._computed(name) if constant is None else numpy_helper.to_array(constant)
        return self._known[name]

    def _computed(self, name: str) -> Any:
        node, tensor = self._makers.get(name), self._tensors.get(name)
        if node is None or any(graphs_in(node)) or (tensor is not None and tensor.size > _LARGEST):
            return None
        if node.op_type in ("Shape", "Size"):
            return _of_shape(node, self._tensors.get(node.input[0]))
        read = {given: self.of(given) for given in node.input if given}
        if any(given is None for given in read.values()):
            return None
        return _run(node, read, name, self._model)


def _of_shape(node: onnx.NodeProto, tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    if node.op_type == "Size":
        return np.asarray(math.prod(tensor.shape), np.int64)
    ends = attributes_in(node)
    return np.asarray(tensor.shape[ends.get("start", 0) : ends.get("end", len(tensor.shape))], np.int64)


def _run(node: onnx.NodeProto, read: Mapping[str, Any], wanted: str, model: onnx.ModelProto) -> Any:
    """Return what a node makes of numbers, by ONNX's reference implementation."""
    types = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in read.items()
    ]
    graph = onnx.helper.make_graph([node], "one", types, [onnx.ValueInfoProto(name=wanted)])
    alone = onnx.helper.make_model(graph, opset_imports=model.opset_import)
    try:
        (found,) = onnx.reference.ReferenceEvaluator(alone).run(None, dict(read))
    except Exception:  # the reference has no such operator, or not for these numbers: then nobody knows
        return None
    return np.asarray(found)
