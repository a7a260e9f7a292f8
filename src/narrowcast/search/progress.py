"""How long work says what it is doing; the search never prints."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    """Told about stages as they begin and advance, and about what was found."""

    def stage(self, name: str, share: float = 0.0) -> None:
        """A stage began, or has come this far (0 to 1)."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line was found."""
        ...


class Silent:
    """Says nothing."""

    def stage(self, name: str, share: float = 0.0) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""
