"""A recipe resolved for one model and one target: what happens to each operator."""

from __future__ import annotations

from collections import Counter

from pydantic import BaseModel, ConfigDict

from narrowcast.recipes.recipe import Recipe
from narrowcast.recipes.target import Target

__all__ = ["OperatorPlan", "Plan", "TensorRange"]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class TensorRange(_Value):
    """The range that a quantised activation tensor got.

    Attributes:
        tensor: Name of the tensor.
        low: Real value of the smallest code.
        high: Real value of the largest code.
        scale: Real value of one step.
        zero_point: Code of zero.
        method: How the range was found.
        sqnr_db: Signal to quantisation noise ratio of this tensor on calibration samples, in dB.
    """

    tensor: str
    low: float
    high: float
    scale: float
    zero_point: int
    method: str
    sqnr_db: float


class OperatorPlan(_Value):
    """What happens to one operator group.

    Attributes:
        group: Name of the group: its main operator's node name.
        op_type: Type of the main operator.
        fused: Types of the operators that run fused with it.
        format: Format it computes in, or stores its weights in: ``fp32``, ``fp16``, ``int8``.
        executed: Whether the format is computed in (else weights are only stored in it).
        remedies: What was done for its accuracy, for example ``equalised`` or ``bias corrected``.
        sqnr_db: SQNR of its output on calibration samples in simulation, in dB, where it is known.
    """

    group: str
    op_type: str
    fused: tuple[str, ...] = ()
    format: str = "fp32"
    executed: bool = True
    remedies: tuple[str, ...] = ()
    sqnr_db: float | None = None


class Plan(_Value):
    """A recipe, the target, and what they make of each operator and tensor."""

    recipe: Recipe
    target: Target
    operators: tuple[OperatorPlan, ...] = ()
    ranges: tuple[TensorRange, ...] = ()

    def shares(self) -> dict[str, float]:
        """Return the share of operator groups per format, the largest first."""
        counts = Counter(operator.format for operator in self.operators)
        return {name: count / len(self.operators) for name, count in counts.most_common()}
