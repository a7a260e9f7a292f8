"""What would be if: the operators of a run, with some made wider, merged, or left out.

All functions return new operators with the shapes, MACs and bytes that the change brings, in the run's own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from narrowcast.accounting.counting import Work
from narrowcast.accounting.kinds import Kind
from narrowcast.accounting.operators import Operator

__all__ = ["Changes", "batched", "convolution", "element_bytes", "is_batch_norm", "resized", "rewritten", "widths"]

#: What stands in the place of an operator: nothing where it is left out, several where it is split.
Changes = Mapping[int, tuple[Operator, ...]]


def rewritten(operators: Sequence[Operator], changes: Changes) -> list[Operator]:
    """Return the run with changes made; what read an operator that is left out reads what that one read first."""

    def follow(place: int) -> int:
        while place >= 0 and not changes.get(place, (operators[place],)):
            place = next((producer for producer in operators[place].producers if producer >= 0), -1)
        return place

    runs = [changes.get(place, (operator,)) for place, operator in enumerate(operators)]
    last: list[int] = []  # where each operator's result comes from now
    for run in runs:
        last.append((last[-1] if last else -1) + len(run))

    def moved(producer: int) -> int:
        found = follow(producer)
        return last[found] if found >= 0 else -1

    return [replace(part, producers=tuple(map(moved, part.producers))) for run in runs for part in run]


def is_batch_norm(operator: Operator) -> bool:
    """Return whether an operator is batch normalisation, which is linear in inference."""
    return "batch_norm" in operator.name or operator.name == "BatchNormalization"


def element_bytes(operator: Operator) -> float:
    """Return the bytes of one element of what an operator makes."""
    return operator.bytes_written / max(sum(math.prod(shape) for shape in operator.outputs), 1)


def widths(operator: Operator) -> tuple[int, int] | None:
    """Return the inputs and outputs of a layer in which each output sums over all inputs; None for other operators."""
    if operator.work is None or not operator.work.macs or not operator.weight_bytes:
        return None
    if operator.kind is Kind.CONVOLUTION:
        attributes = operator.attributes
        if attributes.get("groups", 1) != 1 or attributes.get("transposed") or "inputs" not in attributes:
            return None
        return attributes["inputs"], attributes["outputs"]
    if operator.kind is Kind.PRODUCT and operator.outputs and operator.outputs[0]:
        return operator.work.macs // math.prod(operator.outputs[0]), operator.outputs[0][-1]
    return None


def resized(operator: Operator, inputs: int, outputs: int, *, macs: int | None = None) -> Operator:
    """Return a layer with other widths.

    Args:
        operator: A layer that has :func:`widths`.
        inputs: Channels or features that it reads.
        outputs: Those that it makes.
        macs: MACs that it is to count as, where widths were rounded.
    """
    if operator.kind is Kind.CONVOLUTION:
        made = convolution(operator, inputs=inputs, outputs=outputs)
    else:
        made = _product(operator, inputs, outputs)
    return made if macs is None or made.work is None else replace(made, work=made.work._replace(macs=macs))


def _product(operator: Operator, inputs: int, outputs: int) -> Operator:
    old = widths(operator)
    assert old is not None
    assert operator.work is not None
    out = operator.outputs[0]
    rows, size = math.prod(out) // out[-1], element_bytes(operator)
    biased = bool(operator.work.bias_adds)
    weights = (inputs * outputs + outputs * biased) * size
    return replace(
        operator,
        inputs=tuple(_replaced(shape, old, (inputs, outputs)) for shape in operator.inputs),
        outputs=((*out[:-1], outputs),),
        work=Work(rows * inputs * outputs, rows * outputs * biased, 0, rows * outputs),
        bytes_read=round(rows * inputs * size + weights),
        weight_bytes=round(weights),
        bytes_written=round(rows * outputs * size),
    )


def _replaced(shape: tuple[int, ...], old: tuple[int, int], new: tuple[int, int]) -> tuple[int, ...]:
    """Return a product's operand with other widths: ``[..., inputs]``, ``[inputs, outputs]`` or ``[outputs]``."""
    if shape == old:
        return new
    if shape == old[::-1]:
        return new[::-1]
    if shape == old[1:]:
        return new[1:]
    return (*shape[:-1], new[0]) if shape and shape[-1] == old[0] else shape


def convolution(
    operator: Operator,
    *,
    inputs: int | None = None,
    outputs: int | None = None,
    kernel: tuple[int, ...] | None = None,
    stride: tuple[int, ...] | None = None,
    groups: int | None = None,
    image: tuple[int, ...] | None = None,
    positions: tuple[int, ...] | None = None,
    bias: bool | None = None,
) -> Operator:
    """Return a convolution with other attributes.

    Args:
        operator: A convolution that is not transposed.
        inputs: Channels that it reads.
        outputs: Channels that it makes.
        kernel: Sizes of its kernel.
        stride: Its stride; say ``positions`` with it.
        groups: Its groups.
        image: Spatial sizes of what it reads.
        positions: Spatial sizes of what it makes.
        bias: Whether it adds one.
    """
    attributes: dict[str, Any] = dict(operator.attributes)
    given = {"inputs": inputs, "outputs": outputs, "kernel": kernel, "stride": stride, "groups": groups}
    attributes |= {name: value for name, value in given.items() if value is not None}
    x, out = operator.inputs[0], operator.outputs[0]
    x = (x[0], attributes["inputs"], *(image or x[2:]))
    out = (out[0], attributes["outputs"], *(positions or out[2:]))
    weight = (attributes["outputs"], attributes["inputs"] // attributes["groups"], *attributes["kernel"])
    biased = bool(operator.work and operator.work.bias_adds) if bias is None else bias
    size = element_bytes(operator)
    weights = (math.prod(weight) + attributes["outputs"] * biased) * size
    depthwise = 1 < attributes["groups"] == attributes["inputs"]
    return replace(
        operator,
        kind=Kind.DEPTHWISE if depthwise else Kind.CONVOLUTION,
        attributes=attributes,
        inputs=(x, weight, *([(attributes["outputs"],)] if biased else [])),
        outputs=(out,),
        producers=(*operator.producers[:1], *([-1] * (1 + biased))) if operator.producers else (),
        work=Work(math.prod(out) * math.prod(weight[1:]), math.prod(out) * biased, 0, math.prod(out)),
        bytes_read=round(math.prod(x) * size + weights),
        weight_bytes=round(weights),
        bytes_written=round(math.prod(out) * size),
    )


def batched(operator: Operator, times: int) -> Operator:
    """Return an operator as it is when a run has that many times the samples: weights are read once all the same."""
    wider = lambda shape: (shape[0] * times, *shape[1:]) if shape else shape  # noqa: E731
    known = len(operator.producers) == len(operator.inputs)
    return replace(
        operator,
        inputs=tuple(
            wider(shape) if known and operator.producers[place] >= 0 else shape
            for place, shape in enumerate(operator.inputs)
        ),
        outputs=tuple(map(wider, operator.outputs)),
        work=operator.work and Work(*(value * times for value in operator.work)),
        bytes_read=operator.weight_bytes + (operator.bytes_read - operator.weight_bytes) * times,
        bytes_written=operator.bytes_written * times,
        live_bytes=operator.live_bytes * times,
    )
