"""Which models have their weights on a device: as many as its budget holds, those that were used last.

The others wait with their weights in host memory, and are moved when one of their requests runs.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from narrowcast.serving.memory import Holding, Ledger
from narrowcast.serving.refusals import MemoryBudgetError

__all__ = ["DeviceMemory", "Movable"]


class Movable(ABC):
    """Something whose weights can be on a device or in host memory."""

    @abstractmethod
    def to_device(self) -> None:
        """Move the weights to the device; if it fails they are in host memory as before."""

    @abstractmethod
    def to_host(self) -> None:
        """Move the weights to host memory, and give the device's memory back."""


class _Place(Enum):
    HOST = "host"
    MOVING = "moving"
    DEVICE = "device"


@dataclass(eq=False)
class _Entry:
    """A model and where its weights are.

    Attributes:
        model: The model.
        name: What messages call it.
        size: Bytes of its weights.
        place: Where they are.
        users: How many use them now, or wait to.
        holding: What they take of the device's memory.
    """

    model: Movable
    name: str
    size: int
    place: _Place = _Place.HOST
    users: int = 0
    holding: Holding[_Entry] | None = None


class DeviceMemory:
    """The memory of one device for weights. Threads may share it.

    Args:
        budget: Bytes that weights may take there, or None for no bound.
    """

    def __init__(self, budget: int | None = None) -> None:
        self._ledger: Ledger[_Entry] = Ledger(budget)
        self._entries: dict[Movable, _Entry] = {}
        self._changed = threading.Condition()

    @property
    def used(self) -> int:
        """Bytes that weights take on the device."""
        with self._changed:
            return self._ledger.used

    @property
    def evictions(self) -> int:
        """How often weights were moved to host memory so that others fitted."""
        return self._ledger.evictions

    def add(self, model: Movable, size: int, name: str) -> None:
        """Take a model in, whose weights are in host memory.

        Args:
            model: The model.
            size: Bytes of its weights.
            name: What messages call it.

        Raises:
            MemoryBudgetError: It could not fit if it were alone.
        """
        with self._changed:
            self._ledger.admit(size, name)
            self._entries[model] = _Entry(model, name, size)

    def remove(self, model: Movable) -> None:
        """Forget a model that nobody uses any more, when a move of it that is under way has ended."""
        with self._changed:
            entry = self._entries.pop(model, None)
            if entry is None:
                return
            self._changed.wait_for(lambda: entry.place is not _Place.MOVING)
            if entry.holding is not None:
                self._ledger.release(entry.holding)
            self._changed.notify_all()

    @contextmanager
    def resident(self, model: Movable) -> Generator[None]:
        """Have the weights of a model on the device; they stay there while this lasts.

        Where room is needed, the models that were used longest ago and are not in use now are moved to host memory; where
        all are in use, this waits for one of them.
        """
        entry = self._entries[model]
        with self._changed:
            entry.users += 1
        try:
            self._bring(entry)
            yield
        finally:
            with self._changed:
                entry.users -= 1
                if entry.holding is not None:
                    self._ledger.touch(entry.holding)
                self._changed.notify_all()

    def _bring(self, entry: _Entry) -> None:
        """Move the weights of a model to the device, unless they are there or somebody else moves them."""
        with self._changed:
            going: list[_Entry] | None = None
            while entry.place is not _Place.DEVICE and going is None:
                going = self._room(entry) if entry.place is _Place.HOST else None
                if going is None:
                    self._changed.wait()
            if going is None:
                return
            for moved in (entry, *going):
                moved.place = _Place.MOVING
            # Held from here on, beside those that are on their way out, so that nobody else counts on their room.
            entry.holding = self._ledger.hold(entry.size, entry)
        try:
            for moved in going:
                moved.model.to_host()
                self._settle(moved, _Place.HOST, evicted=True)
            entry.model.to_device()
        except BaseException:
            self._settle(entry, _Place.HOST)
            for moved in going:
                if moved.place is _Place.MOVING:
                    self._settle(moved, _Place.DEVICE)
            raise
        self._settle(entry, _Place.DEVICE)

    def _room(self, entry: _Entry) -> list[_Entry] | None:
        """Return which models have to leave the device, or None where too many of them are in use."""
        try:
            going = self._ledger.room(
                entry.size, entry.name, lambda other: not other.users and other.place is _Place.DEVICE
            )
        except MemoryBudgetError:
            return None
        return [holding.owner for holding in going if holding.owner is not None]

    def _settle(self, entry: _Entry, place: _Place, *, evicted: bool = False) -> None:
        """Note where the weights of a model are now, and let those look again who wait."""
        with self._changed:
            entry.place = place
            if place is _Place.HOST and entry.holding is not None:
                self._ledger.release(entry.holding, evicted=evicted)
                entry.holding = None
            self._changed.notify_all()
