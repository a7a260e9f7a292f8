"""Many paths in few words: operators of repeated blocks share a name but for their numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["folded"]

#: A number that ends a part of a path: ``layer1.0.conv2`` has three, ``expand1x1_act`` none.
_NUMBER = re.compile(r"(\d+)(?=[.:]|$)")


def folded(paths: Iterable[str]) -> list[str]:
    """Return paths with the numbers in which they differ as ranges, and how many operators each stands for.

    >>> folded(["layer1.0.conv2", "layer1.1.conv2", "layer2.0.conv2", "fc"])
    ['layer1-2.0-1.conv2 (3)', 'fc']
    """
    groups: dict[tuple[str, ...], list[list[int]]] = {}
    for path in paths:
        parts = _NUMBER.split(path)
        groups.setdefault(tuple(parts[::2]), []).append([int(number) for number in parts[1::2]])
    return [_group(texts, numbers) for texts, numbers in groups.items()]


def _group(texts: tuple[str, ...], numbers: list[list[int]]) -> str:
    ranges = [_ranges(sorted(set(column))) for column in zip(*numbers, strict=True)]
    name = texts[0] + "".join(f"{span}{text}" for span, text in zip(ranges, texts[1:], strict=True))
    return name if len(numbers) == 1 else f"{name} ({len(numbers)})"


def _ranges(numbers: list[int]) -> str:
    """Return sorted numbers as runs: 0-2,4."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
