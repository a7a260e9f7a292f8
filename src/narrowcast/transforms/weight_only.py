"""Weight-only INT8: codes settled like those of static INT8, by the outputs that they give, activations left in FP32."""

from __future__ import annotations

from collections import Counter

from narrowcast.data.dataset import Dataset
from narrowcast.models.execution import StagedExecutor
from narrowcast.models.graph import Graph
from narrowcast.recipes.plan import OperatorPlan
from narrowcast.recipes.recipe import StaticInt8
from narrowcast.recipes.target import FusionRules
from narrowcast.transforms.calibration import walk_samples
from narrowcast.transforms.groups import boundaries, find_groups
from narrowcast.transforms.walk import Progress, Walk
from narrowcast.transforms.weights import storable, store_int8

__all__ = ["quantise_weights"]

#: Samples that weights are settled on, at the most.
SAMPLES = 24


def quantise_weights(
    graph: Graph, data: Dataset, rules: FusionRules, progress: Progress
) -> tuple[Graph, list[OperatorPlan]]:
    """Return a graph whose weights are stored in INT8, and what was done to each operator.

    Args:
        graph: The FP32 graph.
        data: Calibration samples.
        rules: What the target runtime fuses.
        progress: Called with a stage's name and the share of it that is done.
    """
    every = find_groups(graph, rules)
    readers = Counter(name for node in graph.nodes for name in node.input)
    groups = [g for g in every if g.weight is not None and storable(graph, g.weight) and readers[g.weight] == 1]
    executor = StagedExecutor(graph, boundaries(every))
    walk = Walk(
        graph=graph,
        every=every,
        groups=groups,
        executor=executor,
        statistics={},
        step=StaticInt8(),
        rules=rules,
        feeds=walk_samples(executor, data, SAMPLES),
        changed={},
    )
    walk.run(progress)
    return store_int8(graph, [(group, walk.weights[group.name]) for group in groups])
