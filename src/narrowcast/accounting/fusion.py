"""Which operators a runtime runs inside another one's kernel, so that they cost no pass over memory of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from narrowcast.accounting.classes import OperatorClass, class_of
from narrowcast.accounting.kinds import Kind
from narrowcast.accounting.operators import Operator

__all__ = ["FUSING", "fused"]

_INTO_PRODUCTS = frozenset({Kind.CONVOLUTION, Kind.DEPTHWISE, Kind.PRODUCT})
_NORMS_THAT_FOLD = ("batch_norm", "BatchNormalization")
#: Activations that ONNX Runtime's convolutions apply themselves.
_ACTIVATIONS = frozenset("relu relu_ hardtanh hardtanh_ clip sigmoid sigmoid_ leaky_relu leaky_relu_ clamp".split())  # noqa: SIM905

#: Runtimes that merge operators; all others run each alone.
FUSING = frozenset({"onnxruntime"})


def fused(operators: Sequence[Operator], runtime: str) -> dict[int, int]:
    """Return which operators run inside others: the place of each absorbed one, to the place of the one that absorbs it.

    ONNX Runtime folds batch normalisation into the convolution before it, lets convolutions apply simple activations and
    the addition of a residual, and fuses chains of elementwise operators. Eager PyTorch fuses nothing.

    Args:
        operators: A run, in order.
        runtime: Whose kernels run it.
    """
    if runtime not in FUSING:
        return {}
    readers = Counter(place for operator in operators for place in set(operator.producers) if place >= 0)
    into: dict[int, int] = {}
    for place, operator in enumerate(operators):
        source = _source(operators, place)
        if source is None or readers[source] > 1 or operators[source].outputs[:1] != operator.outputs[:1]:
            continue
        head = into.get(source, source)
        if _absorbs(operators[head], operator):
            into[place] = head
    return into


def _source(operators: Sequence[Operator], place: int) -> int | None:
    """Return the operator whose result the one at ``place`` reads first, or the one before it where none is known."""
    operator = operators[place]
    if operator.producers:
        made = [producer for producer in operator.producers if producer >= 0]
        return max(made, default=None)
    before = next((p for p in range(place - 1, -1, -1) if operators[p].kind is not Kind.VIEW), None)
    if before is None or not operator.inputs or operators[before].outputs[:1] != operator.inputs[:1]:
        return None
    return before


def _absorbs(head: Operator, operator: Operator) -> bool:
    if any(part in operator.name for part in _NORMS_THAT_FOLD):
        return head.kind in (Kind.CONVOLUTION, Kind.DEPTHWISE)
    if head.kind in (Kind.CONVOLUTION, Kind.DEPTHWISE):
        return operator.name.casefold() in _ACTIVATIONS or operator.name in ("add", "add_", "Add")
    if operator.kind is not Kind.ELEMENTWISE:
        return False
    if head.kind is Kind.PRODUCT:
        return operator.name in ("add", "add_", "Add") and operator.weight_bytes > 0
    return head.kind is Kind.ELEMENTWISE and class_of(operator) is OperatorClass.ELEMENTWISE and False
