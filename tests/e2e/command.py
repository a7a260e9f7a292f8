"""The command line as a test calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Cli", "Outcome", "strict"]


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """What was printed to stderr on one line, without the frame around it."""
        return " ".join(self.err.replace("│", " ").split())


Cli = Callable[..., Outcome]


def strict(text: str) -> Any:
    """Return what a JSON text says; NaN and infinity, which JSON has not, fail."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)
