"""Stopping together: one process asks, and all learn it at the end of the same window."""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.training.gradients import Ranks
from narrowcast.training.settling import Courier

__all__ = ["Stopping"]


class Stopping:
    """Whether the processes that train together are to stop.

    A wish costs no exchange of its own: it rides with the sum of losses that each window takes over ranks anyway. Where the
    sum is on the host, all know with it. On CUDA nobody waits for it: it is read when the next window has closed, so the
    device has that one's work meanwhile.

    Args:
        device: Where sums are taken.
        ranks: The processes.
    """

    def __init__(self, device: torch.device, ranks: Ranks | None) -> None:
        self._asked = False
        self._agreed = False
        self._ranks = ranks if ranks is not None and ranks.world > 1 else None
        self._courier = Courier(device)
        self._late = device.type == "cuda"
        self._under_way = False

    def ask(self) -> None:
        """Ask all processes to stop."""
        self._asked = True

    @property
    def agreed(self) -> bool:
        """Whether some process asked: on each the same after each window, whichever asked and when."""
        return self._asked if self._ranks is None else self._agreed

    def summed(self, total: Tensor, weight: Tensor | float) -> tuple[Tensor, Tensor | float, int]:
        """Return a window's loss and weight summed over ranks, and how many ranks gradients are the mean of.

        Args:
            total: This rank's loss, 0-d.
            weight: What it weighs; 0-d if it is a tensor.
        """
        if self._ranks is None:
            return total, weight, 1
        own = weight if isinstance(weight, Tensor) else torch.full_like(total, weight)
        wish = torch.full_like(total, float(self._asked))
        sums = self._ranks.sum(torch.stack([total, own.to(total), wish]))
        self._hear(sums[2])
        return sums[0], sums[1], self._ranks.world

    def _hear(self, wishes: Tensor) -> None:
        """Take the sum of all wishes, 0-d."""
        if self._late and self._under_way:
            self._read()
        self._courier.send(wishes.reshape(1))
        self._under_way = True
        if not self._late:
            self._read()

    def _read(self) -> None:
        self._agreed = self._agreed or bool(self._courier.receive() > 0)
