"""What an Einstein summation costs, by its equation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from narrowcast.accounting.counting import Work

__all__ = ["einsum"]


def einsum(equation: str, shapes: Sequence[Sequence[int]]) -> Work:
    """Return the work of an einsum, operands joined from left to right as runtimes do.

    A product that sums over an index is a matrix product; one that does not is elementwise. An index that only one operand
    has, and that is summed over, is summed first.

    Args:
        equation: Such as ``bhid,bhjd->bhij``; ``...`` stands for leading axes that broadcast.
        shapes: Of the operands.

    Raises:
        ValueError: Equation and shapes do not fit each other.

    >>> einsum("ij,jk->ik", [(2, 3), (3, 4)])
    Work(macs=24, bias_adds=0, other=0, sums=8)
    """
    terms, result = _parsed(equation, len(shapes))
    sizes: dict[str, int] = {}
    operands: list[set[str]] = []
    for term, shape in zip(terms, shapes, strict=True):
        labels = _labels(term, len(shape), equation)
        for label, size in zip(labels, shape, strict=True):
            known = sizes.setdefault(label, size)
            if size not in (1, known) and known != 1:
                raise ValueError(f"einsum {equation!r}: axis {label!r} has sizes {known} and {size}")
            sizes[label] = max(known, size)
        operands.append(set(labels))
    wanted = _wanted(terms, result, operands)
    macs = other = sums = 0
    joined = operands[0]
    for place, operand in enumerate(operands[1:], start=1):
        later = wanted.union(*operands[place + 1 :])
        alone = [labels - later - rest for labels, rest in ((joined, operand), (operand, joined))]
        for labels, summed in zip((joined, operand), alone, strict=True):
            other += _count(labels, sizes) if summed else 0
        joined, operand = joined - alone[0], operand - alone[1]
        every = joined | operand
        kept = every & later
        if kept == every:
            other += _count(every, sizes)
        else:
            macs += _count(every, sizes)
            sums += _count(kept, sizes)
        joined = kept
    other += _count(joined, sizes) if joined - wanted else 0
    return Work(macs, 0, other, sums)


def _parsed(equation: str, operands: int) -> tuple[list[str], str | None]:
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != operands:
        raise ValueError(f"einsum {equation!r} has {len(terms)} terms for {operands} operands")
    return terms, right if arrow else None


def _labels(term: str, rank: int, equation: str) -> list[str]:
    """Return a label per axis; the axes of an ellipsis are numbered from the right, so that they broadcast."""
    before, dots, after = term.partition("...")
    missing = rank - len(before) - len(after)
    if missing < 0 or (missing and not dots):
        raise ValueError(f"einsum {equation!r}: {term!r} does not name {rank} axes")
    return [*before, *(f".{place}" for place in reversed(range(missing))), *after]


def _wanted(terms: Sequence[str], result: str | None, operands: Sequence[set[str]]) -> set[str]:
    dots = {label for labels in operands for label in labels if label.startswith(".")}
    if result is None:  # the labels that occur once
        text = "".join(terms).replace("...", "")
        return {label for label in text if text.count(label) == 1} | dots
    return set(result.replace("...", "")) | (dots if "..." in result else set())


def _count(labels: set[str], sizes: dict[str, int]) -> int:
    return math.prod(sizes[label] for label in labels)
