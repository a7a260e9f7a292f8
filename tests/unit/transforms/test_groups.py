from __future__ import annotations

import numpy as np
import pytest

from contracts.graphs import CASES, Builder
from narrowcast.models.graph import Graph
from narrowcast.models.prepare import prepare
from narrowcast.recipes.target import FusionRules
from narrowcast.transforms.groups import Group, activation_bounds, find_groups, quantised_groups, root_of

RULES = FusionRules()


def graph_of(name: str) -> Graph:
    return prepare(next(case for case in CASES if case.name == name).model(), name)


def groups_of(name: str) -> dict[str, Group]:
    return {group.name: group for group in find_groups(graph_of(name), RULES)}


def test_a_convolution_takes_its_activation_and_bias_along() -> None:
    first = groups_of("conv_relu6")["first"]
    assert first.kind == "linear"
    assert first.nodes == ("first", "relu6")
    assert first.activations == ("relu6",)
    assert (first.inputs, first.output) == (("image",), "relu6")
    assert (first.weight, first.bias, first.bias_node) == ("first.w", "first.b", None)


def test_a_matrix_product_takes_the_addition_of_its_bias_along() -> None:
    groups = groups_of("matmul_bias")
    first = groups["first.product"]
    assert first.nodes == ("first.product", "first", "relu")
    assert (first.bias, first.bias_node) == ("first.b", "first")
    assert "first" not in groups


def test_products_and_sums_of_activations_are_told_apart() -> None:
    groups = groups_of("attention")
    assert {group.kind for group in groups.values() if group.op_type == "MatMul"} == {"linear"}
    assert "scores" not in groups
    assert groups["out"].kind == "elementwise"
    residual = groups_of("residual")
    assert residual["sum"].inputs == ("b", "stem.relu")
    assert residual["sum"].nodes == ("sum", "sum.relu")


def test_a_tensor_that_leaves_the_graph_ends_its_group() -> None:
    b = Builder(0)
    x = b.conv(b.input("image", 3, 6, 6), "a", (3, 16), 3, 3)
    b.conv(b.node("Relu", x, out="relu"), "out", (16, 8), 3, 3)
    (first, _) = find_groups(prepare(b.model(out=(8, 6, 6), a=(16, 6, 6)), "net"), RULES)
    assert (first.name, first.nodes, first.output) == ("a", ("a",), "a")


def test_a_tensor_with_two_readers_ends_its_group() -> None:
    assert groups_of("gated")["a"].nodes == ("a",)


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_no_operator_is_in_two_groups_and_outputs_are_made_by_members(name: str) -> None:
    graph, seen = graph_of(name), set[str]()
    producers = graph.producers()
    for group in find_groups(graph, RULES):
        assert not seen & set(group.nodes)
        seen |= set(group.nodes)
        assert producers[group.output].name == group.nodes[-1]


def test_rules_decide_what_is_a_group() -> None:
    rules = RULES.model_copy(update={"linear": frozenset({"MatMul"}), "pooling": frozenset()})
    assert {group.op_type for group in find_groups(graph_of("global_pool"), rules)} == set()
    assert {group.op_type for group in find_groups(graph_of("global_pool"), RULES)} >= {"Conv", "GlobalAveragePool"}


def test_what_is_kept_in_float_is_not_quantised_nor_what_only_follows_it() -> None:
    graph = graph_of("residual")
    every = find_groups(graph, RULES)
    names = lambda keep: [g.name for g in quantised_groups(graph, every, RULES, frozenset(keep))]  # noqa: E731
    assert names([]) == ["stem", "a", "b", "sum", "out"]
    assert names(["a"]) == ["stem", "b", "sum", "out"]
    assert names(["stem", "b"]) == ["a", "out"]
    assert names(["stem", "a", "b", "sum", "out"]) == []


def test_moved_values_have_one_root() -> None:
    graph = graph_of("moved_values")
    producers = graph.producers()
    (product,) = [node for node in graph.nodes if node.op_type == "MatMul"]
    assert root_of(product.input[0], producers, RULES) == "relu"
    assert root_of("image", producers, RULES) == "image"


def test_bounds_of_activations_are_what_they_let_through() -> None:
    b = Builder(0)
    x = b.input("x", 4)
    b.node("Relu", x, out="relu")
    b.clip(x, "clip", -1.0, 6.0)
    b.node("Clip", x, "", b.constant("top", np.array(3.0, np.float32)), out="half")
    b.node("Min", x, b.constant("bounds", np.array([5, 2, 9, 7], np.float32)), out="min")
    graph = Graph.from_model(b.model(relu=(4,), clip=(4,), half=(4,), min=(4,)))
    infinity = float("inf")
    found = {node.name: activation_bounds(graph, node) for node in graph.nodes}
    assert found == {"relu": (0, infinity), "clip": (-1, 6), "half": (-infinity, 3), "min": (-infinity, 2)}
