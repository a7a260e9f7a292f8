"""Move outlier channels of an activation into the weights that read it.

Where the tensor before a matrix product has a few channels far larger than the rest, one scale for all channels leaves
the rest with few codes. Channel c is divided by r[c] ahead of the product and row c of the weight is multiplied by r[c].
Source: G. Xiao et al., "SmoothQuant", 2023, equation 4. The division is one multiplication per value, made once for all
products that read the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from narrowcast.models.graph import Graph, attribute, make_node
from narrowcast.transforms.groups import Group
from narrowcast.transforms.ranges import TensorStatistics

__all__ = ["smooth"]

#: A tensor is worth smoothing where its largest channel exceeds the median channel by this factor.
WORTH = 6.0


def smooth(
    graph: Graph, groups: list[Group], statistics: Mapping[str, TensorStatistics], strength: float = 0.5
) -> tuple[Graph, set[str]]:
    """Return a copy of a graph with smoothed inputs of matrix products, and the names of the groups that changed.

    Args:
        graph: The FP32 graph.
        groups: The matrix products that will be quantised.
        statistics: Statistics per tensor, with channel extremes.
        strength: How much of the difference between channels the weights take over (0 to 1).
    """
    graph = graph.copy()
    nodes = {node.name: node for node in graph.nodes}
    readers: dict[str, list[Group]] = {}
    for group in groups:
        if group.op_type in ("MatMul", "Gemm") and group.kind == "linear":
            readers.setdefault(group.inputs[0], []).append(group)
    changed: set[str] = set()
    for tensor, found in readers.items():
        stats = statistics.get(tensor)
        if stats is None or stats.channel_low is None or stats.channel_high is None:
            continue
        activation = np.maximum(np.abs(stats.channel_low), np.abs(stats.channel_high)).astype(np.float64)
        if activation.max() < WORTH * np.median(activation):
            continue
        transposed = [bool(attribute(nodes[group.name], "transB", 0)) for group in found]
        weights = [graph.constants[group.weight or ""] for group in found]
        rows = np.max([np.abs(w).max(0 if t else 1) for w, t in zip(weights, transposed, strict=True)], axis=0)
        factor = np.maximum(activation, 1e-5) ** strength / np.maximum(rows, 1e-5) ** (1 - strength)
        factor = np.maximum(factor / np.median(factor), 1.0).astype(np.float32)  # only what sticks out moves
        smoothed = f"{tensor}::smooth"
        scale = graph.constant(f"{tensor}::smoothing", (1 / factor).astype(np.float32))
        graph.values[smoothed] = graph.values[tensor]
        graph.nodes.append(make_node("Mul", [tensor, scale], [smoothed], f"{smoothed}::mul"))
        for group, weight, is_transposed in zip(found, weights, transposed, strict=True):
            node = nodes[group.name]
            node.input[0] = smoothed
            scaled = weight * (factor if is_transposed else factor[:, None])
            node.input[1] = graph.constant(f"{group.weight}.smooth", scaled.astype(np.float32))
            changed.add(group.name)
    graph.sort()
    graph.remove_unused()
    return graph, changed
