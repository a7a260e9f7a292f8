"""Flags on their way from a device to the host, which waits for none of them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from narrowcast.training.window import Batch

__all__ = ["Lookout", "Sighting"]

_SLOTS = 64  # flags under way; the host runs at most so many updates ahead
_TOGETHER = 2  # flags under way of several ranks, which must hear of an update at the same place


@dataclass(frozen=True)
class Sighting:
    """An update whose losses or gradients were not finite.

    Args:
        step: Updates before it.
        batch: A micro-batch of it, if one was kept.
    """

    step: int
    batch: Batch | None


class Lookout:
    """Finds out, an update or more later and without waiting, that numbers were not finite.

    Args:
        device: A CUDA device.
        together: Whether several ranks must hear of an update in the same step, since what follows needs all of them: a
            flag is then read a fixed number of updates later, when it has long arrived, and not whenever it happens to.
    """

    def __init__(self, device: torch.device, *, together: bool = False) -> None:
        self._device = device
        self._together = together
        self._host = torch.ones(_SLOTS, dtype=torch.bool, device="cpu", pin_memory=True)
        self._view = self._host.numpy()
        self._under_way: deque[tuple[int, torch.cuda.Event, Sighting]] = deque()
        self._next = 0

    def send(self, finite: Tensor, sighting: Sighting) -> None:
        """Start to copy a flag to the host."""
        slot, self._next = self._next, (self._next + 1) % _SLOTS
        self._host[slot].copy_(finite, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._under_way.append((slot, event, sighting))

    def arrived(self, *, wait: bool = False) -> Sighting | None:
        """Return the first update that is now known to have been broken; None if none is.

        Args:
            wait: Whether to wait for all flags that are under way.
        """
        while self._under_way:
            slot, event, sighting = self._under_way[0]
            if wait or len(self._under_way) >= (_TOGETHER if self._together else _SLOTS):
                event.synchronize()
            elif self._together or not event.query():
                return None
            self._under_way.popleft()
            if not self._view[slot]:
                return sighting
        return None
