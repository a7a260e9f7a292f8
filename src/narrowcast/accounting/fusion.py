"""Which operators a runtime runs inside another one's kernel, or before the run, so that they cost no time of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from narrowcast.accounting.kinds import Kind
from narrowcast.accounting.operators import Operator

__all__ = ["FUSING", "absorbed", "recurrent_paths"]

#: Runtimes that merge operators; all others run each alone.
FUSING = frozenset({"onnxruntime", "compiled"})
#: The same product with weights so often in one module makes it a recurrent layer.
_STEPS = 3
_CONVOLUTIONS = (Kind.CONVOLUTION, Kind.DEPTHWISE)
#: What ONNX Runtime's convolutions do to their results: scale and shift, add a residual, apply a simple activation.
_INTO_CONVOLUTIONS = frozenset(
    """
    _native_batch_norm_legit_no_training native_batch_norm batchnormalization add relu hardtanh clamp clip sigmoid
    leaky_relu leakyrelu
    """.split()  # noqa: SIM905
)


def absorbed(operators: Sequence[Operator], runtime: str) -> frozenset[int]:
    """Return the places of the operators that cost no time of their own.

    ONNX Runtime computes what depends on no input before the run, lets convolutions do what :data:`_INTO_CONVOLUTIONS`
    names, products add their biases, and runs recurrent layers as one kernel; compilers of whole graphs do at least that.
    Eager PyTorch fuses nothing.

    Args:
        operators: A run, in order.
        runtime: Whose kernels run it.
    """
    if runtime not in FUSING:
        return frozenset()
    readers = Counter(place for operator in operators for place in set(operator.producers) if place >= 0)
    recurrent = recurrent_paths(operators)
    heads: dict[int, Operator] = {}  # of each absorbed operator, the one whose kernel does it
    found: set[int] = set()
    for place, operator in enumerate(operators):
        if operator.kind is Kind.VIEW:
            continue
        if not operator.inputs or (operator.path in recurrent and operator.kind is not Kind.PRODUCT):
            found.add(place)
            continue
        source = _source(operators, place)
        if source is None or readers[source] > 1 or operators[source].outputs[:1] != operator.outputs[:1]:
            continue
        head = heads.get(source, operators[source])
        if _takes(head, operator):
            heads[place] = head
            found.add(place)
    return frozenset(found)


def recurrent_paths(operators: Sequence[Operator]) -> frozenset[str]:
    """Return the modules that make the same product with weights step by step, with gates between: recurrent layers."""
    products = Counter(
        (operator.path, operator.inputs)
        for operator in operators
        if operator.kind is Kind.PRODUCT and operator.weight_bytes
    )
    gated = {operator.path for operator in operators if operator.name.removesuffix("_") in ("sigmoid", "tanh")}
    return frozenset(path for (path, _), count in products.items() if count >= _STEPS and path in gated)


def _source(operators: Sequence[Operator], place: int) -> int | None:
    """Return the operator whose result the one at ``place`` reads, the latest of several; None if it reads inputs only.

    Where the run does not say who made what, it is the one before it, if the shapes fit.
    """
    operator = operators[place]
    if operator.producers:
        latest = max(operator.producers)
        return latest if latest >= 0 else None
    before = next((p for p in range(place - 1, -1, -1) if operators[p].kind is not Kind.VIEW), None)
    return before if before is not None and operators[before].outputs[:1] == operator.inputs[:1] else None


def _takes(head: Operator, operator: Operator) -> bool:
    name = operator.name.casefold()
    name = name if name in _INTO_CONVOLUTIONS else name.removesuffix("_")
    if head.kind in _CONVOLUTIONS:
        return name in _INTO_CONVOLUTIONS
    return head.kind is Kind.PRODUCT and name == "add" and operator.weight_bytes > 0
