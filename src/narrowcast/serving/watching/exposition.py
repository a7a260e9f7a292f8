"""Prometheus' text format, version 0.0.4."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

__all__ = ["CONTENT_TYPE", "Family", "Labels", "Sample", "exposition", "histogram"]

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

Labels = dict[str, str]
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


@dataclass(frozen=True)
class Sample:
    """One number.

    Attributes:
        labels: What it is the number of.
        value: The number.
        suffix: What follows the family's name, such as ``_bucket``.
    """

    labels: Labels
    value: float
    suffix: str = ""


@dataclass(frozen=True)
class Family:
    """Samples of one name.

    Attributes:
        name: Name, with unit.
        kind: What the numbers do.
        help: What they say.
        samples: The numbers; a family without any is left out.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    samples: Sequence[Sample]


def histogram(labels: Labels, bounds: Sequence[float], counts: Sequence[int], total: float) -> list[Sample]:
    """Return the samples of a histogram.

    Args:
        labels: What it is the histogram of.
        bounds: Upper ends of its buckets but the last, which has none.
        counts: How many fell into each bucket; one more than there are bounds.
        total: Sum of what was counted.
    """
    ends = [*(f"{bound:g}" for bound in bounds), "+Inf"]
    found = [
        Sample({**labels, "le": end}, count, "_bucket") for end, count in zip(ends, accumulate(counts), strict=True)
    ]
    return [*found, Sample(labels, total, "_sum"), Sample(labels, sum(counts), "_count")]


def exposition(families: Iterable[Family]) -> str:
    """Return families as text."""
    lines: list[str] = []
    for family in families:
        if family.samples:
            lines += [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}"]
            lines += [
                f"{family.name}{item.suffix}{_labels(item.labels)} {_number(item.value)}" for item in family.samples
            ]
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    """Return a number; whole ones without exponent or point, so that counters are exact."""
    return str(int(value)) if value == int(value) else repr(float(value))


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items()) + "}"
