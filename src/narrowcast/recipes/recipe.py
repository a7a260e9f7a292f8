"""Intent: an ordered list of frozen, versioned steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "DynamicInt8",
    "Float16Weights",
    "Optimise",
    "RangeMethod",
    "Recipe",
    "StaticInt8",
    "Step",
    "WeightOnlyInt8",
]

RangeMethod = Literal["minmax", "percentile", "entropy", "mse"]


class _Step(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[1] = 1


class Optimise(_Step):
    """Fold constants and normalisation layers; all values stay FP32."""

    type: Literal["optimise"] = "optimise"


class Float16Weights(_Step):
    """Store weights in FP16; runtimes without FP16 arithmetic widen them once, when they load the model."""

    type: Literal["float16_weights"] = "float16_weights"


class WeightOnlyInt8(_Step):
    """Store weights in INT8 with a scale per output channel; the runtime widens them when it loads the model."""

    type: Literal["weight_only_int8"] = "weight_only_int8"


class DynamicInt8(_Step):
    """INT8 products whose activation ranges are found anew for every input.

    Attributes:
        keep_float: Names of the operator groups that stay FP32.
        smooth: Whether outlier channels of activations are moved into the weights first.
    """

    type: Literal["dynamic_int8"] = "dynamic_int8"
    keep_float: frozenset[str] = frozenset()
    smooth: bool = True


class StaticInt8(_Step):
    """INT8 throughout, as QuantizeLinear and DequantizeLinear nodes with ranges from calibration.

    Attributes:
        ranges: Ways to find a tensor's range; with several, the one with the least measured error is taken per tensor.
        equalise: Whether channel ranges are evened out across layers.
        reconstruct: Whether weights are rounded so that each operator's output error is least, rather than to nearest.
        bias_correction: Whether the mean error of each output channel is taken out through the bias.
        keep_float: Names of the operator groups that stay FP32.
    """

    type: Literal["static_int8"] = "static_int8"
    ranges: tuple[RangeMethod, ...] = ("minmax", "percentile", "entropy", "mse")
    equalise: bool = True
    reconstruct: bool = True
    bias_correction: bool = True
    keep_float: frozenset[str] = frozenset()


Step = Annotated[Optimise | Float16Weights | WeightOnlyInt8 | DynamicInt8 | StaticInt8, Field(discriminator="type")]


class Recipe(BaseModel):
    """A named list of steps.

    Attributes:
        name: What reports call a candidate made by this recipe.
        steps: The steps, in order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    steps: tuple[Step, ...]
