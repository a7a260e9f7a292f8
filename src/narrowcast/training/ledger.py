"""The skip ledger: every update that was left out, and where the first number that was not finite stood."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from narrowcast.training.writing import written

__all__ = ["Ledger", "Skip"]

_KEPT = 4096  # skips that are kept in memory: the latest


@dataclass(frozen=True)
class Skip:
    """One update that was left out.

    Args:
        step: Updates done before it.
        attempt: Updates tried before it, done or left out.
        rank: The first rank whose own numbers were not finite; None where ranks saw only their sum.
        layers: Names of the parameters whose gradients are not finite, in the order of the backward pass: the first is
            nearest to the loss, where the overflow began.
        kind: What the first of them holds: ``inf`` (an overflow) or ``nan`` (an undefined result).
        scale: The loss scale of the step.
    """

    step: int
    attempt: int
    rank: int | None
    layers: tuple[str, ...]
    kind: Literal["inf", "nan"]
    scale: float


class Ledger:
    """Skips in order: the latest 4096 in memory, and all of them in a file from when one is named."""

    def __init__(self) -> None:
        self._skips: deque[Skip] = deque(maxlen=_KEPT)
        self._path: Path | None = None

    def write_to(self, path: Path) -> None:
        """Append skips from now on to a file, one JSON object a line."""
        self._path = path

    def add(self, skip: Skip) -> None:
        """Note a skip.

        Raises:
            OutputError: The file cannot be written.
        """
        self._skips.append(skip)
        if self._path is None:
            return
        with written(f"the skip ledger {self._path}"), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(skip)) + "\n")

    def __iter__(self) -> Iterator[Skip]:
        return iter(self._skips)

    def __len__(self) -> int:
        return len(self._skips)

    def __getitem__(self, index: int) -> Skip:
        return self._skips[index]
