"""The ONNX graph as narrowcast edits it: nodes, named constants, and who makes and reads each tensor."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

__all__ = ["Graph", "TensorInfo", "attribute", "make_node"]

Array = NDArray[Any]

#: The newest IR version that the oldest supported ONNX Runtime reads.
IR_VERSION = 10


@dataclass(frozen=True)
class TensorInfo:
    """Name, element type and shape of a graph input or output; a dynamic axis is given by its name or None."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]

    @property
    def dynamic_batch(self) -> bool:
        """Whether the first axis is dynamic."""
        return len(self.shape) > 0 and not isinstance(self.shape[0], int)


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Return the value of one attribute of a node, or the default."""
    for item in node.attribute:
        if item.name == name:
            return onnx.helper.get_attribute_value(item)
    return default


def make_node(
    op_type: str, inputs: Iterable[str], outputs: Iterable[str], name: str, **attributes: Any
) -> onnx.NodeProto:
    """Return a node of the standard operator set."""
    return onnx.helper.make_node(op_type, list(inputs), list(outputs), name=name, **attributes)


@dataclass
class Graph:
    """A mutable view of an ONNX model.

    Attributes:
        nodes: Operators in topological order.
        constants: Initialisers by name.
        inputs: Graph inputs that a caller feeds (initialisers excluded).
        outputs: Graph outputs.
        values: Element type and shape of every tensor that is known.
        opsets: Operator-set version by domain (``""`` is the standard one).
        name: Name of the graph.
    """

    nodes: list[onnx.NodeProto]
    constants: dict[str, Array]
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    values: dict[str, TensorInfo] = field(default_factory=dict[str, TensorInfo])
    opsets: dict[str, int] = field(default_factory=lambda: {"": 20})
    name: str = "graph"

    # Reading and writing ------------------------------------------------------------------------------------------

    @classmethod
    def from_model(cls, model: onnx.ModelProto) -> Graph:
        """Return the graph of a model, with shapes inferred where ONNX can infer them."""
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        graph = inferred.graph
        constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            tensor = attribute(node, "value") if node.op_type == "Constant" else None
            if tensor is None:
                nodes.append(node)
            else:
                constants[node.output[0]] = numpy_helper.to_array(tensor)
        inputs = [_info(value) for value in graph.input if value.name not in constants]
        outputs = [_info(value) for value in graph.output]
        values = {value.name: _info(value) for value in graph.value_info if value.type.HasField("tensor_type")}
        values |= {info.name: info for info in [*inputs, *outputs]}
        used = {node.domain for node in nodes} | {""}
        opsets = {item.domain: item.version for item in model.opset_import if item.domain in used}
        return cls(nodes, constants, inputs, outputs, values, opsets, graph.name or "graph")

    @classmethod
    def load(cls, path: Path) -> Graph:
        """Read a graph from an ONNX file."""
        return cls.from_model(onnx.load(path))

    def to_model(self) -> onnx.ModelProto:
        """Return the graph as an ONNX model that holds only the constants in use."""
        used = {name for node in self.nodes for name in node.input} | {info.name for info in self.outputs}
        names = {info.name for info in [*self.inputs, *self.outputs]}
        made = {name for node in self.nodes for name in node.output}
        graph = onnx.helper.make_graph(
            self.nodes,
            self.name,
            [_value_info(info) for info in self.inputs],
            [_value_info(info) for info in self.outputs],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items() if name in used],
            value_info=[_value_info(i) for n, i in self.values.items() if n in made and n not in names],
        )
        opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]
        return onnx.helper.make_model(graph, opset_imports=opsets, producer_name="narrowcast", ir_version=IR_VERSION)

    def save(self, path: Path) -> None:
        """Write the graph to one ONNX file."""
        path.write_bytes(self.to_model().SerializeToString())

    def copy(self) -> Graph:
        """Return a graph that can be edited without changing this one (constants are shared, never edited in place)."""
        nodes = [copy.deepcopy(node) for node in self.nodes]
        return Graph(
            nodes,
            dict(self.constants),
            list(self.inputs),
            list(self.outputs),
            dict(self.values),
            dict(self.opsets),
            self.name,
        )

    # Asking -------------------------------------------------------------------------------------------------------

    def producers(self) -> dict[str, onnx.NodeProto]:
        """Return the node that makes each tensor."""
        return {name: node for node in self.nodes for name in node.output if name}

    def consumers(self) -> dict[str, list[onnx.NodeProto]]:
        """Return the nodes that read each tensor, in topological order, each once."""
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(filter(None, node.input)):
                readers.setdefault(name, []).append(node)
        return readers

    def output_names(self) -> set[str]:
        """Return the names of the graph outputs."""
        return {info.name for info in self.outputs}

    def rank(self, tensor: str) -> int | None:
        """Return the number of axes of a tensor, or None where it is unknown."""
        if tensor in self.constants:
            return self.constants[tensor].ndim
        return len(self.values[tensor].shape) if tensor in self.values else None

    def dtype(self, tensor: str) -> np.dtype[Any] | None:
        """Return the element type of a tensor, or None where it is unknown."""
        if tensor in self.constants:
            return self.constants[tensor].dtype
        return self.values[tensor].dtype if tensor in self.values else None

    def is_float(self, tensor: str) -> bool:
        """Return whether a tensor holds FP32 values."""
        return self.dtype(tensor) == np.float32

    def bytes_of_constants(self) -> int:
        """Return the bytes of all constants."""
        return sum(value.nbytes for value in self.constants.values())

    # Editing ------------------------------------------------------------------------------------------------------

    def constant(self, name: str, value: Array) -> str:
        """Add a constant under a name that is free, and return that name.

        Tensors and constants that transforms make have a double colon in their names, so that they meet no name of the model.
        """
        free, number = name, 1
        while free in self.constants:
            free, number = f"{name}.{number}", number + 1
        self.constants[free] = value
        return free

    def rewire(self, renames: Mapping[str, str], skip: Iterable[int] = ()) -> None:
        """Let every node (but those with an ``id`` in skip) read the new tensor where it read the old one."""
        skipped = set(skip)
        for node in self.nodes:
            if id(node) in skipped:
                continue
            for position, name in enumerate(node.input):
                if name in renames:
                    node.input[position] = renames[name]

    def sort(self) -> None:
        """Put the nodes into topological order (stable: nodes that are in order already keep their places)."""
        made = {info.name for info in self.inputs} | self.constants.keys() | {""}
        remaining, ordered = list(self.nodes), list[onnx.NodeProto]()
        while remaining:
            later: list[onnx.NodeProto] = []
            for node in remaining:
                if all(name in made for name in _reads(node)):
                    ordered.append(node)
                    made.update(node.output)
                else:
                    later.append(node)
            if len(later) == len(remaining):
                raise ValueError(f"graph {self.name} has a cycle or a tensor nobody makes at node {later[0].name}")
            remaining = later
        self.nodes = ordered

    def remove_unused(self) -> None:
        """Drop nodes whose outputs nobody reads, and constants nobody uses."""
        needed = self.output_names()
        kept: list[onnx.NodeProto] = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(_reads(node))
        self.nodes = kept[::-1]
        self.constants = {name: value for name, value in self.constants.items() if name in needed}

    def subgraph(self, nodes: list[onnx.NodeProto], outputs: list[str]) -> Graph:
        """Return a graph of some nodes only; tensors made elsewhere become its inputs, in order of first use.

        Inner tensors may be asked for as outputs. Needs the element type of every tensor that becomes an input.
        """
        made = {name for node in nodes for name in node.output}
        reads = dict.fromkeys(name for node in nodes for name in _reads(node) if name)
        inputs = [self._open_info(name) for name in reads if name not in made and name not in self.constants]
        constants = {name: self.constants[name] for name in reads if name in self.constants}
        return Graph(nodes, constants, inputs, [self._open_info(n) for n in outputs], {}, dict(self.opsets), self.name)

    def _open_info(self, name: str) -> TensorInfo:
        info = self.values[name]
        return TensorInfo(name, info.dtype, (None,) * len(info.shape))


@functools.cache
def _dtype(elem_type: int) -> np.dtype[Any]:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))


def _info(value: onnx.ValueInfoProto) -> TensorInfo:
    tensor = value.type.tensor_type
    dims = tensor.shape.dim
    shape = tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in dims)
    return TensorInfo(value.name, _dtype(tensor.elem_type), shape)


def _value_info(info: TensorInfo) -> onnx.ValueInfoProto:
    elem_type = onnx.helper.np_dtype_to_tensor_dtype(info.dtype)
    return onnx.helper.make_tensor_value_info(info.name, elem_type, info.shape)


def _reads(node: onnx.NodeProto) -> list[str]:
    """Return the tensors that a node reads, those that its inner graphs take from outside included."""
    names = list(node.input)
    for item in node.attribute:
        if item.type == onnx.AttributeProto.GRAPH:
            inner = {info.name for info in item.g.input} | {t.name for t in item.g.initializer}
            for child in item.g.node:
                names += [name for name in _reads(child) if name not in inner]
                inner.update(child.output)
    return names
