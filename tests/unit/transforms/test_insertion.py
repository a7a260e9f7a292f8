from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from contracts.graphs import CASES, Builder, Case
from narrowcast.data.dataset import Dataset
from narrowcast.models.execution import StagedExecutor, session_of
from narrowcast.models.graph import Graph
from narrowcast.models.prepare import prepare
from narrowcast.recipes.target import FusionRules
from narrowcast.transforms.calibration import calibrate
from narrowcast.transforms.equalise import equalise, find_classes
from narrowcast.transforms.groups import Group, boundaries, find_groups
from narrowcast.transforms.insertion import (
    insertion_noise,
    noise_share,
    rounded_tensor,
    rounded_weight,
    scale_inputs,
)
from narrowcast.transforms.operators import Operators, mean_error
from narrowcast.transforms.ranges import Quantizer, quantizer_of

RULES = FusionRules()
Array = NDArray[Any]
Tensors = dict[str, Array]
Make = Callable[..., Dataset]


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def cut(case: Case) -> tuple[Graph, dict[str, Group], StagedExecutor]:
    graph = prepare(case.model(), case.name)
    groups = find_groups(graph, RULES)
    tensors = {name for group in groups for name in (*group.inputs, group.output)}
    return graph, {group.name: group for group in groups}, StagedExecutor(graph, boundaries(groups), tensors)


def quantizer(span: float, method: str = "minmax") -> Quantizer:
    return quantizer_of(-span, span, False, method)


def run(graph: Graph, feeds: Tensors) -> list[Array]:
    return [np.asarray(value) for value in session_of(graph).run(None, feeds)]


def every_tensor(executor: StagedExecutor, feeds: Tensors) -> Tensors:
    found = dict(feeds)
    for _, alive in executor.walk(feeds):
        found |= alive
    return found


# The share of noise ---------------------------------------------------------------------------------------------------


def test_the_share_is_one_of_energies() -> None:
    exact = np.full((4, 5), 10.0, np.float32)
    assert noise_share(exact, exact) == 0.0
    assert noise_share(exact, exact + 1) == pytest.approx(0.01)
    assert noise_share(exact, exact * 0) == pytest.approx(1.0)


def test_whole_numbers_and_empty_tensors_have_no_noise() -> None:
    assert noise_share(np.arange(3), np.arange(3) + 1) == 0.0
    assert noise_share(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32)) == 0.0


# Insertion ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_tensor_that_is_left_as_it_is_brings_no_noise(case: Case) -> None:
    _, _, executor = cut(case)
    feeds = case.feeds(3)
    tensors = every_tensor(executor, feeds)
    same = {name: [lambda alive, name=name: alive[name].copy()] for name in tensors}
    assert insertion_noise(executor, feeds, same) == {name: [0.0] for name in tensors}


@pytest.mark.parametrize("tensor", ["image", "stem.relu", "a.relu", "b", "sum.relu", "out"])
def test_the_noise_of_a_tensor_is_what_the_rest_of_the_graph_makes_of_it(tensor: str) -> None:
    case = case_of("residual")
    graph, _, executor = cut(case)
    feeds = case.feeds(4)
    rounded = quantizer(9.0)
    (noise,) = insertion_noise(executor, feeds, {tensor: [rounded_tensor(tensor, rounded)]})[tensor]
    tensors = every_tensor(executor, feeds)
    tensors |= {tensor: rounded.apply(tensors[tensor])}
    made = {name for node in graph.nodes for name in node.output}
    order = [node.output[0] for node in graph.nodes]
    rest = graph.nodes[order.index(tensor) + 1 if tensor in made else 0 :]
    output = tensors["out"]
    if rest:
        half = graph.subgraph(rest, ["out"])
        (output,) = run(half, {info.name: tensors[info.name] for info in half.inputs})
    assert noise == pytest.approx(noise_share(run(graph, feeds)[0], output), rel=1e-4)
    assert noise > 0


def test_the_noise_of_several_outputs_is_added_up() -> None:
    case = case_of("several_inputs_and_outputs")
    graph, _, executor = cut(case)
    feeds = case.feeds(4)
    left = rounded_tensor("left", quantizer(4.0))
    (noise,) = insertion_noise(executor, feeds, {"left": [left]})["left"]
    exact, other = (run(graph, item) for item in (feeds, feeds | {"left": left(feeds)}))
    assert noise == pytest.approx(sum(map(noise_share, exact, other)), rel=1e-5)


def test_disturbances_are_answered_in_their_order_and_grow_with_the_step() -> None:
    case = case_of("residual")
    _, _, executor = cut(case)
    steps = [rounded_tensor("stem.relu", quantizer(span)) for span in (8.0, 32.0, 128.0)]
    both = {"stem.relu": steps, "a.relu": [rounded_tensor("a.relu", quantizer(8.0))]}
    found = insertion_noise(executor, case.feeds(8), both)
    assert {name: len(values) for name, values in found.items()} == {"stem.relu": 3, "a.relu": 1}
    small, medium, large = found["stem.relu"]
    assert 0 < 4 * small < medium < large / 4
    assert insertion_noise(executor, case.feeds(8), {"stem.relu": steps[::-1]})["stem.relu"] == [large, medium, small]


def test_progress_of_the_insertion_rises_to_the_end() -> None:
    case, shares = case_of("residual"), list[float]()
    _, _, executor = cut(case)
    insertion_noise(executor, case.feeds(2), {}, shares.append)
    assert shares == sorted(shares)
    assert len(shares) == len(executor.stages)
    assert shares[-1] == 1.0


# Roundings ------------------------------------------------------------------------------------------------------------


def test_a_tensor_is_rounded_by_its_quantizer() -> None:
    values = np.random.default_rng(0).normal(size=(2, 4, 3, 3)).astype(np.float32)
    rounded, factor = quantizer(3.0), np.array([1, 0.5, 0.25, 0.125], np.float32)
    np.testing.assert_array_equal(rounded_tensor("x", rounded)({"x": values}), rounded.apply(values))
    divided = rounded_tensor("x", rounded, factor)({"x": values})
    for channel, share in enumerate(factor):
        # steps of a channel are as much smaller as it was divided by, and so is what is cut off
        np.testing.assert_array_equal(
            divided[:, channel], rounded.apply(values[:, channel] / share) * share, err_msg=str(channel)
        )


def test_rounding_with_a_factor_is_rounding_the_equalised_graph(dataset_of: Make) -> None:
    case = case_of("residual")
    graph, groups, executor = cut(case)
    feeds = case.feeds(6)
    statistics = calibrate(executor, dataset_of(**feeds), set(every_tensor(executor, feeds)) - {"image"})
    classes = find_classes(graph, list(groups.values()), statistics)
    assert len(classes) == 2
    for found in classes:
        changed = equalise(graph, [found])
        other = StagedExecutor(changed, boundaries(list(groups.values())), executor.graph.values)
        for tensor in sorted(found.tensors & statistics.keys()):
            with_factor = insertion_noise(
                executor, feeds, {tensor: [rounded_tensor(tensor, quantizer(6.0), found.factor)]}
            )
            plain = insertion_noise(other, feeds, {tensor: [rounded_tensor(tensor, quantizer(6.0))]})
            assert with_factor[tensor][0] == pytest.approx(plain[tensor][0], rel=0.01)
        operators, theirs = Operators(graph), Operators(changed)
        again = {group.name: group for group in find_groups(changed, RULES)}
        for name in found.readers:
            output = groups[name].output
            with_factor = insertion_noise(
                executor, feeds, {output: [rounded_weight(operators, groups[name], found.factor)]}
            )
            plain = insertion_noise(other, feeds, {output: [rounded_weight(theirs, again[name])]})
            without = insertion_noise(executor, feeds, {output: [rounded_weight(operators, groups[name])]})
            assert with_factor[output][0] == pytest.approx(plain[output][0], rel=0.01)
            assert with_factor[output][0] != pytest.approx(without[output][0], rel=0.01)


def linear_groups() -> list[Any]:
    found = (
        ("conv_relu6", "out"),
        ("depthwise", "out"),
        ("grouped_conv", "out"),
        ("conv_1d", "out"),
        ("matmul_bias", "out.product"),
        ("matmul_without_bias", "out"),
        ("gemm", "first"),
        ("gemm", "out"),
        ("depthwise", "depthwise"),
    )
    return [pytest.param(*item, id="-".join(item)) for item in found]


@pytest.mark.parametrize(("name", "group"), linear_groups())
def test_a_rounded_weight_has_noise_but_no_mean_error(name: str, group: str) -> None:
    case = case_of(name)
    graph, groups, executor = cut(case)
    tensors = every_tensor(executor, case.feeds(8))
    item = groups[group]
    operators = Operators(graph)
    feeds = {tensor: tensors[tensor] for tensor in item.inputs}
    exact = operators.before_activation(item, feeds)
    # the same group without its activations shows what is computed ahead of them
    bare = replace(item, nodes=tuple(node for node in item.nodes if node not in item.activations), activations=())
    rounded = rounded_weight(operators, bare)(tensors)
    size = float(np.abs(exact).mean())
    assert np.abs(mean_error(bare, exact, rounded)).max() < 1e-5 * size
    assert 1e-4 * size < np.abs(exact - rounded).max() < 0.1 * size
    np.testing.assert_array_equal(rounded_weight(operators, item)(tensors), operators.activate(item, rounded))


def test_a_weight_that_codes_can_tell_exactly_brings_no_noise() -> None:
    b = Builder(0)
    x = b.input("image", 4, 6, 6)
    codes = np.random.default_rng(1).integers(-127, 128, (8, 4, 3, 3)).astype(np.float32)
    codes[:, 0, 0, 0] = 127
    b.node("Conv", x, b.constant("w", codes / 64), out="out", kernel_shape=[3, 3], pads=[1] * 4)
    case = Case("exact", lambda _: b.model(out=(8, 6, 6)))
    graph, groups, executor = cut(case)
    noise = insertion_noise(executor, case.feeds(2), {"out": [rounded_weight(Operators(graph), groups["out"])]})
    assert noise["out"][0] < 1e-10


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_each_input_channel_of_a_weight_is_scaled_by_its_own_factor(groups: int) -> None:
    rng = np.random.default_rng(groups)
    weight = rng.normal(size=(12, 6 // groups, 3, 3)).astype(np.float32)
    factor = rng.uniform(0.1, 1, 6).astype(np.float32)
    scaled = scale_inputs(weight, groups, factor)
    assert scaled.dtype == np.float32
    for out in range(12):
        first = out // (12 // groups) * (6 // groups)
        for column in range(6 // groups):
            np.testing.assert_allclose(scaled[out, column], weight[out, column] * factor[first + column], rtol=1e-6)
