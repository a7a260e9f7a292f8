"""Attention in a counted run, fused or written out, under both conventions: all pairs, and those that masks show.

Dense kernels compute every pair of query and key; kernels for causal attention skip what the mask hides. Published counts
use either (Hoffmann et al. 2022, appendix F, and PaLM, appendix B, count all pairs; the FlashAttention papers halve them
for causal masks), so both are given, each by its name.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from narrowcast.accounting.kinds import Kind
from narrowcast.accounting.operators import Operator

__all__ = ["Attention", "attentions"]

_BETWEEN = (
    Kind.ELEMENTWISE,
    Kind.MOVE,
)  # what stands between scores, softmax and values: scaling, masks, dropout, casts
_FURTHEST = 16  # operators from a product to its softmax


@dataclass(frozen=True)
class Attention:
    """One attention of a forward run, over all its heads and samples.

    Args:
        path: The module that it ran in.
        macs: Multiply-accumulates of scores and of weighted sums of values, for all pairs of query and key.
        visible_macs: The same for the pairs that the mask shows; ``macs`` without a mask.
        known: Whether what the mask shows is known. A mask that depends on inputs (padding), or a term added to the
            scores that depends on weights (relative positions), is not; all pairs count as shown then.
    """

    path: str
    macs: int
    visible_macs: int
    known: bool = True


def attentions(operators: Sequence[Operator]) -> Iterator[Attention]:
    """Yield every attention of a run's forward pass.

    An attention written out is found by its softmax: the last axis of a product of two activations goes in, and a product
    with activations takes what comes out.

    Args:
        operators: A run, in order, with producers.
    """
    readers: dict[int, list[int]] = defaultdict(list)
    for place, operator in enumerate(operators):
        for producer in set(operator.producers):
            readers[producer].append(place)
    for place, operator in enumerate(operators):
        if operator.phase != "forward" or operator.work is None:
            continue
        if operator.kind is Kind.ATTENTION:
            macs = operator.work.macs - operator.attributes.get("projected", 0)  # by the same kernel
            yield _attention(operator.path, macs, [operator])
        elif operator.kind is Kind.SOFTMAX and operator.producers:
            before = _scores(operators, operator)
            after = _values(operators, readers, place, before[0]) if before else None
            if after:
                macs = sum(product.work.macs for product in (before[0], after) if product.work)
                yield _attention(operator.path, macs, before)


def _attention(path: str, macs: int, masking: Sequence[Operator]) -> Attention:
    """Return an attention whose mask is applied by one of the operators in ``masking``."""
    shares = [operator.attributes["visible"] for operator in masking if "visible" in operator.attributes]
    unknown = None in shares or any(_adds_unknown(operator) for operator in masking)
    visible, total = min((share for share in shares if share), key=lambda share: share[0] / share[1], default=(1, 1))
    return Attention(path, macs, macs * visible // total, known=not unknown)


def _adds_unknown(operator: Operator) -> bool:
    adds = operator.name.rstrip("_").casefold() == "add" and len(operator.inputs) == 2
    return adds and "visible" not in operator.attributes


def _scores(operators: Sequence[Operator], softmax: Operator) -> list[Operator]:
    """Return the product that made a softmax's scores, and what came between the two; nothing if there is none."""
    size = math.prod(softmax.outputs[0])
    chain: list[Operator] = []
    operator = softmax
    while len(chain) < _FURTHEST:
        if operator.name == "cat":  # a column for attention sinks beside the scores
            size = max(math.prod(shape) for shape in operator.inputs)
        sources = [
            operators[producer]
            for shape, producer in zip(operator.inputs, operator.producers, strict=True)
            if producer >= 0 and math.prod(shape) == size
        ]
        for source in sources:
            if _between_activations(source):
                return [source, *chain]
        following = [source for source in sources if source.kind in _BETWEEN]
        if not following:
            return []
        operator = following[0]
        chain.append(operator)
    return []


def _values(
    operators: Sequence[Operator], readers: Mapping[int, Sequence[int]], softmax: int, scores: Operator
) -> Operator | None:
    """Return the product of a softmax's result with values."""
    sizes = (math.prod(operators[softmax].outputs[0]), math.prod(scores.outputs[0]))
    place = softmax
    for _ in range(_FURTHEST):
        moved: list[int] = []
        for reader in readers.get(place, ()):
            operator = operators[reader]
            if all(math.prod(shape) not in sizes for shape in operator.inputs):
                continue
            if _between_activations(operator):
                return operator
            if operator.kind in _BETWEEN:
                moved.append(reader)
        if not moved:
            return None
        place = moved[0]
    return None


def _between_activations(operator: Operator) -> bool:
    return operator.kind is Kind.PRODUCT and not operator.weight_bytes
