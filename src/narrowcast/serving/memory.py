"""A memory of bounded size: what is held of it, and what has to go so that something else fits."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from narrowcast.errors import ConfigError
from narrowcast.serving.refusals import MemoryBudgetError

__all__ = ["Holding", "Ledger", "read_bytes", "spelled_bytes"]

_T = TypeVar("_T")
_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_BYTES = re.compile(r"(\d{1,15}(?:\.\d{1,6})?) ?([A-Za-z]*)")


@dataclass(eq=False)
class Holding(Generic[_T]):
    """A part of a memory.

    Attributes:
        size: Its bytes.
        owner: What it is held for; None while that is being made.
    """

    size: int
    owner: _T | None = None


@dataclass
class Ledger(Generic[_T]):
    """What is held of a memory, by last use. It moves nothing, it says what has to be moved.

    Attributes:
        budget: Bytes that may be held, or None for no bound.
        evictions: Holdings that went so that others fitted.
    """

    budget: int | None = None
    evictions: int = 0
    _holdings: OrderedDict[Holding[_T], None] = field(default_factory=OrderedDict[Holding[_T], None])

    @property
    def used(self) -> int:
        """Bytes that are held."""
        return sum(holding.size for holding in self._holdings)

    def admit(self, size: int, what: str) -> None:
        """Make sure that something could fit if nothing else were held.

        Raises:
            MemoryBudgetError: It could not.
        """
        if self.budget is not None and size > self.budget:
            raise MemoryBudgetError(
                f"{what} takes {spelled_bytes(size)} of memory, more than the whole budget of {spelled_bytes(self.budget)}",
                lasting=True,
                next_step="raise the budget, or serve a smaller model",
            )

    def room(
        self, size: int, what: str, free: Callable[[_T], bool], besides: Collection[Holding[_T]] = ()
    ) -> list[Holding[_T]]:
        """Return what has to go so that something fits: as few as need be, the least recently used first.

        Args:
            size: Bytes that are wanted beyond those that are held.
            what: What they are for, for the message.
            free: Whether a holding may go.
            besides: Holdings that go anyway, and are neither counted nor named.

        Raises:
            MemoryBudgetError: Too little would be free, even if all went that may.
        """
        if self.budget is None:
            return []
        missing = self.used - sum(holding.size for holding in besides) + size - self.budget
        going: list[Holding[_T]] = []
        for holding in self._holdings:
            if missing <= 0:
                break
            if holding.owner is not None and holding not in besides and free(holding.owner):
                going.append(holding)
                missing -= holding.size
        if missing > 0:
            raise MemoryBudgetError(
                f"{what} does not fit: {spelled_bytes(missing)} of memory are missing, and what is loaded is in use",
                lasting=False,
                next_step="ask again, or raise the budget",
            )
        return going

    def hold(self, size: int, owner: _T | None = None) -> Holding[_T]:
        """Note that bytes are held from now on, and were used just now."""
        holding = Holding(size, owner)
        self._holdings[holding] = None
        return holding

    def touch(self, holding: Holding[_T]) -> None:
        """Note that a holding is used now."""
        self._holdings.move_to_end(holding)

    def release(self, holding: Holding[_T], *, evicted: bool = False) -> None:
        """Note that a holding has gone; nothing where it had gone before."""
        if self._holdings.pop(holding, holding) is None:
            self.evictions += evicted


def read_bytes(text: str) -> int:
    """Return a number of bytes as in ``512MiB`` or ``1.5GiB``.

    Raises:
        ConfigError: It is none.
    """
    match = _BYTES.fullmatch(text.strip())
    if match is None or match[2] not in _UNITS or not float(match[1]):
        raise ConfigError(f"{text!r} is no size of memory", allowed="a number with B, KiB, MiB, GiB or TiB, as in 4GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def spelled_bytes(size: int) -> str:
    """Return a number of bytes for people."""
    unit = next((unit for unit in ("GiB", "MiB", "KiB") if size >= _UNITS[unit]), "B")
    return f"{size / _UNITS[unit]:.1f} {unit}" if unit != "B" else f"{size} B"
