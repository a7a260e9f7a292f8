from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from contracts.graphs import CASES, Builder, Case
from narrowcast.data.dataset import Dataset
from narrowcast.models.graph import Graph
from narrowcast.models.prepare import prepare
from narrowcast.recipes.recipe import StaticInt8
from narrowcast.recipes.target import FusionRules
from narrowcast.search.blame import Source, blame_of, noise_sources
from narrowcast.transforms.ranges import quantizer_of
from narrowcast.transforms.static_int8 import Memory, Prepared, quantise_static

RULES = FusionRules()
STEP = StaticInt8(ranges=("minmax",), equalise=False, reconstruct=False)
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


def prepared_of(graph: Graph, data: Dataset) -> tuple[Prepared, Memory]:
    """The graph as it is quantised, and what doing so found out."""
    memory = Memory()
    quantise_static(graph, data, STEP, RULES, memory=memory)
    assert memory.prepared is not None
    return memory.prepared, memory


def sources_of(graph: Graph, data: Dataset) -> tuple[Prepared, list[Source]]:
    prepared, memory = prepared_of(graph, data)
    return prepared, noise_sources(prepared, memory.quantizers, data, RULES)


@pytest.mark.parametrize("place", [1, 2, 3, 4])
def test_a_layer_with_a_huge_weight_is_blamed_first(place: int, data: Dataset) -> None:
    graph = chain()
    plant_weight(graph, NAMES[place], NAMES[place - 1])
    prepared, sources = sources_of(graph, data)
    found = blame_of(prepared, sources, {})
    assert found[0].group == NAMES[place]
    assert found[0].noise > 10 * found[1].noise
    worst = max(sources, key=lambda source: source.noise)
    assert worst == Source(worst.noise, NAMES[place])  # the weight, no tensor


@pytest.mark.parametrize("place", [1, 2, 3, 4])
def test_the_layer_that_makes_a_huge_activation_is_blamed_first(place: int, data: Dataset) -> None:
    graph = chain()
    plant_activation(graph, NAMES[place], NAMES[place - 1])
    prepared, sources = sources_of(graph, data)
    found = blame_of(prepared, sources, {})
    assert found[0].group == NAMES[place - 1]
    worst = max((source for source in sources if source.elements), key=lambda source: source.noise)
    assert worst == Source(worst.noise, NAMES[place - 1], (NAMES[place],), 16 * 8 * 8)
    # the reader's weight, whose scales suffer as well, is the only other culprit
    others = [s.noise for s in sources if s != worst and (s.writer, s.elements) != (NAMES[place], 0)]
    assert worst.noise > 10 * max(others)


def test_every_weight_and_every_rounded_tensor_is_a_source_once(data: Dataset) -> None:
    prepared, memory = prepared_of(chain(), data)
    shares: list[float] = []
    sources = noise_sources(prepared, memory.quantizers, data, RULES, shares.append)
    assert sorted(str(source.writer) for source in sources if not source.elements) == [*NAMES, "out"]
    tensors = {(source.writer, source.readers, source.elements) for source in sources if source.elements}
    order = [None, *NAMES, "out"]
    size = 16 * 8 * 8
    assert tensors == {
        *((writer, (reader,), size) for writer, reader in itertools.pairwise(order)),
        ("out", (), 8 * 8 * 8),
    }
    assert len(sources) == 6 + len(tensors)
    assert all(source.noise > 0 for source in sources)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_values_that_are_only_moved_about_are_read_by_what_reads_them_in_the_end(dataset_of: Make) -> None:
    case = next(case for case in CASES if case.name == "moved_values")
    _, sources = sources_of(prepare(case.model(), case.name), dataset_of(**case.feeds(8)))
    (moved,) = [source for source in sources if source.writer == "a" and source.elements]
    (reader,) = moved.readers
    assert reader in {source.writer for source in sources}
    assert moved.elements == 16 * 4 * 4


def test_every_quantised_group_is_listed_once_with_the_worst_first(data: Dataset) -> None:
    prepared, sources = sources_of(chain(), data)
    found = blame_of(prepared, sources, {"c1": 0.5, "elsewhere": 9.0})
    assert sorted(item.group for item in found) == [*NAMES, "out"]
    noises = [item.noise for item in found]
    assert noises == sorted(noises, reverse=True)
    assert {item.group: item.seconds for item in found} == dict.fromkeys([*NAMES, "out"], 0.0) | {"c1": 0.5}
    assert {item.op_type for item in found} == {"Conv"}


def test_the_blame_of_a_group_is_its_weight_and_the_tensor_that_it_makes(data: Dataset) -> None:
    prepared, _ = prepared_of(chain(), data)
    sources = [
        Source(4.0, "c1"),
        Source(2.0, "c1", ("c2",), 10),
        Source(1.0, "c2"),
        Source(16.0, None, ("c0", "c3"), 10),  # an input of the graph
    ]
    found = {item.group: item.noise for item in blame_of(prepared, sources, {})}
    assert found == {"c0": 16.0, "c1": 6.0, "c2": 1.0, "c3": 16.0, "c4": 0.0, "out": 0.0}


def test_an_input_of_the_graph_is_the_blame_of_all_its_readers(dataset_of: Make) -> None:
    case = next(case for case in CASES if case.name == "concat")
    data = dataset_of(**case.feeds(16))
    prepared, memory = prepared_of(prepare(case.model(), case.name), data)
    coarse = memory.quantizers | {"image": quantizer_of(-100.0, 100.0, False, "minmax")}
    sources = noise_sources(prepared, coarse, data, RULES)
    worst = max(sources, key=lambda source: source.noise)
    assert worst == Source(worst.noise, None, ("left", "right"), 3 * 8 * 8)
    found = blame_of(prepared, sources, {})
    assert {item.group for item in found[:2]} == {"left", "right"}
    assert all(item.noise >= worst.noise for item in found[:2])
    assert all(item.noise < 0.1 * worst.noise for item in found[2:])


def test_blame_is_repeatable(data: Dataset) -> None:
    first, again = (blame_of(*sources_of(chain(), data), {}) for _ in range(2))
    assert [item.group for item in first] == [item.group for item in again]
    assert [item.noise for item in first] == pytest.approx([item.noise for item in again], rel=1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kind_of_graph_can_be_blamed(case: Case, dataset_of: Make) -> None:
    prepared, sources = sources_of(prepare(case.model(), case.name), dataset_of(**case.feeds(8)))
    found = blame_of(prepared, sources, {})
    assert sorted(item.group for item in found) == sorted(group.name for group in prepared.groups)
    assert all(0 <= item.noise < 1 for item in found)
    assert sum(source.elements > 0 for source in sources) == len(prepared.tensors)


@pytest.mark.parametrize("name", ["attention", "gemm", "max_pool", "matmul_without_bias"])
def test_no_rounding_is_without_noise_even_where_values_are_moved_before_they_are_read(
    name: str, dataset_of: Make
) -> None:
    case = next(case for case in CASES if case.name == name)
    graph, data = prepare(case.model(), name), dataset_of(**case.feeds(16, seed=1))
    _, sources = sources_of(graph, data)
    assert all(source.noise > 0 for source in sources if source.readers)


def test_a_product_that_writes_floats_is_no_writer_of_integers(dataset_of: Make) -> None:
    """Its output is rounded for those that read it; once they are in FP32, nothing is left of that."""
    case = next(case for case in CASES if case.name == "gemm")
    graph, data = prepare(case.model(), case.name), dataset_of(**case.feeds(16, seed=1))
    _, sources = sources_of(graph, data)
    assert [source.writer for source in sources if source.readers] == [None, None]
