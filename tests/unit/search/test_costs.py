from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from contracts.graphs import CASES, Case
from narrowcast.data.dataset import Dataset
from narrowcast.models.prepare import prepare
from narrowcast.recipes.recipe import Recipe, StaticInt8
from narrowcast.runtimes import OperatorTime, Runtime
from narrowcast.search.costs import CONVERSION_FACTOR, Costs, times_by_group
from narrowcast.transforms.apply import apply_recipe
from narrowcast.transforms.groups import Group, find_groups

STEP = StaticInt8(ranges=("minmax",), equalise=False, reconstruct=False)


def group(name: str, *followers: str) -> Group:
    """A group whose nodes make tensors of the same names."""
    return Group(name, "Conv", "linear", (name, *followers), ("x",), (name, *followers)[-1])


def times(**seconds: float) -> list[OperatorTime]:
    return [OperatorTime(name, "Conv", value) for name, value in seconds.items()]


KINDS = {"QuantizeLinear"}
GROUPS = [group("conv1", "relu1"), group("conv_1"), group("conv_10"), group("/block.0/conv/Conv", "/block.0/Relu")]


@pytest.mark.parametrize(
    ("kernel", "owner"),
    [
        ("conv1", "conv1"),
        ("conv1_token_7", "conv1"),
        ("relu1_nchwc", "conv1"),
        ("conv1/WithoutBiases", "conv1"),
        ("conv1/WithoutBiases_acdb_abcd_out/sink_port_0", "conv1"),
        ("conv_1", "conv_1"),
        ("conv_1_token_3", "conv_1"),
        ("conv_10", "conv_10"),
        ("conv_10_token_1", "conv_10"),
        ("conv_10/WithoutBiases", "conv_10"),
        ("/block.0/conv/Conv", "/block.0/conv/Conv"),
        ("/block.0/conv/Conv_quant", "/block.0/conv/Conv"),
        ("/block.0/Relu_nchwc", "/block.0/conv/Conv"),
    ],
)
def test_a_kernel_belongs_to_the_group_that_its_name_starts_with(kernel: str, owner: str) -> None:
    assert times_by_group(GROUPS, [OperatorTime(kernel, "Conv", 2.0)]) == {owner: 2.0}


@pytest.mark.parametrize(
    "kernel", ["conv", "conv2", "conv100", "xconv1", "ReorderOutput", "Transpose_token_11", "/block.0", "_/", ""]
)
def test_kernels_that_belong_to_no_group_are_left_out(kernel: str) -> None:
    assert times_by_group(GROUPS, [OperatorTime(kernel, "Conv", 2.0)]) == {}


def test_a_tensor_that_a_kernel_is_named_after_may_have_another_name_than_its_node() -> None:
    named = Group("node", "Conv", "linear", ("node", "relu"), ("x",), "tensor")
    assert times_by_group([named], times(tensor_nchwc=2.0)) == {"node": 2.0}


def test_all_kernels_of_a_group_add_up() -> None:
    seen = times(conv1_token_7=1.0, relu1=0.5, conv_1=4.0, conv_10=8.0, Transpose=16.0)
    assert times_by_group(GROUPS, seen) == {"conv1": 1.5, "conv_1": 4.0, "conv_10": 8.0}


def test_a_kernel_of_another_operator_is_not_taken_for_that_of_a_group_with_a_shorter_name() -> None:
    seen = times(conv1=1.0, conv1_2=5.0, conv1_2_token_3=5.0, conv1_token_3=0.5)
    assert times_by_group(GROUPS, seen, others={"conv1", "conv1_2"}) == {"conv1": 1.5}


def test_conversions_beside_a_group_are_no_time_of_the_group() -> None:
    seen = [
        OperatorTime("conv1::dequantize", "DequantizeLinear", 3.0),
        OperatorTime("conv1_3::quantize", "QuantizeLinear", 3.0),
        OperatorTime("fused conv1", "Conv", 1.0),
    ]
    assert times_by_group(GROUPS, seen) == {"conv1": 1.0}


def test_the_price_of_a_conversion_is_spread_over_all_values_that_are_converted() -> None:
    quantised = [
        OperatorTime("conv1", "QLinearConv", 1.0),
        OperatorTime("image::quantize", "QuantizeLinear", 0.25),
        OperatorTime("mixed::dequantize", "DequantizeLinear", 0.75),
    ]
    costs = Costs.of(GROUPS, times(conv1=3.0, conv_1=2.0), quantised, conversions=KINDS, converted=100)
    assert costs.fp32 == {"conv1": 3.0, "conv_1": 2.0}
    assert costs.int8 == {"conv1": 1.0}
    assert costs.conversion == pytest.approx(CONVERSION_FACTOR * 0.25 / 100)


def test_conversions_cost_nothing_where_none_was_seen() -> None:
    nothing = Costs.of(GROUPS, times(conv1=3.0), times(conv1=1.0), conversions=KINDS, converted=100)
    assert nothing.conversion == 0.0
    converts = [OperatorTime("image::quantize", "QuantizeLinear", 0.25)]
    assert Costs.of(GROUPS, times(conv1=3.0), converts, conversions=KINDS, converted=0).conversion == 0.0
    assert (Costs().fp32, Costs().int8, Costs().conversion) == ({}, {}, 0.0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_linear_group_is_found_in_the_profile_of_the_original(
    case: Case, runtime: Runtime, tmp_path: Path
) -> None:
    graph = prepare(case.model(), case.name)
    graph.save(tmp_path / "fp32.onnx")
    groups = find_groups(graph, runtime.rules)
    seen = runtime.profile(tmp_path / "fp32.onnx", case.feeds(1), runs=2)
    found = times_by_group(groups, seen)
    assert {group.name for group in groups if group.kind == "linear"} <= found.keys()
    assert found.keys() <= {group.name for group in groups}
    assert all(seconds > 0 for seconds in found.values())
    assert sum(found.values()) <= sum(item.seconds for item in seen) * (1 + 1e-9)


@pytest.mark.parametrize("name", ["residual", "depthwise", "global_pool", "attention", "gemm"])
def test_every_linear_group_is_found_in_the_profile_of_the_quantised_graph(
    name: str, runtime: Runtime, tmp_path: Path, dataset_of: Callable[..., Dataset]
) -> None:
    case = next(case for case in CASES if case.name == name)
    graph = prepare(case.model(), case.name)
    groups = find_groups(graph, runtime.rules)
    built = apply_recipe(Recipe(name="int8", steps=(STEP,)), graph, dataset_of(**case.feeds(8)), runtime.rules)
    built.graph.save(tmp_path / "int8.onnx")
    seen = runtime.profile(tmp_path / "int8.onnx", case.feeds(1), runs=2)
    assert {item.op_type for item in seen} & runtime.conversions
    found = times_by_group(groups, seen)
    assert {group.name for group in groups if group.kind == "linear"} <= found.keys()
