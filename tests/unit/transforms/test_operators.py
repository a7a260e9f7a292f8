from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from contracts.graphs import CASES, Case
from narrowcast.models.execution import StagedExecutor
from narrowcast.models.prepare import prepare
from narrowcast.recipes.target import FusionRules
from narrowcast.transforms.groups import Group, boundaries, find_groups
from narrowcast.transforms.operators import Operators, channel_axis, mean_error

RULES = FusionRules()
Array = NDArray[Any]
all_cases = pytest.mark.parametrize("case", CASES, ids=str)


def groups_with_values(case: Case) -> Iterator[tuple[Operators, Group, dict[str, Array], Array]]:
    """Each group of a case with its inputs and what the executor's stage makes of them."""
    graph = prepare(case.model(), case.name)
    groups = find_groups(graph, RULES)
    executor = StagedExecutor(graph, boundaries(groups))
    operators, by_name = Operators(graph), {group.name: group for group in groups}
    tensors = dict(case.feeds(3))
    for index, stage in enumerate(executor.stages):
        tensors |= executor.run_stage(index, tensors)
        if stage.name in by_name:
            group = by_name[stage.name]
            yield operators, group, {name: tensors[name] for name in group.inputs}, tensors[group.output]


def linear_group(name: str, group: str) -> tuple[Operators, Group, dict[str, Array]]:
    found = groups_with_values(next(case for case in CASES if case.name == name))
    return next((operators, item, feeds) for operators, item, feeds, _ in found if item.name == group)


@all_cases
def test_a_group_run_on_its_own_makes_what_the_executor_makes(case: Case) -> None:
    count = 0
    for operators, group, feeds, output in groups_with_values(case):
        np.testing.assert_array_equal(operators.run(group, feeds), output)
        count += 1
    assert count


@all_cases
def test_a_linear_group_is_what_comes_before_its_activations_and_then_these(case: Case) -> None:
    for operators, group, feeds, output in groups_with_values(case):
        if group.kind == "linear":
            raw = operators.before_activation(group, feeds)
            np.testing.assert_array_equal(operators.activate(group, raw), output)
            assert bool(group.activations) == bool((raw != output).any())


def test_another_weight_takes_the_place_of_the_graphs_for_one_run_only() -> None:
    for name, group in (("conv_relu6", "first"), ("matmul_bias", "first.product"), ("gemm", "first")):
        operators, found, feeds = linear_group(name, group)
        assert found.weight is not None
        assert found.bias is not None
        weight, bias = operators.graph.constants[found.weight], operators.graph.constants[found.bias]
        before = operators.before_activation(found, feeds)
        bias = bias.reshape(-1, 1, 1) if found.op_type == "Conv" else bias
        doubled = operators.before_activation(found, feeds, 2 * weight)
        np.testing.assert_allclose(doubled - bias, 2 * (before - bias), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(operators.before_activation(found, feeds), before)
        assert operators.graph.constants[found.weight] is weight


@pytest.mark.parametrize(
    ("name", "group"), [("conv_relu6", "out"), ("conv_1d", "out"), ("matmul_bias", "out.product"), ("gemm", "out")]
)
def test_the_mean_error_is_taken_for_each_output_channel(name: str, group: str) -> None:
    operators, found, feeds = linear_group(name, group)
    values = operators.before_activation(found, feeds)
    channels = values.shape[channel_axis(found, values)]
    shift = np.linspace(-1, 1, channels, dtype=np.float32)
    shape = [1] * values.ndim
    shape[channel_axis(found, values)] = channels
    np.testing.assert_allclose(mean_error(found, values + shift.reshape(shape), values), shift, atol=1e-6)
    assert not mean_error(found, values, values).any()
