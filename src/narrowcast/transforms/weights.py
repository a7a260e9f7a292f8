"""Storage-only methods: weights kept narrow on disk and widened once, when the runtime loads the model.

They are written as Cast (and Mul), which every runtime folds into constants at load; as DequantizeLinear, some runtimes
would widen them anew for every input.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import NodeProto, TensorProto

from narrowcast.models.graph import Graph, attribute, make_node
from narrowcast.recipes.plan import OperatorPlan
from narrowcast.transforms.groups import Group
from narrowcast.transforms.qdq import QuantizedWeight, add_bias_after
from narrowcast.transforms.rounding import WeightLayout, channel_scales, quantise_weight

__all__ = ["SMALLEST", "storable", "store_float16", "store_int8", "store_tables"]

#: Constants with fewer elements stay as they are: the nodes around them would cost more than they save.
SMALLEST = 256
_READERS = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Gather"}


def storable(graph: Graph, name: str) -> bool:
    """Return whether a constant is worth being stored narrow."""
    return graph.is_float(name) and graph.constants[name].size >= SMALLEST


def _weights(graph: Graph) -> dict[str, str]:
    """Return the FP32 weights of operators, by name, with the name of the first operator that reads each."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        if node.op_type in _READERS and attribute(node, "axis", 0) == 0:
            for name in node.input[:2]:
                if name in graph.constants and storable(graph, name):
                    found.setdefault(name, node.name)
    return found


def store_float16(graph: Graph) -> tuple[Graph, list[OperatorPlan]]:
    """Return a graph whose weights are stored in FP16; those that FP16 cannot hold stay FP32."""
    graph = graph.copy()
    largest = np.finfo(np.float16).max
    plans: list[OperatorPlan] = []
    added, renames = [], dict[str, str]()
    nodes = {node.name: node for node in graph.nodes}
    for name, reader in _weights(graph).items():
        weight = graph.constants[name]
        fits = float(np.abs(weight).max()) <= float(largest)
        plans.append(_plan(nodes[reader].op_type, reader, "fp16" if fits else "fp32"))
        if fits:
            narrow = graph.constant(f"{name}::fp16", weight.astype(np.float16))
            renames[name] = f"{name}::wide"
            added.append(make_node("Cast", [narrow], [renames[name]], f"{name}::widen", to=TensorProto.FLOAT))
    graph.rewire(renames)
    graph.nodes = added + graph.nodes
    graph.remove_unused()
    return graph, plans


def store_int8(graph: Graph, settled: Sequence[tuple[Group, QuantizedWeight]] = ()) -> tuple[Graph, list[OperatorPlan]]:
    """Return a graph whose weights are stored in INT8 with a scale per output channel (per row for lookup tables).

    Args:
        graph: The FP32 graph.
        settled: Groups whose codes and biases were settled already, the only readers of their weights; other weights are
            rounded to nearest.
    """
    graph = graph.copy()
    plans: list[OperatorPlan] = []
    nodes = {node.name: node for node in graph.nodes}
    known = {group.weight: (group, weight) for group, weight in settled}
    for name, reader in _weights(graph).items():
        node, weight = nodes[reader], graph.constants[name]
        if node.op_type == "ConvTranspose" or (node.op_type == "MatMul" and weight.ndim != 2):
            plans.append(_plan(node.op_type, reader, "fp32"))
            continue
        remedies: tuple[str, ...] = ()
        if node.op_type == "Gather":
            _store_table(graph, name)
        else:
            layout = WeightLayout.of(node, weight)
            if name in known:
                group, found = known[name]
                codes, scale = found.codes, found.scale
                _correct_bias(graph, nodes, group, found)
                remedies = found.remedies
            else:
                matrix = layout.to_matrix(weight)
                scale = channel_scales(matrix)
                codes = layout.from_matrix(quantise_weight(matrix, scale))
            shape = [1] * weight.ndim
            shape[layout.axis] = -1
            _widen(graph, name, codes, scale.reshape(shape).astype(np.float32))
        plans.append(_plan(node.op_type, reader, "int8").model_copy(update={"remedies": remedies}))
    graph.sort()
    graph.remove_unused()
    return graph, plans


def _correct_bias(graph: Graph, nodes: dict[str, NodeProto], group: Group, weight: QuantizedWeight) -> None:
    """Write a group's corrected bias, where it has one or where its operator can take one."""
    if weight.bias is None:
        return
    node = nodes[group.bias_node or group.name]
    if group.bias is not None:
        name = graph.constant(f"{group.bias}::corrected_{group.name}", weight.bias)
        node.input[list(node.input).index(group.bias)] = name
    elif group.op_type == "MatMul":
        graph.nodes.append(add_bias_after(graph, node, group.name, weight.bias))
    else:
        del node.input[2:]  # an optional input may be there without a name
        node.input.append(graph.constant(f"{group.name}::bias", weight.bias))


def _widen(graph: Graph, name: str, codes: np.ndarray, scale: np.ndarray) -> None:
    inputs = [graph.constant(f"{name}::q", codes)]
    graph.rewire({name: f"{name}::wide"})
    cast = make_node("Cast", inputs, [f"{name}::cast"], f"{name}::cast", to=TensorProto.FLOAT)
    scales = graph.constant(f"{name}::scale", scale)
    graph.nodes = [cast, make_node("Mul", [f"{name}::cast", scales], [f"{name}::wide"], f"{name}::widen"), *graph.nodes]


def store_tables(graph: Graph) -> Graph:
    """Return a graph whose lookup tables are stored in INT8 with a scale per row."""
    graph = graph.copy()
    readers = {node.name: node for node in graph.nodes}
    for name, reader in _weights(graph).items():
        if readers[reader].op_type == "Gather":
            _store_table(graph, name)
    graph.remove_unused()
    return graph


def _store_table(graph: Graph, name: str) -> None:
    """Store a lookup table in INT8 with a scale per row; only the rows that are looked up are ever widened."""
    table = graph.constants[name]
    rows = table.reshape(1, len(table), -1)
    scale = channel_scales(rows)
    codes = graph.constant(f"{name}::q", quantise_weight(rows, scale).reshape(table.shape))
    scales = graph.constant(f"{name}::scale", scale.reshape(len(table), *[1] * (table.ndim - 1)).astype(np.float32))
    rebuilt = []
    for node in graph.nodes:
        if node.op_type != "Gather" or node.input[0] != name:
            rebuilt.append(node)
            continue
        out = node.output[0]
        rebuilt += [
            make_node("Gather", [codes, node.input[1]], [f"{out}::row_q"], f"{node.name}::codes", axis=0),
            make_node("Cast", [f"{out}::row_q"], [f"{out}::cast"], f"{node.name}::cast", to=TensorProto.FLOAT),
            make_node("Gather", [scales, node.input[1]], [f"{out}::row_scale"], f"{node.name}::scales", axis=0),
            make_node("Mul", [f"{out}::cast", f"{out}::row_scale"], [out], node.name),
        ]
    graph.nodes = rebuilt


def _plan(op_type: str, group: str, form: str) -> OperatorPlan:
    return OperatorPlan(group=group, op_type=op_type, format=form, executed=False)
