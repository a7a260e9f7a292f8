"""What a counted run consists of: operators in their order, and what each computes and moves.

PyTorch modules and ONNX graphs are counted by walkers of their own; both give this.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from narrowcast.accounting.counting import Work
from narrowcast.accounting.kinds import Kind

__all__ = ["Operator", "Trace"]


@dataclass(frozen=True)
class Operator:
    """One operator of a counted run.

    Args:
        name: Its ATen name, or its ONNX operator type.
        path: The module that it, or the operator whose gradient it computes, ran in, by its name in the model; empty
            outside all modules.
        phase: ``forward`` or ``backward``.
        inputs: Shapes of the tensors that it read.
        outputs: Shapes of the tensors that it made.
        dtype: Of its first output.
        kind: What sort of work it does.
        attributes: What its shapes do not say, see :func:`narrowcast.accounting.kinds.attributes_of`.
        work: What it computed; None if there is no rule for it.
        bytes_read: Bytes of the tensors that it read, each storage once; 0 for a view.
        weight_bytes: Of the bytes read, those of parameters and buffers.
        bytes_written: Bytes of the tensors that it made; 0 for a view.
        live_bytes: Bytes of all tensors that were alive right after it, parameters included.
        producers: For each input, the place in the run of the operator that last wrote it, views aside; -1 for
            parameters and inputs of the model. Empty where the walker does not follow it.
    """

    name: str
    path: str
    phase: str
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    dtype: str
    kind: Kind
    attributes: Mapping[str, Any]
    work: Work | None
    bytes_read: int
    weight_bytes: int
    bytes_written: int
    live_bytes: int
    producers: tuple[int, ...] = ()


@dataclass
class Trace:
    """What a counted run did, in order."""

    operators: list[Operator] = field(default_factory=list[Operator])
    static_bytes: int = 0  # parameters and buffers
    peak_bytes: int = 0
    uncounted: Counter[str] = field(default_factory=Counter[str])

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole run."""
        return sum(operator.work.macs for operator in self.operators if operator.work)

    @property
    def bias_adds(self) -> int:
        """Additions of biases."""
        return sum(operator.work.bias_adds for operator in self.operators if operator.work)

    @property
    def sums(self) -> int:
        """Sums that the products are added to."""
        return sum(operator.work.sums for operator in self.operators if operator.work)

    @property
    def other(self) -> int:
        """Operations that are no MAC."""
        return sum(operator.work.other for operator in self.operators if operator.work)
