"""Dynamic INT8: matrix products in integers, the range of each activation found anew for every input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from onnx import NodeProto, TensorProto

from narrowcast.data.dataset import Dataset
from narrowcast.models.execution import StagedExecutor
from narrowcast.models.graph import Graph, make_node
from narrowcast.recipes.plan import OperatorPlan
from narrowcast.recipes.recipe import DynamicInt8
from narrowcast.recipes.target import FusionRules
from narrowcast.transforms.calibration import calibrate
from narrowcast.transforms.groups import Group, boundaries, find_groups
from narrowcast.transforms.rounding import WeightLayout, channel_scales, quantise_weight
from narrowcast.transforms.smoothing import smooth
from narrowcast.transforms.weights import store_tables

__all__ = ["quantise_dynamic"]


def quantise_dynamic(
    graph: Graph, data: Dataset, step: DynamicInt8, rules: FusionRules
) -> tuple[Graph, list[OperatorPlan]]:
    """Return a graph whose matrix products compute in INT8 with dynamic activation ranges, and its operator plans.

    Convolutions stay FP32: no runtime here computes them fast with dynamic ranges.

    Args:
        graph: The FP32 graph.
        data: Calibration samples, read only to find outlier channels when the step smooths.
        step: What to do.
        rules: Which operators the runtime computes in integers.
    """
    every = find_groups(graph, rules)
    chosen = [
        g for g in every if g.op_type in ("MatMul", "Gemm") and g.kind == "linear" and g.name not in step.keep_float
    ]
    smoothed: set[str] = set()
    if step.smooth and chosen:
        executor = StagedExecutor(graph, boundaries(every))
        statistics = calibrate(executor, data, {group.inputs[0] for group in chosen})
        graph, smoothed = smooth(graph, chosen, statistics)
        names = {group.name for group in chosen}
        chosen = [group for group in find_groups(graph, rules) if group.name in names]
    graph = store_tables(graph)
    nodes = {node.name: node for node in graph.nodes}
    written: dict[str, list[NodeProto]] = {}
    ranged: set[str] = set()
    for group in chosen:
        written[group.name] = _product(graph, nodes[group.name], group, ranged)
    graph.nodes = [new for node in graph.nodes for new in written.get(node.name, [node])]
    graph.remove_unused()
    names = {group.name for group in chosen}
    plans = [_plan(nodes, group, group.name in names, group.name in smoothed) for group in every]
    return graph, plans


def _product(graph: Graph, node: NodeProto, group: Group, ranged: set[str]) -> list[NodeProto]:
    weight = graph.constants[node.input[1]]
    layout = WeightLayout.of(node, weight)
    matrix = layout.to_matrix(weight)
    scale = channel_scales(matrix)
    codes = replace(layout, op_type="MatMul", transposed=False).from_matrix(quantise_weight(matrix, scale))
    source, out = node.input[0], node.output[0]
    made: list[NodeProto] = []
    quantised = [f"{source}::dyn_q", f"{source}::dyn_scale", f"{source}::dyn_zero"]
    if source not in ranged:
        made.append(make_node("DynamicQuantizeLinear", [source], quantised, f"{source}::dynamic_range"))
        ranged.add(source)
    weight_codes = graph.constant(f"{node.name}::weight_q", codes)
    weight_scale = graph.constant(f"{node.name}::weight_scale", scale.reshape(-1).astype(np.float32))
    weight_zero = graph.constant(f"{node.name}::weight_zero_point", np.zeros(codes.shape[1], np.int8))
    has_bias = len(node.input) > 2 and bool(node.input[2])
    product = f"{out}::product" if has_bias else out
    made += [
        make_node("Mul", [quantised[1], weight_scale], [f"{out}::scale"], f"{node.name}::scale"),
        make_node("MatMulInteger", [quantised[0], weight_codes, quantised[2], weight_zero], [f"{out}::int"], node.name),
        make_node("Cast", [f"{out}::int"], [f"{out}::cast"], f"{node.name}::cast", to=TensorProto.FLOAT),
        make_node("Mul", [f"{out}::cast", f"{out}::scale"], [product], f"{node.name}::rescale"),
    ]
    if has_bias:
        made.append(make_node("Add", [product, node.input[2]], [out], f"{node.name}::bias"))
    return made


def _plan(nodes: dict[str, NodeProto], group: Group, quantised: bool, smoothed: bool) -> OperatorPlan:
    return OperatorPlan(
        group=group.name,
        op_type=group.op_type,
        fused=tuple(nodes[name].op_type for name in group.nodes[1:]),
        format="int8" if quantised else "fp32",
        remedies=("smoothed",) if quantised and smoothed else (),
    )
