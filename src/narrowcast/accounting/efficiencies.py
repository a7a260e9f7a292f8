"""How much of a device's peaks runtimes reach, by classes of operators: the numbers that turn a roofline into a time.

They are shares of the peaks in the catalogue, so that numbers fitted on one device serve others of its kind. Those of
``efficiencies.toml`` come with the package; a measured device (``auto``) carries its own.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from enum import StrEnum
from functools import cache
from importlib import resources
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from narrowcast.accounting.kinds import Kind
from narrowcast.accounting.operators import Operator
from narrowcast.errors import RuntimeMissingError, choices

__all__ = ["OperatorClass", "Rates", "RuntimeModel", "Shape", "class_of", "runtime_model", "shape_of"]

_Share = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class OperatorClass(StrEnum):
    """Sorts of operators whose kernels reach different shares of the peaks; finer than :class:`Kind` where it matters."""

    CONVOLUTION = "convolution"
    POINTWISE = "pointwise convolution"
    GROUPED = "grouped convolution"
    DEPTHWISE = "depthwise convolution"
    PRODUCT = "matrix product"
    BATCHED = "batched matrix product"
    ATTENTION = "attention"
    RECURRENT = "recurrent layer"
    NORMALISATION = "normalisation"
    SOFTMAX = "softmax"
    ELEMENTWISE = "elementwise"
    TRANSCENDENTAL = "transcendental"
    REDUCTION = "reduction"
    POOLING = "pooling"
    MOVE = "data movement"


#: Elementwise operators that take a series or a table for each element.
_TRANSCENDENTAL = frozenset(
    """
    gelu erf tanh sigmoid silu mish softplus exp exp2 expm1 log log2 log1p log10 sin cos tan pow logit elu selu
    swish fastgelu hardtanh_
    """.split()  # noqa: SIM905
)
_SAME = {
    Kind.DEPTHWISE: OperatorClass.DEPTHWISE,
    Kind.ATTENTION: OperatorClass.ATTENTION,
    Kind.RECURRENT: OperatorClass.RECURRENT,
    Kind.NORMALISATION: OperatorClass.NORMALISATION,
    Kind.SOFTMAX: OperatorClass.SOFTMAX,
    Kind.REDUCTION: OperatorClass.REDUCTION,
    Kind.POOLING: OperatorClass.POOLING,
    Kind.MOVE: OperatorClass.MOVE,
}


class Shape(BaseModel):
    """A product's sizes, ``[batch, rows, depth] x [batch, depth, columns]``; a convolution's as the product that it is.

    Args:
        batch: Independent products; the groups of a convolution.
        rows: Output positions, or rows of the left matrix.
        columns: Output channels of a group, or columns of the right matrix.
        depth: Terms of each sum.
    """

    model_config = ConfigDict(frozen=True)

    batch: float
    rows: float
    columns: float
    depth: float


class Rates(BaseModel):
    """What a class of operators reaches.

    A product of ``rows x depth`` with ``depth x columns`` takes ``flops / (peak * compute) * (1 + rows_half / rows +
    columns_half / columns + depth_half / depth)``: at ``rows_half`` rows half of the speed is left.

    Args:
        compute: Share of the peak that large products reach.
        rows_half: See above.
        columns_half: See above.
        depth_half: See above.
        bandwidth: Share of the memory's bandwidth, for tensors that no cache holds.
        cached: The same for tensors in a cache; may be more than 1.
        weights: Share of the memory's bandwidth at which weights are read that no cache holds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    compute: Annotated[float, Field(gt=0, le=1)] = 1.0
    rows_half: _NotNegative = 0.0
    columns_half: _NotNegative = 0.0
    depth_half: _NotNegative = 0.0
    bandwidth: _Share = 1.0
    cached: _Share = 1.0
    weights: _Share = 1.0

    def slowdown(self, shape: Shape) -> float:
        """Return how many times longer a product takes than at the full peak."""
        small = self.rows_half / shape.rows + self.columns_half / shape.columns + self.depth_half / shape.depth
        return (1.0 + small) / self.compute


class RuntimeModel(BaseModel):
    """How one runtime spends time on one kind of device.

    Args:
        runtime: Its name.
        asynchronous: Whether the host queues kernels while the device runs: then the slower of the two decides.
        operator_us: Microseconds that each operator costs the host (asynchronous) or the run (otherwise).
        view_us: The same for views.
        kernel_us: Microseconds that each kernel takes on the device however small it is.
        low: The error band: measured times lie between ``low`` and ``high`` times the estimate.
        high: See above.
        classes: Shares of the peaks by class of operators; every class.
        source: Where the numbers come from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime: Annotated[str, Field(min_length=1)]
    asynchronous: bool = False
    operator_us: _NotNegative
    view_us: _NotNegative = 0.0
    kernel_us: _NotNegative = 0.0
    low: Annotated[float, Field(gt=0, le=1)]
    high: Annotated[float, Field(ge=1)]
    classes: Mapping[OperatorClass, Rates]
    source: Annotated[str, Field(min_length=1)]

    def rates(self, kind: OperatorClass) -> Rates:
        """Return what a class reaches; all of the peaks where nobody measured it."""
        return self.classes.get(kind, Rates())


#: Runtime that an estimate is for, by the device's kind, if none is asked for.
DEFAULT_RUNTIMES = {"cpu": "onnxruntime", "soc": "onnxruntime", "gpu": "torch", "npu": "torch"}


@cache
def _packaged() -> dict[str, RuntimeModel]:
    text = resources.files("narrowcast.accounting").joinpath("efficiencies.toml").read_text(encoding="utf-8")
    return {name: RuntimeModel.model_validate(table) for name, table in tomllib.loads(text).items()}


def runtime_model(kind: str, runtime: str | None = None) -> RuntimeModel:
    """Return what the package knows of a runtime on devices of a kind.

    Args:
        kind: ``gpu``, ``cpu``, ``soc`` or ``npu``.
        runtime: ``onnxruntime`` or ``torch``; the usual one of the kind unless given.

    Raises:
        RuntimeMissingError: Nothing was fitted for that runtime on that kind.
    """
    place = "gpu" if kind in ("gpu", "npu") else "cpu"
    known = {key.partition("-")[2]: model for key, model in _packaged().items() if key.startswith(f"{place}-")}
    name = runtime or DEFAULT_RUNTIMES[kind]
    if name not in known:
        raise RuntimeMissingError(f"no efficiencies of {name!r} on a {kind}", allowed=choices(name, known))
    return known[name]


# Operators ------------------------------------------------------------------------------------------------------------


def class_of(operator: Operator) -> OperatorClass:
    """Return the class of an operator that is no view."""
    if operator.kind in _SAME:
        return _SAME[operator.kind]
    if operator.kind is Kind.CONVOLUTION:
        if operator.attributes.get("groups", 1) > 1:
            return OperatorClass.GROUPED
        kernel = operator.attributes.get("kernel", (3,))
        return OperatorClass.POINTWISE if math.prod(kernel) == 1 else OperatorClass.CONVOLUTION
    if operator.kind is Kind.PRODUCT:
        return OperatorClass.PRODUCT if operator.weight_bytes else OperatorClass.BATCHED
    return OperatorClass.TRANSCENDENTAL if _plain(operator.name) in _TRANSCENDENTAL else OperatorClass.ELEMENTWISE


def _plain(name: str) -> str:
    return name.casefold().removesuffix("_").removesuffix("_backward")


def shape_of(operator: Operator) -> Shape | None:
    """Return the sizes of an operator that multiplies matrices; None for others."""
    macs = operator.work.macs if operator.work else 0
    if not macs or not operator.outputs:
        return None
    outputs = float(max(math.prod(operator.outputs[0]), 1))
    if operator.kind in (Kind.CONVOLUTION, Kind.DEPTHWISE):
        groups = operator.attributes.get("groups", 1)
        channels = operator.attributes.get("outputs") or operator.outputs[0][1]
        return Shape(batch=groups, rows=outputs / channels, columns=channels / groups, depth=macs / outputs)
    columns = float(operator.outputs[0][-1]) if operator.outputs[0] else 1.0
    depth = macs / outputs
    if operator.kind is Kind.ATTENTION:
        query, key = operator.inputs[0], operator.inputs[1]
        return Shape(batch=math.prod(query[:-2]), rows=query[-2], columns=key[-2], depth=query[-1])
    if operator.kind is Kind.PRODUCT and len(operator.outputs[0]) > 2 and not operator.weight_bytes:
        batch = math.prod(operator.outputs[0][:-2])
        return Shape(batch=batch, rows=operator.outputs[0][-2], columns=columns, depth=depth)
    return Shape(batch=1, rows=outputs / columns, columns=columns, depth=depth)
