"""Norms, factors and the census of gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from narrowcast.training.gradients import Broken, Gradients

CPU = torch.device("cpu")


def held(**values: torch.Tensor) -> dict[str, nn.Parameter]:
    """Return parameters by name that hold gradients."""
    made = {}
    for name, gradient in values.items():
        made[name] = nn.Parameter(torch.zeros(gradient.shape))
        made[name].grad = gradient.clone()
    return made


def test_the_norm_is_that_of_all_gradients_together():
    parameters = held(a=torch.randn(3, 4), b=torch.randn(7), c=torch.tensor(2.0))
    expected = torch.cat([one.grad.flatten() for one in parameters.values()]).norm()
    torch.testing.assert_close(Gradients(parameters, CPU).norm(), expected)


def test_parameters_without_gradients_count_for_nothing():
    parameters = held(a=torch.ones(4)) | {"b": nn.Parameter(torch.ones(9))}
    gradients = Gradients(parameters, CPU)
    assert len(gradients) == 1
    assert float(gradients.norm()) == 2.0
    empty = Gradients({"b": parameters["b"]}, CPU)
    assert float(empty.norm()) == 0.0
    assert empty.broken() == ()
    empty.multiply(2.0)


@pytest.mark.parametrize("factor", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_a_factor_is_applied_in_place_without_copies(factor):
    parameters = held(a=torch.ones(3), b=torch.full((2, 2), 4.0))
    addresses = [one.grad.data_ptr() for one in parameters.values()]
    Gradients(parameters, CPU).multiply(factor)
    assert [one.grad.data_ptr() for one in parameters.values()] == addresses
    assert torch.equal(parameters["b"].grad, torch.full((2, 2), 2.0))


def test_a_factor_of_one_touches_nothing():
    parameters = held(a=torch.ones(3))
    version = parameters["a"].grad._version
    Gradients(parameters, CPU).multiply(1.0)
    assert parameters["a"].grad._version == version


def test_the_census_counts_inf_and_nan_from_the_loss_backwards():
    nan, inf = float("nan"), float("inf")
    parameters = held(
        first=torch.tensor([nan, inf, -inf]),
        middle=torch.ones(2),
        inner=torch.tensor([nan]),
        last=torch.tensor([inf, 0.0]),
    )
    gradients = Gradients(parameters, CPU)
    gradients.norm()
    broken = gradients.broken()
    assert broken == (Broken("last", 1, 0), Broken("inner", 0, 1), Broken("first", 2, 1))
    assert [one.kind for one in broken] == ["inf", "nan", "nan"]


def test_the_census_needs_no_norm_before_it():
    gradients = Gradients(held(a=torch.tensor([float("nan")])), CPU)
    assert gradients.broken() == (Broken("a", 0, 1),)


def test_gradients_whose_squares_overflow_are_named_without_infinite_elements():
    gradients = Gradients(held(a=torch.full((4,), 1e30), b=torch.ones(2)), CPU)
    assert not gradients.norm().isfinite()
    assert gradients.broken() == (Broken("a", 0, 0),)


def test_sparse_gradients_are_summed_before_they_are_measured():
    parameter = nn.Parameter(torch.zeros(5, 2))
    parameter.grad = torch.sparse_coo_tensor([[1, 1]], [[3.0, 0.0], [1.0, 0.0]], (5, 2), check_invariants=True)
    gradients = Gradients({"a": parameter}, CPU)
    assert float(gradients.norm()) == 4.0
    gradients.multiply(0.25)
    assert float(parameter.grad.to_dense()[1, 0]) == 1.0


def test_the_norm_of_half_precision_gradients_is_fp32():
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    parameter.grad = torch.ones(4, dtype=torch.bfloat16)
    assert Gradients({"a": parameter}, CPU).norm().dtype == torch.float32
