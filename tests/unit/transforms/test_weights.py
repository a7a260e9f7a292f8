from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from contracts.graphs import CASES, Builder
from narrowcast.data.dataset import Dataset
from narrowcast.models.execution import session_of
from narrowcast.models.graph import Graph
from narrowcast.models.prepare import prepare
from narrowcast.recipes.recipe import StaticInt8
from narrowcast.recipes.target import FusionRules
from narrowcast.transforms.rounding import LARGEST_K
from narrowcast.transforms.static_int8 import quantise_static
from narrowcast.transforms.walk import silent
from narrowcast.transforms.weight_only import quantise_weights
from narrowcast.transforms.weights import SMALLEST, store_float16, store_int8, store_tables

RNG = np.random.default_rng(0)


def convolutions() -> Graph:
    b = Builder(0)
    x = b.node("Relu", b.conv(b.input("image", 3, 8, 8), "a", (3, 64), 3, 3), out="relu")
    x = b.node("Flatten", b.node("GlobalAveragePool", b.conv(x, "b", (64, 64), 3, 3), out="pooled"), out="flat")
    b.gemm(x, "out", 64, 100)
    return prepare(b.model(out=(100,)), "net")


def table() -> Graph:
    b = Builder(0)
    values = RNG.normal(size=(500, 32)) * np.exp(RNG.uniform(-3, 3, (500, 1)))
    x = b.node("Gather", b.constant("table", values.astype(np.float32)), b.input("ids", 6, dtype=7), out="embedded")
    b.matmul(x, "out", 32, 48)
    return prepare(b.model(out=(6, 48)), "net")


def size(graph: Graph) -> int:
    return len(graph.to_model().SerializeToString())


def sqnr_db(exact: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(10 * np.log10((exact**2).sum() / ((exact - other) ** 2).sum()))


def test_float16_halves_the_file_and_int8_quarters_it() -> None:
    graph = convolutions()
    whole = size(graph)
    assert size(store_float16(graph)[0]) / whole == pytest.approx(0.5, abs=0.05)
    assert size(store_int8(graph)[0]) / whole == pytest.approx(0.25, abs=0.05)


def test_tables_are_stored_with_a_scale_for_each_row() -> None:
    graph = table()
    narrow = store_tables(graph)
    assert narrow.constants["table::q"].dtype == np.int8
    assert narrow.constants["table::scale"].shape == (500, 1)
    assert size(narrow) < 0.45 * size(graph)
    ids = {"ids": np.arange(498).reshape(-1, 6)}
    exact, other = (np.asarray(session_of(g).run(None, ids)[0]) for g in (graph, narrow))
    for row in range(0, 498 // 6, 7):  # rows of every size are kept equally well
        assert sqnr_db(exact[row], other[row]) > 35


def test_the_graph_that_was_given_stays_as_it_is() -> None:
    for make, store in ((convolutions, store_int8), (convolutions, store_float16), (table, store_tables)):
        graph = make()
        before = graph.to_model().SerializeToString()
        store(graph)
        assert graph.to_model().SerializeToString() == before


def test_small_constants_stay_as_they_are() -> None:
    b = Builder(0)
    side = int(np.sqrt(SMALLEST)) - 1
    b.gemm(b.input("x", side), "out", side, side)
    graph = prepare(b.model(out=(side,)), "net")
    for store in (store_int8, store_float16):
        narrow, plans = store(graph)
        assert plans == []
        assert narrow.to_model().SerializeToString() == graph.to_model().SerializeToString()


def test_a_weight_that_float16_cannot_hold_stays_float32() -> None:
    graph = convolutions()
    weight = graph.constants["b.w"].copy()
    weight[0, 0, 0, 0] = 1e5
    graph.constants["b.w"] = weight
    narrow, plans = store_float16(graph)
    assert {plan.group: plan.format for plan in plans} == {"a": "fp16", "b": "fp32", "out": "fp16"}
    assert narrow.constants["b.w"].dtype == np.float32
    feeds = {"image": RNG.normal(size=(2, 3, 8, 8)).astype(np.float32)}
    assert np.isfinite(session_of(narrow).run(None, feeds)[0]).all()


def test_plans_say_that_the_narrow_format_is_stored_and_not_computed_in() -> None:
    for store, form in ((store_int8, "int8"), (store_float16, "fp16")):
        _, plans = store(convolutions())
        assert [plan.group for plan in plans] == ["a", "b", "out"]
        assert {plan.format for plan in plans} == {form}
        assert not any(plan.executed for plan in plans)


def test_a_weight_with_two_readers_is_stored_once() -> None:
    b = Builder(0)
    x = b.conv(b.input("image", 16, 6, 6), "a", (16, 16), 3, 3)
    b.node("Conv", b.node("Relu", x, out="relu"), "a.w", "a.b", out="out", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    graph = prepare(b.model(out=(16, 6, 6)), "net")
    for store in (store_int8, store_float16):
        narrow, plans = store(graph)
        assert len(plans) == 1
        assert not any(v.dtype == np.float32 and v.size >= SMALLEST for v in narrow.constants.values())


def test_a_table_that_is_an_output_weight_too_still_computes_the_same() -> None:
    """Tied embeddings: one matrix is looked up at the start and multiplied with at the end."""
    b = Builder(0)
    values = b.weight("table", 48, 32, fan_in=4)
    x = b.node("Gather", values, b.input("ids", 6, dtype=7), out="embedded")
    x = b.matmul(x, "middle", 32, 32)
    b.node("MatMul", x, b.node("Transpose", values, out="turned", perm=[1, 0]), out="out")
    graph = prepare(b.model(out=(6, 48)), "net")
    ids = {"ids": RNG.integers(0, 48, (3, 6))}
    for store in (lambda g: store_int8(g)[0], store_tables, lambda g: store_float16(g)[0]):
        narrow = store(graph)
        onnx.checker.check_model(narrow.to_model(), full_check=True)
        exact, other = (np.asarray(session_of(g).run(None, ids)[0]) for g in (graph, narrow))
        assert sqnr_db(exact, other) > 30


# Codes that are settled by the outputs they give ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["depthwise", "residual", "attention", "grouped_conv"])
def test_settled_weights_lose_less_than_those_rounded_to_nearest(name: str, dataset_of: Callable[..., Dataset]) -> None:
    case = next(case for case in CASES if case.name == name)
    graph, data = prepare(case.model(), name), dataset_of(**case.feeds(48, seed=1))
    feeds = case.feeds(64, seed=2)
    exact, nearest, settled = (
        np.asarray(session_of(g).run(None, feeds)[0])
        for g in (graph, store_int8(graph)[0], quantise_weights(graph, data, FusionRules(), silent)[0])
    )
    assert sqnr_db(exact, settled) > sqnr_db(exact, nearest) + 0.5  # white noise leaves little to gain


def test_the_plan_tells_which_weights_were_settled(dataset_of: Callable[..., Dataset]) -> None:
    graph = convolutions()
    data = dataset_of(image=RNG.normal(size=(8, 3, 8, 8)).astype(np.float32))
    changed, plans = quantise_weights(graph, data, FusionRules(), silent)
    assert size(changed) < 0.35 * size(graph)
    assert {plan.remedies for plan in plans if plan.format == "int8"} == {("weights reconstructed", "bias corrected")}
    assert not any(plan.executed for plan in plans if plan.format == "int8")


def test_a_weight_that_two_operators_read_is_settled_for_neither(dataset_of: Callable[..., Dataset]) -> None:
    b = Builder(0)
    x = b.input("image", 64, 6, 6)
    shared = b.constant("shared", RNG.normal(size=(64, 64, 3, 3)).astype(np.float32) / 24)
    for number in range(2):
        x = b.node("Conv", x, shared, out=f"conv{number}", pads=[1, 1, 1, 1])
    graph = prepare(b.model(conv1=(64, 6, 6)), "net")
    data = dataset_of(image=RNG.normal(size=(8, 64, 6, 6)).astype(np.float32))
    changed, plans = quantise_weights(graph, data, FusionRules(), silent)
    assert [plan.remedies for plan in plans] == [()]
    feeds = data.load(np.arange(8))
    exact, other = (np.asarray(session_of(g).run(None, feeds)[0]) for g in (graph, changed))
    assert sqnr_db(exact, other) > 35


def test_the_plan_does_not_claim_what_was_too_large_to_be_done(dataset_of: Callable[..., Dataset]) -> None:
    b = Builder(0)
    b.gemm(b.input("x", LARGEST_K + 8), "out", LARGEST_K + 8, 4)
    graph = prepare(b.model(out=(4,)), "net")
    data = dataset_of(x=RNG.normal(size=(6, LARGEST_K + 8)).astype(np.float32))
    _, plans = quantise_weights(graph, data, FusionRules(), silent)
    static = quantise_static(graph, data, StaticInt8(), FusionRules()).operators
    assert [plan.remedies for plan in (*plans, *static)] == [("bias corrected",), ("bias corrected",)]
