"""Who is told about a training run as it goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from narrowcast.training.assembly import Assembled
    from narrowcast.training.objectives import Result

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    """Told about a run as it goes."""

    def started(self, run: Assembled, out: Path, step: int) -> None:
        """Everything is there; training begins, or goes on after a step."""
        ...

    def stepped(self, step: int) -> None:
        """A window closed after so many updates; its own counts as made where that is not known yet."""
        ...

    def logged(self, step: int, line: dict[str, Any]) -> None:
        """A line was logged: loss, grad_norm, scale, skipped, lr, samples_per_s."""
        ...

    def validated(self, step: int, result: Result) -> None:
        """The validation part was scored."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line happened."""
        ...


class Silent:
    """Says nothing."""

    def started(self, run: Assembled, out: Path, step: int) -> None:
        """Do nothing."""

    def stepped(self, step: int) -> None:
        """Do nothing."""

    def logged(self, step: int, line: dict[str, Any]) -> None:
        """Do nothing."""

    def validated(self, step: int, result: Result) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""
