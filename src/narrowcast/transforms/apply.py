"""Find the method for each step of a recipe, and apply them in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from narrowcast.data.dataset import Dataset
from narrowcast.models.graph import Graph
from narrowcast.recipes.plan import OperatorPlan, TensorRange
from narrowcast.recipes.recipe import DynamicInt8, Float16Weights, Optimise, Recipe, StaticInt8, WeightOnlyInt8
from narrowcast.recipes.target import FusionRules
from narrowcast.transforms.dynamic_int8 import quantise_dynamic
from narrowcast.transforms.groups import find_groups
from narrowcast.transforms.static_int8 import Memory, quantise_static
from narrowcast.transforms.walk import Progress, silent
from narrowcast.transforms.weight_only import quantise_weights
from narrowcast.transforms.weights import store_float16

__all__ = ["Built", "Histograms", "apply_recipe"]

Histograms = dict[str, tuple[list[float], list[int], list[int]]]


@dataclass(frozen=True)
class Built:
    """A graph and what was done to it.

    Attributes:
        graph: The graph.
        operators: What happened to each operator group.
        ranges: The range of each quantised tensor.
        histograms: For the worst tensors: bin edges, counts before, counts after.
    """

    graph: Graph
    operators: list[OperatorPlan]
    ranges: list[TensorRange] = field(default_factory=list[TensorRange])
    histograms: Histograms = field(default_factory=Histograms)


def apply_recipe(
    recipe: Recipe,
    graph: Graph,
    data: Dataset,
    rules: FusionRules,
    progress: Progress | None = None,
    memory: Memory | None = None,
) -> Built:
    """Return the graph that a recipe makes of an FP32 graph.

    Args:
        recipe: The steps.
        graph: The FP32 graph; it is not changed.
        data: Calibration samples.
        rules: What the target runtime computes in integers and fuses.
        progress: Called with a stage's name and the share of it that is done.
        memory: What earlier calls on the same graph and data found out; it is added to.
    """
    built = Built(graph, [])
    for step in recipe.steps:
        built = _METHODS[type(step)](built.graph, data, step, rules, progress, memory)
    return built


def _optimise(graph: Graph, data: Dataset, step: Optimise, rules: FusionRules, progress: Any, memory: Any) -> Built:
    nodes = {node.name: node for node in graph.nodes}
    plans = [
        OperatorPlan(group=g.name, op_type=g.op_type, fused=tuple(nodes[n].op_type for n in g.nodes[1:]))
        for g in find_groups(graph, rules)
    ]
    return Built(graph, plans)


def _float16(
    graph: Graph, data: Dataset, step: Float16Weights, rules: FusionRules, progress: Any, memory: Any
) -> Built:
    return Built(*store_float16(graph))


def _weight_only(
    graph: Graph, data: Dataset, step: WeightOnlyInt8, rules: FusionRules, progress: Progress | None, memory: Any
) -> Built:
    return Built(*quantise_weights(graph, data, rules, progress or silent))


def _dynamic(graph: Graph, data: Dataset, step: DynamicInt8, rules: FusionRules, progress: Any, memory: Any) -> Built:
    return Built(*quantise_dynamic(graph, data, step, rules))


def _static(
    graph: Graph, data: Dataset, step: StaticInt8, rules: FusionRules, progress: Progress | None, memory: Memory | None
) -> Built:
    result = quantise_static(graph, data, step, rules, progress, memory)
    return Built(result.graph, result.operators, result.ranges, result.histograms)


_METHODS: dict[type, Callable[..., Built]] = {
    Optimise: _optimise,
    Float16Weights: _float16,
    WeightOnlyInt8: _weight_only,
    DynamicInt8: _dynamic,
    StaticInt8: _static,
}
