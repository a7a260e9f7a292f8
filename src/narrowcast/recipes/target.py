"""Where the artifact will run, and what that runtime does with a quantised graph."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["FusionRules", "Target"]


class Target(BaseModel):
    """The runtime and how it is used.

    Attributes:
        runtime: Name of a registered runtime adapter.
        threads: Threads that one session computes with.
        batch: Batch size at which latency is judged.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime: str = "onnxruntime"
    threads: int = Field(default=1, ge=1)
    batch: int = Field(default=1, ge=1)


class FusionRules(BaseModel):
    """Which operators a runtime computes in integers, and what it fuses with them.

    Groups of operators follow these rules, so that a group is what the runtime really executes as one kernel.

    Attributes:
        linear: Operators with a constant weight that have an integer kernel.
        elementwise: Operators on two quantised tensors that have an integer kernel.
        pooling: Operators on one quantised tensor that have an integer kernel and a range of their own.
        transparent: Operators that move values without changing them: integers pass through, sharing one scale.
        activations: Activations that saturation at the ends of the range can stand for.
        integer_output: Linear operators whose integer kernel can only write integers (others can write FP32).
        signed_activations: Whether activations are INT8 instead of UINT8.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    linear: frozenset[str] = frozenset({"Conv", "Gemm", "MatMul"})
    elementwise: frozenset[str] = frozenset({"Add", "Concat"})
    pooling: frozenset[str] = frozenset({"GlobalAveragePool", "AveragePool"})
    transparent: frozenset[str] = frozenset({"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"})
    activations: frozenset[str] = frozenset({"Relu", "Clip", "Min", "Max"})
    integer_output: frozenset[str] = frozenset({"Conv"})
    signed_activations: bool = False
