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
from narrowcast.transforms.equalise import EqualisedClass, equalise, find_classes
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


def channel_magnitudes(stats: TensorStatistics) -> NDArray[Any]:
    assert stats.channel_low is not None
    assert stats.channel_high is not None
    return np.maximum(np.abs(stats.channel_low), np.abs(stats.channel_high))


def largest(stats: TensorStatistics) -> float:
    return max(-stats.low, stats.high)


def spread(stats: TensorStatistics) -> float:
    """How far the channels' largest magnitudes are apart."""
    magnitudes = channel_magnitudes(stats)
    return float(magnitudes.max() / np.median(magnitudes))


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


def relu_depthwise(b: Builder) -> onnx.ModelProto:
    x = b.node("Relu", b.conv(b.input("image", 8, 8, 8), "expand", (8, 32), 1, 1), out="expand.relu")
    x = b.conv(x, "depthwise", (32, 32), 3, 3, group=32, strides=[2, 2])
    b.conv(b.node("Relu", x, out="depthwise.relu"), "out", (32, 8), 1, 1)
    return b.model(out=(8, 4, 4))


def bounded_residual(b: Builder) -> onnx.ModelProto:
    """Two additions in a row, one of whose summands has an upper bound."""
    x = b.node("Relu", b.conv(b.input("image", 3, 8, 8), "stem", (3, 16), 3, 3), out="stem.relu")
    y = b.clip(b.conv(x, "a", (16, 16), 3, 3), "a.relu6")
    y = b.node("Add", b.conv(x, "b", (16, 16), 3, 3), y, out="first")
    y = b.node("Add", y, x, out="second")
    y = b.node("Relu", b.conv(y, "inner", (16, 16), 3, 3), out="inner.relu")
    b.conv(y, "out", (16, 8), 1, 1)
    return b.model(out=(8, 8, 8))


def case_of(name: str) -> Case:
    return next(case for case in (*CASES, RELU_DEPTHWISE) if case.name == name)


def classes_of(case: Case, make: Make, without: str = "") -> tuple[Graph, dict[str, Any], list[EqualisedClass]]:
    """The uneven graph of a case, its statistics and its classes, one group left out if it is named."""
    graph = uneven(prepare(case.model(), case.name))
    groups, stats = looked_at(graph, case.feeds(32), make)
    return graph, stats, find_classes(graph, [group for group in groups if group.name != without], stats)


RELU_DEPTHWISE = Case("relu_depthwise", relu_depthwise)
EQUALISED = ["relu_depthwise", "residual", "conv_geometry", "grouped_conv", "max_pool", "average_pool"]


@pytest.mark.parametrize("name", EQUALISED)
def test_equalisation_keeps_the_function_and_evens_out_channels(name: str, dataset_of: Make) -> None:
    case = case_of(name)
    graph, stats, classes = classes_of(case, dataset_of)
    before = graph.to_model().SerializeToString()
    changed = equalise(graph, classes)
    assert graph.to_model().SerializeToString() == before
    assert classes
    assert_same_function(changed, graph, case)
    assert any(found.factor.min() < 0.8 for found in classes)
    _, after = looked_at(changed, case.feeds(32), dataset_of)
    for found in classes:
        seen = found.tensors & stats.keys()
        assert seen
        for tensor in seen:
            assert spread(after[tensor]) < spread(stats[tensor])
            # none outgrows the largest channel
            assert largest(after[tensor]) <= max(largest(stats[other]) for other in seen) * (1 + 1e-5)


@pytest.mark.parametrize("name", EQUALISED)
def test_the_largest_channel_stays_and_the_others_come_closer_without_reaching_it(name: str, dataset_of: Make) -> None:
    _, stats, classes = classes_of(case_of(name), dataset_of)
    for found in classes:
        before = np.max([channel_magnitudes(stats[tensor]) for tensor in found.tensors & stats.keys()], axis=0)
        top = before.argmax()
        assert found.factor.max() == found.factor[top] == 1.0
        assert found.factor.min() > 0
        evened, smaller = before / found.factor, before < 0.99 * before[top]
        assert smaller.any()
        assert (evened[smaller] > before[smaller]).all()
        assert (evened[smaller] < before[top]).all()


@pytest.mark.parametrize("case", [*CASES, RELU_DEPTHWISE, Case("bounded_residual", bounded_residual)], ids=str)
def test_equalisation_never_changes_what_a_graph_computes(case: Case, dataset_of: Make) -> None:
    graph, _, classes = classes_of(case, dataset_of)
    assert_same_function(equalise(graph, classes), graph, case)


def test_tensors_tied_by_an_addition_share_one_factor(dataset_of: Make) -> None:
    _, _, classes = classes_of(case_of("residual"), dataset_of)
    found = {(item.writers, item.readers): item.tensors for item in classes}
    assert found == {
        (("stem", "b"), ("a", "out")): {"stem", "stem.relu", "b", "sum", "sum.relu"},
        (("a",), ("b",)): {"a", "a.relu"},
    }


def test_each_class_can_be_equalised_on_its_own(dataset_of: Make) -> None:
    case = case_of("residual")
    graph, _, classes = classes_of(case, dataset_of)
    for found in classes:
        changed = equalise(graph, [found])
        assert_same_function(changed, graph, case)
        old, new = ({n.name: n.input[1] for n in g.nodes if n.op_type == "Conv"} for g in (graph, changed))
        assert {name for name in old if old[name] != new[name]} == {*found.writers, *found.readers}


def test_a_channel_that_is_always_zero_gets_a_factor_that_can_be_divided_by(dataset_of: Make) -> None:
    case = case_of("relu_depthwise")
    graph = prepare(case.model(), case.name)
    for name in ("expand.w", "expand.b"):
        dead = graph.constants[name].copy()
        dead[3] = 0
        graph.constants[name] = dead
    groups, stats = looked_at(graph, case.feeds(16), dataset_of)
    classes = find_classes(graph, groups, stats)
    (found,) = [item for item in classes if "expand.relu" in item.tensors]
    assert found.factor.argmin() == 3
    assert found.factor[3] > 0.01
    assert_same_function(equalise(graph, classes), graph, case)


def test_graph_inputs_and_outputs_keep_their_scale(dataset_of: Make) -> None:
    for name in ("inner_output", "residual", "several_inputs_and_outputs"):
        graph, _, classes = classes_of(case_of(name), dataset_of)
        ends = {info.name for info in (*graph.inputs, *graph.outputs)}
        assert not any(found.tensors & ends for found in classes)


def test_groups_kept_in_float_are_left_alone(dataset_of: Make) -> None:
    case = case_of("residual")
    graph, _, classes = classes_of(case, dataset_of, without="b")
    assert not classes
    assert equalise(graph, classes).to_model().SerializeToString() == graph.to_model().SerializeToString()
    assert len(classes_of(case, dataset_of)[2]) == 2


@pytest.mark.parametrize("name", ["conv_relu6", "depthwise"])
def test_tensors_with_an_upper_bound_are_left_alone(name: str, dataset_of: Make) -> None:
    assert classes_of(case_of(name), dataset_of)[2] == []


def test_a_bound_on_one_summand_leaves_all_that_is_tied_to_it_alone(dataset_of: Make) -> None:
    _, _, classes = classes_of(Case("bounded_residual", bounded_residual), dataset_of)
    assert [found.tensors for found in classes] == [{"inner", "inner.relu"}]


def test_the_attributes_of_a_rewritten_convolution_stay(dataset_of: Make) -> None:
    graph, _, classes = classes_of(case_of("relu_depthwise"), dataset_of)
    before, after = ({n.name: n for n in g.nodes if n.op_type == "Conv"} for g in (graph, equalise(graph, classes)))
    assert before.keys() == after.keys()
    for name, node in before.items():
        for key in ("group", "strides", "pads", "dilations"):
            assert attribute(node, key) == attribute(after[name], key)


def test_a_bound_that_is_computed_on_the_way_does_not_break_it(dataset_of: Make) -> None:
    b = Builder(3)
    x = b.conv(b.input("image", 3, 8, 8), "a", (3, 8), 3, 3)
    high = b.node("ReduceMax", b.node("Abs", x, out="magnitude"), out="high", keepdims=0)
    x = b.node("Clip", x, b.constant("zero", np.float32(0)), high, out="clipped")
    b.conv(x, "b", (8, 4), 1, 1)
    case = Case("computed", lambda _: b.model(b=(4, 8, 8)))
    graph = prepare(case.model(), case.name)
    groups, stats = looked_at(
        graph, {"image": np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)}, dataset_of
    )
    assert not find_classes(graph, groups, stats)


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
