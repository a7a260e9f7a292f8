"""The unit that losses are weighed in, so that sums of them are as large as means.

Losses of a window are summed by what they weigh: samples or tokens that count. A sum over 4,000 tokens, and its gradients,
are 4,000 times as large as a mean, which no loss scale of FP16 is meant for. So they are summed in units of what a
micro-batch weighs: at first the first one of the run, and what all so far weighed on average once that is off by more than
a factor of two. The unit falls out of the update; with micro-batches that weigh alike it stays, and not a bit is lost to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from narrowcast.training.checks import check_weight
from narrowcast.training.gradients import Ranks

__all__ = ["Unit"]

_APART = 2.0  # factor between the unit and the average beyond which the unit moves


class Unit:
    """What a micro-batch weighs; the same on all ranks. Only the first weight of a run is read by the host.

    Args:
        device: Where losses are computed.
        ranks: The processes that train together.
    """

    def __init__(self, device: torch.device, ranks: Ranks | None) -> None:
        self._device = device
        self._ranks = ranks if ranks is not None and ranks.world > 1 else None
        self._value: Tensor | float | None = None
        self._weight: Tensor | float = 0.0  # of all windows so far, over all ranks
        self._batches = 0  # their micro-batches, over all ranks

    def share(self, loss: Tensor, weight: Tensor | float, mean: bool) -> tuple[Tensor, Tensor | float]:
        """Return a micro-batch's loss as a sum, and its weight, both in units.

        Args:
            loss: 0-d; a sum, or a mean.
            weight: What it is over.
            mean: Whether it is a mean.
        """
        if self._value is None:
            first = self._first(weight)
            if first == 0:
                return loss * weight if mean else loss, weight  # nothing, in any unit
            check_weight(first)
            self._value = first
        share = weight / self._value
        factor = share if mean else 1 / self._value
        return loss if isinstance(factor, float) and factor == 1.0 else loss * factor, share

    def closed(self, weight: Tensor | float, batches: int) -> None:
        """Take note of a window; the next may be weighed in another unit.

        Args:
            weight: Of the window, over all ranks, in units.
            batches: Micro-batches of it on this rank.
        """
        if self._value is None:
            return
        self._batches += batches * (1 if self._ranks is None else self._ranks.world)
        self._weight = self._weight + weight * self._value
        average = self._weight / self._batches
        ratio = average / self._value
        if isinstance(ratio, Tensor):  # on the device, which is not waited for
            self._value = torch.where((ratio > _APART) | (ratio * _APART < 1), average, self._value)
        elif ratio > _APART or ratio * _APART < 1:
            self._value = average

    def _first(self, weight: Tensor | float) -> float:
        if self._ranks is None:
            return float(weight)
        own = torch.as_tensor(weight, dtype=torch.float32, device=self._device)
        return float(self._ranks.sum(own) / self._ranks.world)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next window depends on: tensors where it is known on the device alone."""
        return {"value": self._value, "weight": self._weight, "batches": self._batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._value, self._weight = self._placed(state["value"]), self._placed(state["weight"])
        self._batches = state["batches"]

    def _placed(self, number: Any) -> Any:
        return number.to(self._device) if isinstance(number, Tensor) else number
