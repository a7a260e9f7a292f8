from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from contracts.graphs import CASES, Builder, Case
from narrowcast.data.dataset import Dataset
from narrowcast.models.execution import StagedExecutor, session_of
from narrowcast.models.graph import Graph, attribute
from narrowcast.models.prepare import prepare
from narrowcast.recipes.target import FusionRules
from narrowcast.transforms.calibration import calibrate
from narrowcast.transforms.equalise import equalise
from narrowcast.transforms.groups import Group, boundaries, find_groups
from narrowcast.transforms.ranges import TensorStatistics
from narrowcast.transforms.smoothing import smooth

RULES = FusionRules()
Make = Callable[..., Dataset]


def run(graph: Graph, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    return [np.asarray(value) for value in session_of(graph).run(None, feeds)]


def looked_at(graph: Graph, feeds: dict[str, NDArray[Any]], make: Make) -> tuple[list[Group], dict[str, Any]]:
    """Groups, and statistics of all tensors of all groups."""
    groups = find_groups(graph, RULES)
    tensors = {name for group in groups for name in (*group.inputs, group.output)}
    executor = StagedExecutor(graph, boundaries(groups))
    return groups, calibrate(executor, make(**feeds), tensors)


def assert_same_function(changed: Graph, graph: Graph, case: Case) -> None:
    feeds = case.feeds(5, seed=9)
    feeds = {name: value * 3 if value.dtype.kind == "f" else value for name, value in feeds.items()}
    for ours, theirs in zip(run(changed, feeds), run(graph, feeds), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * float(np.abs(theirs).max()))
    onnx.checker.check_model(changed.to_model(), full_check=True)


def spread(stats: TensorStatistics) -> float:
    """How far the channels' largest magnitudes are apart."""
    assert stats.channel_low is not None
    assert stats.channel_high is not None
    largest = np.maximum(np.abs(stats.channel_low), np.abs(stats.channel_high))
    return float(largest.max() / np.median(largest))


def uneven(graph: Graph) -> Graph:
    """Make the output channels of all convolutions but the last differ by up to 30 times."""
    graph = graph.copy()
    rng = np.random.default_rng(2)
    for node in [node for node in graph.nodes if node.op_type == "Conv"][:-1]:
        factor = np.exp(rng.uniform(np.log(0.1), np.log(3), len(graph.constants[node.input[1]]))).astype(np.float32)
        for name in node.input[1:]:
            value = graph.constants[name]
            graph.constants[name] = value * factor.reshape(-1, *[1] * (value.ndim - 1))
    return graph


EQUALISED = ["conv_relu6", "depthwise", "residual", "conv_geometry", "grouped_conv", "max_pool", "average_pool"]


@pytest.mark.parametrize("name", EQUALISED)
def test_equalisation_keeps_the_function_and_evens_out_channels(name: str, dataset_of: Make) -> None:
    case = next(case for case in CASES if case.name == name)
    graph = uneven(prepare(case.model(), name))
    before = graph.to_model().SerializeToString()
    groups, stats = looked_at(graph, case.feeds(32), dataset_of)
    changed, factors = equalise(graph, groups, stats)
    assert graph.to_model().SerializeToString() == before
    assert factors
    assert_same_function(changed, graph, case)
    for factor in factors.values():
        assert factor.max() == pytest.approx(1.0)
        assert factor.min() > 0
    assert any(factor.min() < 0.8 for factor in factors.values())
    _, after = looked_at(changed, case.feeds(32), dataset_of)
    seen = [tensor for tensor in factors if tensor in after and tensor in stats]
    assert seen
    for tensor in seen:
        assert spread(after[tensor]) < spread(stats[tensor])
        tied = [other for other in seen if factors[other] is factors[tensor]]
        assert after[tensor].reach <= max(stats[other].reach for other in tied)  # none outgrows the largest channel


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equalisation_never_changes_what_a_graph_computes(case: Case, dataset_of: Make) -> None:
    graph = uneven(prepare(case.model(), case.name))
    groups, stats = looked_at(graph, case.feeds(16), dataset_of)
    changed, _ = equalise(graph, groups, stats)
    assert_same_function(changed, graph, case)


def test_graph_inputs_and_outputs_keep_their_scale(dataset_of: Make) -> None:
    case = next(case for case in CASES if case.name == "inner_output")
    graph = uneven(prepare(case.model(), case.name))
    groups, stats = looked_at(graph, case.feeds(16), dataset_of)
    _, factors = equalise(graph, groups, stats)
    assert not factors.keys() & {"image", "features", "out"}


def test_groups_kept_in_float_are_left_alone(dataset_of: Make) -> None:
    case = next(case for case in CASES if case.name == "depthwise")
    graph = uneven(prepare(case.model(), case.name))
    groups, stats = looked_at(graph, case.feeds(16), dataset_of)
    changed, factors = equalise(graph, [group for group in groups if group.name != "depthwise"], stats)
    assert not factors
    assert changed.to_model().SerializeToString() == graph.to_model().SerializeToString()


def test_a_bound_from_above_becomes_one_per_channel(dataset_of: Make) -> None:
    case = next(case for case in CASES if case.name == "depthwise")
    graph = uneven(prepare(case.model(), case.name))
    groups, stats = looked_at(graph, case.feeds(32), dataset_of)
    changed, factors = equalise(graph, groups, stats)
    (minimum,) = [node for node in changed.nodes if node.output[0] == "expand.relu6"]
    assert minimum.op_type == "Min"
    bound = next(changed.constants[name] for name in minimum.input if name in changed.constants)
    np.testing.assert_allclose(bound.reshape(-1), 6 / factors["expand.relu6"], rtol=1e-6)


# Smoothing ------------------------------------------------------------------------------------------------------------


def with_outliers(channels: dict[int, float], transposed: bool = False) -> onnx.ModelProto:
    b = Builder(5)
    x = b.input("x", 24) if transposed else b.input("x", 5, 24)
    gain = np.ones(24, np.float32)
    for channel, factor in channels.items():
        gain[channel] = factor
    x = b.node("Mul", x, b.constant("gain", gain), out="scaled")
    if transposed:
        b.gemm(x, "a", 24, 32)
        b.gemm(x, "b", 24, 20, transposed=False)
        return b.model(a=(32,), b=(20,))
    b.matmul(x, "a", 24, 32)
    b.matmul(x, "b", 24, 20, bias=False)
    return b.model(a=(5, 32), b=(5, 20))


@pytest.mark.parametrize("transposed", [False, True])
def test_smoothing_keeps_the_function_and_takes_outliers_out(transposed: bool, dataset_of: Make) -> None:
    case = Case("outliers", lambda b: with_outliers({3: 60.0, 17: 25.0}, transposed))
    graph = prepare(case.model(), "net")
    before = graph.to_model().SerializeToString()
    groups, stats = looked_at(graph, case.feeds(32), dataset_of)
    changed, names = smooth(graph, groups, stats)
    assert graph.to_model().SerializeToString() == before
    assert names == {group.name for group in groups}
    assert_same_function(changed, graph, case)
    smoothed, after = looked_at(changed, case.feeds(32), dataset_of)
    assert len({group.inputs[0] for group in smoothed}) == 1  # divided once for both readers
    tensor = smoothed[0].inputs[0]
    assert spread(after[tensor]) < 0.5 * spread(stats["scaled"])


def test_smoothing_leaves_even_channels_alone(dataset_of: Make) -> None:
    case = Case("even", lambda b: with_outliers({3: 2.0}))
    graph = prepare(case.model(), "net")
    groups, stats = looked_at(graph, case.feeds(32), dataset_of)
    changed, names = smooth(graph, groups, stats)
    assert not names
    assert changed.to_model().SerializeToString() == graph.to_model().SerializeToString()


def test_smoothing_touches_only_the_groups_that_it_is_given(dataset_of: Make) -> None:
    case = Case("outliers", lambda b: with_outliers({3: 60.0}))
    graph = prepare(case.model(), "net")
    groups, stats = looked_at(graph, case.feeds(32), dataset_of)
    changed, names = smooth(graph, groups[:1], stats)
    assert names == {groups[0].name}
    assert_same_function(changed, graph, case)
    nodes = {node.name: node for node in changed.nodes}
    assert nodes[groups[1].name].input[0] == "scaled"


def test_a_dead_channel_does_not_break_smoothing(dataset_of: Make) -> None:
    case = Case("dead", lambda b: with_outliers({0: 0.0, 1: 0.0, 3: 60.0}))
    graph = prepare(case.model(), "net")
    groups, stats = looked_at(graph, case.feeds(32), dataset_of)
    changed, names = smooth(graph, groups, stats)
    assert names
    assert_same_function(changed, graph, case)


def test_the_attributes_of_a_rewritten_convolution_stay(dataset_of: Make) -> None:
    case = next(case for case in CASES if case.name == "depthwise")
    graph = uneven(prepare(case.model(), case.name))
    groups, stats = looked_at(graph, case.feeds(16), dataset_of)
    changed, _ = equalise(graph, groups, stats)
    before, after = ({n.name: n for n in g.nodes if n.op_type == "Conv"} for g in (graph, changed))
    assert before.keys() == after.keys()
    for name, node in before.items():
        for key in ("group", "strides", "pads", "dilations"):
            assert attribute(node, key) == attribute(after[name], key)
