"""Classes of operators whose kernels reach different shares of a device's peaks, and the sizes that decide how much."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import NamedTuple

from narrowcast.accounting.kinds import Kind
from narrowcast.accounting.operators import Operator

__all__ = ["OperatorClass", "Shape", "class_of", "convolution_class", "shape_of"]


class OperatorClass(StrEnum):
    """Sorts of operators whose kernels reach different shares of the peaks; finer than :class:`Kind` where it matters."""

    IMAGE = "convolution of an image"  # of at most four channels
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


class Shape(NamedTuple):
    """A product's sizes, ``[batch, rows, depth] x [batch, depth, columns]``; a convolution's as the product that it is.

    Args:
        batch: Independent products; the groups of a convolution.
        rows: Output positions, or rows of the left matrix.
        columns: Output channels of a group, or columns of the right matrix.
        depth: Terms of each sum.
    """

    batch: float
    rows: float
    columns: float
    depth: float


#: Elementwise operators that take a series or a table for each element.
_TRANSCENDENTAL = frozenset(
    """
    gelu erf tanh sigmoid silu mish softplus exp exp2 expm1 log log2 log1p log10 sin cos tan pow logit elu selu
    swish fastgelu
    """.split()  # noqa: SIM905
)
#: Channels of an image, at most.
_IMAGE = 4
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


def convolution_class(inputs: int, groups: int, kernel: int) -> OperatorClass:
    """Return the class of a convolution.

    Args:
        inputs: Input channels.
        groups: Groups.
        kernel: Positions of the kernel, 9 if it is 3 x 3.
    """
    if groups > 1:
        return OperatorClass.DEPTHWISE if groups == inputs else OperatorClass.GROUPED
    if inputs <= _IMAGE:
        return OperatorClass.IMAGE
    return OperatorClass.POINTWISE if kernel == 1 else OperatorClass.CONVOLUTION


def class_of(operator: Operator) -> OperatorClass:
    """Return the class of an operator that is no view."""
    if operator.kind in _SAME:
        return _SAME[operator.kind]
    if operator.kind is Kind.CONVOLUTION:
        given = operator.attributes
        groups, kernel = int(given.get("groups", 1)), math.prod(given.get("kernel", (3,)))
        return convolution_class(int(given.get("inputs", 0)) or operator.inputs[0][1], groups, kernel)
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
        batch, rows, columns = math.prod(query[:-2]), query[-2], key[-2]
        return Shape(batch=batch, rows=rows, columns=columns, depth=macs / (batch * rows * columns))
    if operator.kind is Kind.PRODUCT and len(operator.outputs[0]) > 2 and not operator.weight_bytes:
        batch = math.prod(operator.outputs[0][:-2])
        return Shape(batch=batch, rows=operator.outputs[0][-2], columns=columns, depth=depth)
    return Shape(batch=1, rows=outputs / columns, columns=columns, depth=depth)
