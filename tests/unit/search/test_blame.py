from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from contracts.graphs import CASES, Builder, Case
from narrowcast.data.dataset import Dataset
from narrowcast.models.graph import Graph
from narrowcast.models.prepare import prepare
from narrowcast.recipes.target import FusionRules
from narrowcast.search.blame import blame_groups

RULES = FusionRules()
NAMES = ["c0", "c1", "c2", "c3", "c4"]
Make = Callable[..., Dataset]


def chain() -> Graph:
    b = Builder(1)
    x = b.input("image", 16, 8, 8)
    for name in NAMES:
        x = b.node("Relu", b.conv(x, name, (16, 16), 3, 3), out=f"{name}.relu")
    b.conv(x, "out", (16, 8), 1, 1)
    return prepare(b.model(out=(8, 8, 8)), "chain")


@pytest.fixture
def data(dataset_of: Make) -> Dataset:
    return dataset_of(image=np.random.default_rng(0).normal(size=(16, 16, 8, 8)).astype(np.float32))


def plant_weight(graph: Graph, name: str, before: str) -> None:
    """A huge weight that reads a channel which is always 0: the scale suffers and the output does not."""
    bias = graph.constants[f"{before}.b"].copy()
    bias[5] = -1e3
    graph.constants[f"{before}.b"] = bias
    weight = graph.constants[f"{name}.w"].copy()
    weight[:, 5] = 300.0
    graph.constants[f"{name}.w"] = weight


def plant_activation(graph: Graph, name: str, before: str) -> None:
    """A channel far larger than the rest, and weights that take it back: the range suffers and the output does not."""
    for suffix in ("w", "b"):
        value = graph.constants[f"{before}.{suffix}"].copy()
        value[5] *= 3000
        graph.constants[f"{before}.{suffix}"] = value
    weight = graph.constants[f"{name}.w"].copy()
    weight[:, 5] /= 3000
    graph.constants[f"{name}.w"] = weight


@pytest.mark.parametrize("place", [1, 2, 3, 4])
def test_a_layer_with_a_huge_weight_is_blamed_first(place: int, data: Dataset) -> None:
    graph = chain()
    plant_weight(graph, NAMES[place], NAMES[place - 1])
    found = blame_groups(graph, data, RULES)
    assert found[0].group == NAMES[place]
    assert found[0].noise > 10 * found[1].noise


@pytest.mark.parametrize("place", [1, 2, 3, 4])
def test_the_layers_around_a_huge_activation_are_blamed_first(place: int, data: Dataset) -> None:
    graph = chain()
    plant_activation(graph, NAMES[place], NAMES[place - 1])
    found = blame_groups(graph, data, RULES)
    assert {item.group for item in found[:2]} == {NAMES[place - 1], NAMES[place]}
    assert found[1].noise > 10 * found[2].noise


def test_every_quantised_group_is_listed_once_with_the_worst_first(data: Dataset) -> None:
    shares: list[float] = []
    found = blame_groups(chain(), data, RULES, shares.append)
    assert sorted(item.group for item in found) == [*NAMES, "out"]
    noises = [item.noise for item in found]
    assert noises == sorted(noises, reverse=True)
    assert all(noise > 0 for noise in noises)
    assert all(item.seconds > 0 for item in found)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_blame_is_repeatable(data: Dataset) -> None:
    first, again = (blame_groups(chain(), data, RULES) for _ in range(2))
    assert [(item.group, item.noise) for item in first] == [(item.group, item.noise) for item in again]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kind_of_graph_can_be_blamed(case: Case, dataset_of: Make) -> None:
    found = blame_groups(prepare(case.model(), case.name), dataset_of(**case.feeds(8)), RULES)
    assert found
    assert all(0 <= item.noise < 1 for item in found)
