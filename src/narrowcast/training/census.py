"""The census of an update: whether its losses and gradients are finite, and where they broke first, on any rank.

It is one row of numbers, which the ranks bring together on the device where all of them are anyway. Whoever reads the row
later, on the host and perhaps on one rank alone, needs neither the gradients nor the other ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from narrowcast.training.gradients import Broken, Gradients, Ranks

__all__ = ["Census", "Finding", "Origin"]

#: What stands for an infinite norm in a row; infinity stands for NaN there, so that the greatest of all ranks' is the worst.
_INFINITE = torch.finfo(torch.float32).max


class Origin(NamedTuple):
    """Where numbers of an update broke first.

    Args:
        rank: The first rank whose own gradient of the first of the layers, or whose own loss, was not finite; None if only
            the ranks' sum is known.
        layers: Parameters whose gradients are not finite, in the order of the backward pass.
        kind: What the first of them holds.
    """

    rank: int | None
    layers: tuple[str, ...]
    kind: Literal["inf", "nan"]


class Finding(NamedTuple):
    """What a census found.

    Args:
        row: Numbers on the device, the same on all ranks: FP32, 1-d; the last is 0 if everything is finite, and else 1.
        read: Returns where numbers broke, from the row on the host.
    """

    row: Tensor
    read: Callable[[Tensor], Origin]

    @property
    def broken(self) -> Tensor:
        """1 if a loss or a gradient is not finite, on any rank; else 0. On the device: 0-d, FP32."""
        return self.row[-1]

    def origin(self) -> Origin:
        """Return where numbers broke; waits for the device."""
        return self.read(self.row.cpu())


@dataclass(frozen=True)
class Census:
    """Takes the census of one update.

    Args:
        names: All parameters that are trained, in the order of the forward pass.
        loss: This rank's own loss, 0-d.
        ranks: The processes; None if there is one.
        heard: Norms of this rank's own gradients by parameter, 0-d, before those of all ranks came together.
        located: Whether somebody will want to know where numbers broke; else the row tells whether they did.
    """

    names: tuple[str, ...]
    loss: Tensor
    ranks: Ranks | None
    heard: Mapping[str, Tensor]
    located: bool

    @torch.no_grad()
    def take(self, finite: Tensor, gradients: Gradients) -> Finding:
        """Return what norms say of gradients, once they were taken. All ranks must take it.

        Args:
            finite: Whether losses and gradients are, as far as this rank knows; 0-d, bool.
            gradients: After those of all ranks came together.
        """
        row = self._row(finite, [gradients.norms()] if self.located else [])
        return Finding(row, lambda row: self._origin(row, _by_norm(self.names, row[: len(self.names)])))

    @torch.no_grad()
    def counted(self, finite: Tensor, count: Callable[[], tuple[Broken, ...]]) -> Finding:
        """Return what an optimizer found that has measured and counted by itself. All ranks must take it.

        Args:
            finite: Whether losses and gradients are; 0-d, bool.
            count: Returns what is broken, the same on all ranks; it is asked if something is, before the next update.
        """
        return Finding(self._row(finite, []), lambda row: self._origin(row, count()))

    def _row(self, finite: Tensor, norms: list[Tensor]) -> Tensor:
        """Return norms and the own loss (``[sizes]``), the first rank of each (``[names + 1]``), and whether all is finite."""
        parts = [finite.logical_not().float().reshape(1)]
        if self.located:
            loss = self.loss.float().abs().reshape(1)
            sizes = torch.cat([*norms, loss]).nan_to_num(nan=math.inf, posinf=_INFINITE)
            parts = [sizes, *self._places(loss), *parts]
        row = torch.cat(parts)
        return row if self.ranks is None else self.ranks.maximum(row)

    def _places(self, loss: Tensor) -> list[Tensor]:
        """Return the number of this rank, counted from the last one as 1, where its own numbers are not finite; else 0."""
        if self.ranks is None:
            return []
        nothing = torch.zeros_like(loss[0])
        heard = torch.stack([self.heard.get(name, nothing).to(nothing) for name in self.names])
        return [torch.cat([heard, loss]).isfinite().logical_not() * float(self.ranks.world - self.ranks.rank)]

    def _origin(self, row: Tensor, broken: tuple[Broken, ...]) -> Origin:
        layers = tuple(one.name for one in broken)
        places = 0 if self.ranks is None else len(self.names) + 1
        kind = broken[0].kind if broken else _broken("", float(row[-2 - places])).kind
        if self.ranks is None:
            return Origin(0, layers, kind)
        first = row[-1 - places : -1].tolist()
        place = int((first[self.names.index(layers[0])] if layers else 0) or first[-1])
        return Origin(self.ranks.world - place if place else None, layers, kind)


def _by_norm(names: tuple[str, ...], norms: Tensor) -> tuple[Broken, ...]:
    """Return the parameters whose norm in a row is not finite, in the order of the backward pass."""
    found = [_broken(name, size) for name, size in zip(names, norms.tolist(), strict=True) if size >= _INFINITE]
    return tuple(reversed(found))


def _broken(name: str, size: float) -> Broken:
    return Broken(name, int(not math.isinf(size)), int(math.isinf(size)))
