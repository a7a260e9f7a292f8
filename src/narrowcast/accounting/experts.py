"""Which parameters of a mixture of experts a token does not meet, from the products of a traced run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from narrowcast.accounting.operators import Operator, Trace

__all__ = ["idle_parameters"]

_GROUPED = ("_grouped_mm", "_scaled_grouped_mm")
_GATHERS = ("index", "index_select")


class _Routed(NamedTuple):
    """Rows that went through one expert each."""

    path: str
    experts: int
    weights: int  # of one expert, in this product
    rows: int
    tokens: int


def idle_parameters(module: nn.Module, run: Trace) -> int:
    """Return the experts' parameters, biases included, that one token does not meet.

    Experts are known by their products: one grouped product of all rows with weights ``[experts, in, out]``, or a batched
    product in which each row has a copy of its expert's weights. Each of ``tokens`` goes through ``rows / tokens`` experts.
    A model that computes every expert for every token meets them all.

    Args:
        module: The model that ran.
        run: What it did.
    """
    idle = 0
    whole: set[str] = set()  # modules whose experts' parameters are settled
    tokens: dict[str, int] = {}  # by module: its first product takes the rows as they were gathered
    for routed in _routed(run):
        if routed.path in whole:
            continue
        chosen = routed.rows // tokens.setdefault(routed.path, routed.tokens)
        unmet = max(routed.experts - chosen, 0)
        own = [
            tensor
            for tensor in module.get_submodule(routed.path).parameters(recurse=False)
            if tensor.dim() > 1 and tensor.shape[0] == routed.experts
        ]
        if own:
            whole.add(routed.path)
            idle += unmet * sum(tensor.numel() // routed.experts for tensor in own)
        else:  # stacked for the product: the parameters are some other module's
            idle += unmet * routed.weights
    return idle


def _routed(run: Trace) -> Iterator[_Routed]:
    operators = run.operators
    for operator in operators:
        if operator.phase != "forward":
            continue
        if operator.name in _GROUPED and len(operator.inputs[1]) == 3:
            (rows, _), (experts, *weight) = operator.inputs[0], operator.inputs[1]
            yield _Routed(operator.path, experts, math.prod(weight), rows, _tokens(operators, operator, 0))
        elif operator.name == "bmm":
            for place, producer in enumerate(operator.producers):
                gathered = operators[producer] if producer >= 0 else operator
                if gathered.name == "index" and gathered.weight_bytes and len(gathered.inputs[0]) == 3:
                    experts, *weight = gathered.inputs[0]
                    rows = operator.outputs[0][0]
                    yield _Routed(
                        operator.path, experts, math.prod(weight), rows, _tokens(operators, operator, 1 - place)
                    )


def _tokens(operators: list[Operator], product: Operator, place: int) -> int:
    """Return how many tokens the rows of a product were gathered or repeated from; several gathers may follow each other."""
    rows, producer = product.inputs[place][0], product.producers[place]
    while producer >= 0 and operators[producer].inputs:
        maker = operators[producer]
        rows, producer = maker.inputs[0][0], maker.producers[0]
        before = operators[producer] if producer >= 0 else None
        if before is None or before.name not in _GATHERS or before.weight_bytes:
            break
    return rows
