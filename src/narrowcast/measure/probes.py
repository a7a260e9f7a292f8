"""Probes: small pieces of networks, one class of operators each, whose times show what a runtime reaches on a machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from narrowcast.accounting.classes import OperatorClass, Shape, convolution_class

__all__ = ["Case", "Sample", "convolution_case", "host_times", "product_case", "stream_case"]


class Case(NamedTuple):
    """One operator of a probe.

    Args:
        kind: Its class.
        name: What to run: ``linear``, ``bmm``, ``conv``, ``sdpa``, ``add``, ``gelu`` ...
        sizes: What the name needs: of ``linear`` rows, inputs, outputs; of ``conv`` batch, inputs, outputs, pixels along
            an edge, kernel, stride, groups; of others the shape of the tensor.
        shape: As the product that it is; None if it multiplies no matrices.
        moved: Numbers that it reads and writes, weights aside.
        weights: Numbers that its weights have.
    """

    kind: OperatorClass
    name: str
    sizes: tuple[int, ...]
    shape: Shape | None
    moved: int
    weights: int = 0

    @property
    def macs(self) -> float:
        """Multiply-accumulates."""
        shape = self.shape
        return shape.batch * shape.rows * shape.columns * shape.depth if shape else 0.0


class Sample(NamedTuple):
    """What a case took.

    Args:
        case: What was run.
        number_bytes: Bytes of each number.
        seconds: Time of one operator: the median on a GPU, the lower quartile on a CPU.
        low: The 10th percentile.
        high: The 90th percentile.
    """

    case: Case
    number_bytes: int
    seconds: float
    low: float
    high: float


def product_case(rows: int, inputs: int, outputs: int) -> Case:
    """Return a product of ``[rows, inputs]`` with a weight ``[outputs, inputs]``."""
    shape = Shape(batch=1, rows=rows, columns=outputs, depth=inputs)
    moved = rows * (inputs + outputs)
    return Case(OperatorClass.PRODUCT, "linear", (rows, inputs, outputs), shape, moved, inputs * outputs)


def batched_case(batch: int, rows: int, inputs: int, outputs: int) -> Case:
    """Return ``batch`` products of activations, ``[rows, inputs] x [inputs, outputs]``."""
    shape = Shape(batch=batch, rows=rows, columns=outputs, depth=inputs)
    moved = batch * (rows * inputs + inputs * outputs + rows * outputs)
    return Case(OperatorClass.BATCHED, "bmm", (batch, rows, inputs, outputs), shape, moved)


def attention_case(batch: int, heads: int, tokens: int, width: int) -> Case:
    """Return attention of ``tokens`` with themselves; the two products count as one with a doubled depth."""
    shape = Shape(batch=batch * heads, rows=tokens, columns=tokens, depth=2 * width)
    moved = 4 * batch * heads * tokens * width
    return Case(OperatorClass.ATTENTION, "sdpa", (batch, heads, tokens, width), shape, moved)


def convolution_case(
    batch: int, inputs: int, outputs: int, pixels: int, kernel: int, *, stride: int = 1, groups: int = 1
) -> Case:
    """Return a square convolution with padding that keeps ``pixels / stride`` along an edge."""
    kind = convolution_class(inputs, groups, kernel * kernel)
    edge = -(-pixels // stride)
    depth = inputs // groups * kernel * kernel
    shape = Shape(batch=groups, rows=batch * edge * edge, columns=outputs / groups, depth=depth)
    moved = batch * (inputs * pixels * pixels + outputs * edge * edge)
    return Case(kind, "conv", (batch, inputs, outputs, pixels, kernel, stride, groups), shape, moved, depth * outputs)


def stream_case(kind: OperatorClass, name: str, *sizes: int, passes: float = 2.0) -> Case:
    """Return an operator that multiplies no matrices: it reads and writes its tensor ``passes`` times in all."""
    numbers = 1
    for size in sizes:
        numbers *= size
    return Case(kind, name, sizes, None, round(passes * numbers))


def host_times(call: Callable[[], Any], rounds: int) -> list[float]:
    """Return the seconds of each of ``rounds`` calls by the host's clock, after one that is not counted."""
    call()
    times: list[float] = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times
