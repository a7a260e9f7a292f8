from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from contracts.graphs import CASES, Builder, Case
from narrowcast.data.dataset import Dataset
from narrowcast.models.execution import session_of
from narrowcast.models.graph import Graph
from narrowcast.models.prepare import prepare
from narrowcast.recipes.plan import Plan
from narrowcast.recipes.recipe import DynamicInt8, Float16Weights, Recipe, StaticInt8, WeightOnlyInt8
from narrowcast.recipes.target import FusionRules, Target
from narrowcast.transforms.apply import apply_recipe
from narrowcast.transforms.groups import find_groups
from narrowcast.transforms.insertion import noise_share
from narrowcast.transforms.static_int8 import Memory, StaticResult, prepare_static, quantise_static
from narrowcast.transforms.walk import sqnr_db

RULES = FusionRules()
PLAIN = StaticInt8(ranges=("minmax",), equalise=False, reconstruct=False, bias_correction=False)
Make = Callable[..., Dataset]


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def run(graph: Graph, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    return [np.asarray(value) for value in session_of(graph).run(None, feeds)]


def test_sqnr_is_in_decibels_of_power() -> None:
    exact = np.full((4, 5), 10.0, np.float32)
    assert sqnr_db(exact, exact + 1) == pytest.approx(20.0)
    assert sqnr_db(exact, exact) == 200.0


def test_the_same_input_gives_the_same_graph_to_the_byte(dataset_of: Make) -> None:
    case = case_of("residual")
    data, graph = dataset_of(**case.feeds(32)), prepare(case.model(), "net")
    first, again = (quantise_static(graph, data, StaticInt8(), RULES).graph.to_model() for _ in range(2))
    assert first.SerializeToString() == again.SerializeToString()


def test_the_graph_that_was_given_stays_as_it_is(dataset_of: Make) -> None:
    for name in ("depthwise", "several_inputs_and_outputs", "attention"):
        case = case_of(name)
        graph = prepare(case.model(), name)
        before = graph.to_model().SerializeToString()
        for step in (StaticInt8(), DynamicInt8()):
            apply_recipe(Recipe(name="x", steps=(step,)), graph, dataset_of(**case.feeds(16)), RULES)
        assert graph.to_model().SerializeToString() == before


def test_what_is_kept_in_float_stays_float_and_the_rest_does_not(dataset_of: Make) -> None:
    case = case_of("residual")
    graph = prepare(case.model(), "net")
    step = StaticInt8(keep_float=frozenset({"a", "out"}), equalise=False)
    result = quantise_static(graph, dataset_of(**case.feeds(32)), step, RULES)
    formats = {operator.group: operator.format for operator in result.operators}
    assert formats == {"stem": "int8", "a": "fp32", "b": "int8", "sum": "int8", "out": "fp32"}
    for name in ("a.w", "out.w"):
        np.testing.assert_array_equal(result.graph.constants[name], graph.constants[name])
    assert not {"b.w", "stem.w"} & result.graph.constants.keys()


@pytest.mark.parametrize("equalise", [False, True])
def test_keeping_everything_in_float_gives_the_original_function(equalise: bool, dataset_of: Make) -> None:
    case = case_of("residual")
    graph = prepare(case.model(), "net")
    step = StaticInt8(keep_float=frozenset({"stem", "a", "b", "sum", "out"}), equalise=equalise)
    result = quantise_static(graph, dataset_of(**case.feeds(16)), step, RULES)
    assert not any("Quantize" in node.op_type for node in result.graph.nodes)
    assert {operator.format for operator in result.operators} == {"fp32"}
    ours, theirs = (run(item, case.feeds(4))[0] for item in (result.graph, graph))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * float(np.abs(theirs).max()) if equalise else 0)


def test_an_activation_that_saturation_stands_for_is_gone(dataset_of: Make) -> None:
    case = case_of("conv_relu6")
    result = quantise_static(prepare(case.model(), "net"), dataset_of(**case.feeds(32)), StaticInt8(), RULES)
    assert not {"Clip", "Relu", "Min", "Max"} & {node.op_type for node in result.graph.nodes}


def test_weights_are_symmetric_per_channel_and_activations_have_one_scale(dataset_of: Make) -> None:
    case = case_of("depthwise")
    result = quantise_static(prepare(case.model(), "net"), dataset_of(**case.feeds(32)), StaticInt8(), RULES)
    constants = result.graph.constants
    weights = 0
    for node in result.graph.nodes:
        if node.op_type != "DequantizeLinear":
            continue
        codes, scale, zero = (constants.get(name) for name in node.input)
        assert scale is not None
        assert zero is not None
        if codes is None:
            assert scale.ndim == 0
            assert zero.dtype == np.uint8
        elif codes.dtype == np.int8:
            weights += 1
            assert scale.shape == (codes.shape[0],)
            assert not zero.any()
            assert codes.min() >= -127
        else:
            assert codes.dtype == np.int32
    assert weights == 3


def test_the_plan_tells_the_range_of_every_quantised_tensor(dataset_of: Make) -> None:
    case = case_of("residual")
    result = quantise_static(prepare(case.model(), "net"), dataset_of(**case.feeds(32)), StaticInt8(), RULES)
    quantised = {node.input[0] for node in result.graph.nodes if node.op_type == "QuantizeLinear"}
    assert len(result.ranges) == len(quantised)
    by_name = {span.tensor: span for span in result.ranges}
    assert by_name["stem.relu"].low == 0
    for span in result.ranges:
        assert span.low <= 0 <= span.high
        assert span.method in ("minmax", "percentile", "entropy", "mse")
        assert np.isclose(span.high - span.low, 255 * span.scale)
    assert all(operator.sqnr_db is not None and operator.sqnr_db > 20 for operator in result.operators)
    assert result.histograms.keys() <= by_name.keys()
    for edges, before, after in result.histograms.values():
        assert len(edges) == len(before) + 1 == len(after) + 1
        assert sum(before) == sum(after) > 0


@pytest.mark.parametrize("name", ["depthwise", "residual", "attention", "global_pool"])
def test_every_remedy_together_beats_plain_min_max_rounding(name: str, dataset_of: Make) -> None:
    case = case_of(name)
    graph, data = prepare(case.model(), name), dataset_of(**case.feeds(64, seed=1))
    feeds = case.feeds(64, seed=2)
    (exact,) = run(graph, feeds)
    noise = {}
    for label, step in (("plain", PLAIN), ("full", StaticInt8())):
        (outputs,) = run(quantise_static(graph, data, step, RULES).graph, feeds)
        noise[label] = noise_share(exact, outputs)
    assert noise["full"] < noise["plain"]


def test_bias_correction_takes_the_mean_error_out(dataset_of: Make) -> None:
    b = Builder(8)
    x = b.node("Relu", b.conv(b.input("image", 3, 8, 8), "a", (3, 16), 3, 3), out="relu")
    b.conv(x, "out", (16, 12), 1, 1)
    graph = prepare(b.model(out=(12, 8, 8)), "net")
    feeds = {"image": np.random.default_rng(0).normal(size=(64, 3, 8, 8)).astype(np.float32) + 1}
    (exact,) = run(graph, feeds)
    means = []
    for correct in (False, True):
        step = PLAIN.model_copy(update={"bias_correction": correct})
        (outputs,) = run(quantise_static(graph, dataset_of(**feeds), step, RULES).graph, feeds)
        means.append(np.abs((outputs - exact).mean((0, 2, 3))).mean())
    assert means[1] < 0.6 * means[0]


@pytest.mark.parametrize("step", [StaticInt8(), DynamicInt8()], ids=lambda step: step.type)
def test_calibration_streams(step: Any) -> None:
    """However many samples there are, few are ever held at once."""
    case = case_of("gemm")
    largest = []

    def load(indices: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        largest.append(len(indices))
        return {"x": np.random.default_rng(len(indices)).normal(size=(len(indices), 24)).astype(np.float32)}

    data = Dataset("stream", "0", 3000, load)
    apply_recipe(Recipe(name="x", steps=(step,)), prepare(case.model(), "net"), data, RULES)
    assert max(largest) <= 128


@pytest.mark.parametrize("size", [1, 2, 5])
def test_very_few_samples_are_enough_to_get_a_graph(size: int, dataset_of: Make) -> None:
    for name in ("residual", "attention"):
        case = case_of(name)
        result = quantise_static(prepare(case.model(), name), dataset_of(**case.feeds(size)), StaticInt8(), RULES)
        assert all(np.isfinite(array).all() for array in run(result.graph, case.feeds(3)))


def test_inputs_that_are_always_zero_do_not_break_it(dataset_of: Make) -> None:
    case = case_of("residual")
    feeds = {"image": np.zeros((8, 3, 8, 8), np.float32)}
    result = quantise_static(prepare(case.model(), "net"), dataset_of(**feeds), StaticInt8(), RULES)
    assert all(np.isfinite(array).all() for array in run(result.graph, feeds))


def test_progress_of_each_stage_rises_to_the_end(dataset_of: Make) -> None:
    case, seen = case_of("residual"), list[tuple[str, float]]()
    recipe = Recipe(name="x", steps=(StaticInt8(),))
    apply_recipe(
        recipe, prepare(case.model(), "net"), dataset_of(**case.feeds(32)), RULES, lambda n, s: seen.append((n, s))
    )
    shares = [share for name, share in seen if name == "operators"]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_runtime_with_signed_activations_gets_them(dataset_of: Make) -> None:
    case = case_of("residual")
    rules = RULES.model_copy(update={"signed_activations": True})
    graph, feeds = prepare(case.model(), "net"), case.feeds(32)
    result = quantise_static(graph, dataset_of(**feeds), StaticInt8(), rules)
    assert np.dtype(np.uint8) not in {array.dtype for array in result.graph.constants.values()}
    assert noise_share(run(graph, feeds)[0], run(result.graph, feeds)[0]) < 0.01


@pytest.mark.parametrize("suffix", ["_q", "_dq", "_scale", "_zero_point", "_raw", "_product", "_int", "_cast", "_wide"])
@pytest.mark.parametrize(
    "step", [StaticInt8(), DynamicInt8(), WeightOnlyInt8(), Float16Weights()], ids=lambda s: s.type
)
def test_tensors_of_the_model_may_have_any_name(step: Any, suffix: str, dataset_of: Make) -> None:
    """A name that a transform would like to use may be taken already."""
    case = case_of("matmul_bias") if isinstance(step, DynamicInt8) else case_of("residual")
    model = case.model()
    tensors = [name for node in model.graph.node for name in node.output if name != "out"]
    renames = {name: f"x{i // 2}{suffix if i % 2 else ''}" for i, name in enumerate(tensors)}
    renames |= {f"{name}.w": f"x{number}.w{suffix}" for number, name in enumerate(("stem", "b"))}
    for node in model.graph.node:
        for names in (node.input, node.output):
            for position, name in enumerate(names):
                names[position] = renames.get(name, name)
    for item in model.graph.initializer:
        item.name = renames.get(item.name, item.name)
    graph, feeds = prepare(model, "net"), case.feeds(32)
    built = apply_recipe(Recipe(name="x", steps=(step,)), graph, dataset_of(**feeds), RULES)
    onnx.checker.check_model(built.graph.to_model(), full_check=True)
    assert noise_share(run(graph, feeds)[0], run(built.graph, feeds)[0]) < 0.01


@pytest.mark.parametrize("name", ["residual", "depthwise", "attention"])
def test_what_an_earlier_call_found_out_serves_the_next_one(name: str, dataset_of: Make) -> None:
    case = case_of(name)
    graph, data, memory = prepare(case.model(), name), dataset_of(**case.feeds(48, seed=1)), Memory()
    feeds = case.feeds(32, seed=2)
    (exact,) = run(graph, feeds)
    first = quantise_static(graph, data, StaticInt8(), RULES, memory=memory)
    order = [operator.group for operator in first.operators]
    for number in (1, len(order) // 2, 1):
        step = StaticInt8(keep_float=frozenset(order[:number]))
        fresh, again = (quantise_static(graph, data, step, RULES, memory=m) for m in (Memory(), memory))
        assert [o.format for o in again.operators] == [o.format for o in fresh.operators]
        assert noise_share(exact, run(again.graph, feeds)[0]) < 2 * noise_share(exact, run(fresh.graph, feeds)[0])


def test_the_next_call_gets_the_very_graph_that_the_first_one_prepared(dataset_of: Make) -> None:
    case = case_of("residual")
    graph, data, memory = prepare(case.model(), "net"), dataset_of(**case.feeds(24)), Memory()
    first = prepare_static(graph, data, StaticInt8(), RULES, memory=memory)
    assert memory.prepared is first
    stages: list[str] = []
    step = StaticInt8(keep_float=frozenset({"a"}))
    assert prepare_static(graph, data, step, RULES, lambda name, share: stages.append(name), memory) is first
    assert stages == []  # nothing was calibrated or judged again
    quantise_static(graph, data, step, RULES, memory=memory)
    assert memory.prepared is first
    assert prepare_static(graph, data, StaticInt8(), RULES, memory=Memory()) is not first


def test_what_is_kept_in_float_does_not_change_what_is_prepared(dataset_of: Make) -> None:
    case = case_of("residual")
    graph, data = prepare(case.model(), "net"), dataset_of(**case.feeds(24))
    steps = StaticInt8(), StaticInt8(keep_float=frozenset({"stem", "b", "out"}))
    first, other = (prepare_static(graph, data, step, RULES) for step in steps)
    assert first.graph.to_model().SerializeToString() == other.graph.to_model().SerializeToString()
    assert first.tensors == other.tensors == first.statistics.keys() == other.statistics.keys()
    assert first.changed == other.changed


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("equalise", [False, True])
def test_the_prepared_graph_computes_the_same_function(case: Case, equalise: bool, dataset_of: Make) -> None:
    graph = prepare(case.model(), case.name)
    step = StaticInt8(ranges=("minmax",), equalise=equalise)
    found = prepare_static(graph, dataset_of(**case.feeds(16)), step, RULES)
    feeds = case.feeds(4, seed=3)
    for ours, theirs in zip(run(found.graph, feeds), run(graph, feeds), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(np.abs(theirs).max()))
    assert found.statistics.keys() == found.tensors
    assert [group.name for group in found.every] == [group.name for group in find_groups(graph, RULES)]
    assert equalise or not found.changed


# Remedies -------------------------------------------------------------------------------------------------------------


def uneven(reader: float) -> tuple[Case, Graph]:
    """Two convolutions with linear channels between them, all but one of which are 50 times smaller.

    The weights that read the small channels are larger or smaller by ``50 ** reader``.
    """

    def build(b: Builder) -> onnx.ModelProto:
        b.conv(b.conv(b.input("image", 3, 8, 8), "a", (3, 16), 3, 3), "out", (16, 8), 3, 3)
        return b.model(out=(8, 8, 8))

    case = Case("uneven", build)
    graph = prepare(case.model(), "net")
    factor = np.full(16, 0.02, np.float32)
    factor[5] = 1.0
    graph.constants["a.w"] = graph.constants["a.w"] * factor[:, None, None, None]
    graph.constants["a.b"] = graph.constants["a.b"] * factor
    graph.constants["out.w"] = graph.constants["out.w"] * factor[:, None, None] ** -reader
    return case, graph


def outliers(gain: float) -> tuple[Case, Graph]:
    """A matrix product that reads two channels far larger than the rest, with weights as much smaller."""

    def build(b: Builder) -> onnx.ModelProto:
        factor = np.ones(24, np.float32)
        factor[[3, 17]] = gain
        x = b.node("Mul", b.input("x", 5, 24), b.constant("gain", factor), out="scaled")
        b.matmul(x, "out", 24, 32)
        b.constants["out.w"] = b.constants["out.w"] / factor[:, None]
        return b.model(out=(5, 32))

    case = Case("outliers", build)
    return case, prepare(case.model(), "net")


def with_and_without(case: Case, graph: Graph, make: Make) -> tuple[list[float], list[StaticResult]]:
    """Noise on samples that were not calibrated on, and the result, with no evening out of channels and with it."""
    data, feeds = make(**case.feeds(48, seed=1)), case.feeds(32, seed=2)
    results = [
        quantise_static(graph, data, PLAIN.model_copy(update={"equalise": equalise}), RULES)
        for equalise in (False, True)
    ]
    (exact,) = run(graph, feeds)
    return [noise_share(exact, run(result.graph, feeds)[0]) for result in results], results


def test_channels_are_evened_out_where_small_ones_matter(dataset_of: Make) -> None:
    noise, (plain, equalised) = with_and_without(*uneven(1.0), dataset_of)
    assert noise[1] < 0.1 * noise[0]
    assert [operator.remedies for operator in equalised.operators] == [("equalised",)] * 2
    assert [operator.remedies for operator in plain.operators] == [()] * 2


def test_channels_stay_as_they_are_where_evening_them_out_would_only_move_the_noise(dataset_of: Make) -> None:
    """Hardly anything reads the small channels: larger, they would bring the rounding of the weights to the output."""
    _, (plain, equalised) = with_and_without(*uneven(-1.0), dataset_of)
    assert [operator.remedies for operator in equalised.operators] == [()] * 2
    assert equalised.graph.to_model().SerializeToString() == plain.graph.to_model().SerializeToString()


def test_outlier_channels_of_a_product_are_smoothed_where_it_lowers_the_noise(dataset_of: Make) -> None:
    noise, (plain, smoothed) = with_and_without(*outliers(60.0), dataset_of)
    assert noise[1] < 0.1 * noise[0]
    assert [operator.remedies for operator in smoothed.operators] == [("smoothed",)]
    assert [operator.remedies for operator in plain.operators] == [()]


def test_a_product_without_outliers_is_not_smoothed(dataset_of: Make) -> None:
    _, (plain, smoothed) = with_and_without(*outliers(2.0), dataset_of)
    assert smoothed.graph.to_model().SerializeToString() == plain.graph.to_model().SerializeToString()


# Dynamic --------------------------------------------------------------------------------------------------------------


def test_dynamic_products_are_integer_but_for_those_kept(dataset_of: Make) -> None:
    case = case_of("attention")
    graph = prepare(case.model(), "net")
    step = DynamicInt8(keep_float=frozenset({"value.product"}))
    built = apply_recipe(Recipe(name="x", steps=(step,)), graph, dataset_of(**case.feeds(16)), RULES)
    formats = {operator.group: operator.format for operator in built.operators if operator.op_type == "MatMul"}
    assert formats["value.product"] == "fp32"
    assert formats["query.product"] == formats["projected.product"] == "int8"
    kinds = [node.op_type for node in built.graph.nodes]
    assert kinds.count("MatMulInteger") == 3
    assert kinds.count("DynamicQuantizeLinear") == 2  # once for the tensor that two products read


def test_dynamic_ranges_follow_the_input(dataset_of: Make) -> None:
    """Inputs far larger or smaller than those calibrated on keep their accuracy, which static ranges could not."""
    case = case_of("matmul_without_bias")
    graph = prepare(case.model(), "net")
    recipe = Recipe(name="x", steps=(DynamicInt8(),))
    built = apply_recipe(recipe, graph, dataset_of(**case.feeds(16)), RULES)
    for factor in (1e-3, 1.0, 1e3):
        feeds = {"x": case.feeds(1)["x"] * np.float32(factor)}
        assert sqnr_db(run(graph, feeds)[0], run(built.graph, feeds)[0]) > 20


def test_steps_of_a_recipe_are_applied_in_order(dataset_of: Make) -> None:
    case = case_of("residual")
    step = StaticInt8(keep_float=frozenset({"a"}))
    recipe = Recipe(name="x", steps=(step, Float16Weights()))
    built = apply_recipe(recipe, prepare(case.model(), "net"), dataset_of(**case.feeds(16)), RULES)
    dtypes = {array.dtype for array in built.graph.constants.values() if array.ndim == 4}
    assert dtypes == {np.dtype(np.int8), np.dtype(np.float16)}


def test_a_plan_tells_the_next_call_what_the_memory_of_the_first_one_knew(dataset_of: Make) -> None:
    """A resumed run has the plan only; it must go on as if it had never stopped."""
    case = case_of("residual")
    graph, data, memory = prepare(case.model(), "net"), dataset_of(**case.feeds(48, seed=1)), Memory()
    step = StaticInt8(equalise=False)
    first = quantise_static(graph, data, step, RULES, memory=memory)
    plan = Plan(recipe=Recipe(name="int8", steps=(step,)), target=Target()).model_copy(
        update={"operators": tuple(first.operators), "ranges": tuple(first.ranges)}
    )
    recalled = Memory()
    recalled.recall(plan, signed=False)
    assert recalled.quantizers == memory.quantizers
    mixed = step.model_copy(update={"keep_float": frozenset({first.operators[0].group})})
    models = [quantise_static(graph, data, mixed, RULES, memory=m).graph.to_model() for m in (memory, recalled)]
    assert models[0].SerializeToString() == models[1].SerializeToString()


def test_an_input_that_is_handed_through_to_the_outputs_stays_what_it_was(dataset_of: Make) -> None:
    b = Builder(4)
    x = b.node("Sigmoid", b.input("image", 3, 8, 8), out="squashed")
    b.conv(x, "out", (3, 4), 3, 3)
    graph = prepare(b.model(out=(4, 8, 8), squashed=(3, 8, 8)), "net")
    data = dataset_of(image=np.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype(np.float32))
    feeds = data.load(np.arange(16))
    quantised = quantise_static(graph, data, StaticInt8(), RULES).graph
    exact, found = (session_of(g).run(["out", "squashed"], feeds) for g in (graph, quantised))
    np.testing.assert_allclose(np.asarray(found[1]), np.asarray(exact[1]), rtol=1e-6)
    assert 0 < noise_share(np.asarray(exact[0]), np.asarray(found[0])) < 0.01
