"""The lines that a run leaves: whole ones are read, damaged ones are left out with a note."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narrowcast.training.doctor.values import Reading
from narrowcast.training.logs import SKIPS

__all__ = ["SkipLine", "cut", "lines", "logged", "skips"]


@dataclass(frozen=True)
class SkipLine:
    """A line of the skip ledger: an update that was left out."""

    step: int
    layers: tuple[str, ...]
    kind: str
    scale: float


def lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the lines of a file that are JSON objects, and a note for each that is not; nothing if there is no file."""
    if not path.is_file():
        return [], []
    found: list[dict[str, Any]] = []
    notes = list(cut(path))
    text = path.read_text(encoding="utf-8", errors="replace")
    texts = text.splitlines() if text.endswith("\n") or not text else text.splitlines()[:-1]
    for number, line in enumerate(texts, 1):
        try:
            value: Any = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            found.append(value)  # type: ignore[arg-type] - keys of JSON objects are texts
        else:
            notes.append(f"{path.name}: line {number} is damaged and was left out")
    return found, notes


def cut(path: Path) -> Iterator[str]:
    """Yield a note if a file's last line was cut off."""
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                yield f"{path.name}: the last line is cut off, as a killed run leaves it, and was left out"


def skips(lines: Sequence[dict[str, Any]]) -> tuple[list[SkipLine], list[str]]:
    """Return the lines that tell of a skip, and a note of those that do not."""
    found: list[SkipLine] = []
    for line in lines:
        match line:
            case {"step": int(step), "layers": [*layers], "kind": str(kind), "scale": int() | float() as scale}:
                found.append(SkipLine(step, tuple(map(str, layers)), kind, float(scale)))
            case _:
                continue
    missed = len(lines) - len(found)
    return found, [f"{SKIPS}: {missed} lines say nothing of a skip and were left out"] if missed else []


def logged(lines: Sequence[dict[str, Any]]) -> Iterator[Reading]:
    """Yield the readings that a run's log holds."""
    for line in lines:
        if isinstance(line.get("step"), int) and "loss" in line:
            yield Reading(
                step=line["step"] - 1,
                loss=_number(line["loss"]),
                grad_norm=_number(line.get("grad_norm")),
                scale=_number(line.get("scale")) or 1.0,
            )


def _number(value: object) -> float | None:
    """Return a number of a log, in which infinities and NaN are texts."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None
