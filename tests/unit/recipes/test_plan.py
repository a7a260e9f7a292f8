from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from narrowcast.recipes.plan import OperatorPlan, Plan, TensorRange
from narrowcast.recipes.recipe import DynamicInt8, Float16Weights, Optimise, Recipe, StaticInt8, WeightOnlyInt8
from narrowcast.recipes.target import FusionRules, Target

STEPS = [StaticInt8(keep_float=frozenset({"a", "b"})), DynamicInt8(smooth=False), WeightOnlyInt8(), Float16Weights()]


@pytest.mark.parametrize("step", [*STEPS, Optimise()], ids=lambda step: step.type)
def test_a_recipe_survives_json_with_the_types_of_its_steps(step: object) -> None:
    recipe = Recipe(name="mine", steps=(step, Optimise()))
    again = Recipe.model_validate_json(recipe.model_dump_json())
    assert again == recipe
    assert type(again.steps[0]) is type(step)


def test_a_recipe_is_frozen_and_hashable() -> None:
    recipe = Recipe(name="mine", steps=(StaticInt8(),))
    with pytest.raises(ValidationError):
        recipe.name = "other"
    assert hash(recipe) == hash(Recipe(name="mine", steps=(StaticInt8(),)))


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "x", "steps": [{"type": "int3"}]}',
        '{"name": "x", "steps": [{"type": "static_int8", "version": 2}]}',
        '{"name": "x", "steps": [{"type": "static_int8", "ranges": ["median"]}]}',
        '{"name": "x", "steps": [{"type": "static_int8", "bits": 4}]}',
        '{"name": "x"}',
    ],
)
def test_a_step_that_is_unknown_in_type_version_or_setting_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        Recipe.model_validate_json(text)


@pytest.mark.parametrize("setting", [{"threads": 0}, {"batch": 0}, {"threads": -1}, {"device": "gpu"}])
def test_a_target_needs_at_least_one_thread_and_one_sample(setting: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Target(**setting)


def test_fusion_rules_can_be_compared_and_hashed() -> None:
    assert hash(FusionRules()) == hash(FusionRules())
    assert FusionRules() != FusionRules(signed_activations=True)


def test_shares_of_formats_add_up_with_the_largest_first() -> None:
    operators = [OperatorPlan(group=str(i), op_type="Conv", format=f) for i, f in enumerate(["fp32", *["int8"] * 3])]
    plan = Plan(recipe=Recipe(name="x", steps=()), target=Target(), operators=tuple(operators))
    assert plan.shares() == {"int8": 0.75, "fp32": 0.25}
    assert list(plan.shares()) == ["int8", "fp32"]


def test_a_plan_of_nothing_has_no_shares() -> None:
    assert Plan(recipe=Recipe(name="x", steps=()), target=Target()).shares() == {}


def test_a_plan_survives_json_with_infinite_numbers() -> None:
    span = TensorRange(tensor="t", low=-1, high=2, scale=0.01, zero_point=85, method="mse", sqnr_db=math.inf)
    operator = OperatorPlan(group="a", op_type="Conv", fused=("Relu",), format="int8", remedies=("equalised",))
    plan = Plan(recipe=Recipe(name="x", steps=(StaticInt8(),)), target=Target(), operators=(operator,), ranges=(span,))
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
