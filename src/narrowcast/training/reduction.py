"""How the gradients of ranks come together, and which rank's were not finite before they did."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from narrowcast.training import multi_tensor
from narrowcast.training.gradients import Broken, Ranks

__all__ = ["Reduction"]

_log = logging.getLogger(__name__)
_AT_ONCE = 1 << 24  # elements that are summed over ranks at once


class Reduction:
    """Brings gradients of ranks together once in a window: by DistributedDataParallel during backward, or afterwards.

    Args:
        model: The module as it is called; sharded modules bring their gradients together themselves.
        parameters: Parameters by name, in the order of the forward pass.
        ranks: The processes that train together; None if there is one.
        guards: Whether updates are left out; then each rank's own norms are taken before they are summed.
        afterwards: Whether gradients are summed in FP32 when the window closes, as for BF16 weights.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        ranks: Ranks | None,
        *,
        guards: bool,
        afterwards: bool,
    ) -> None:
        self._ranks = ranks if ranks is not None and ranks.world > 1 else None
        self._replicas = model if self._ranks is not None and isinstance(model, DistributedDataParallel) else None
        self._parameters = parameters
        self._places = {id(one): place for place, one in enumerate(reversed(list(parameters.values())))}
        self._afterwards = afterwards
        self._own: list[tuple[list[int], tuple[Tensor, ...]]] = []
        if self._replicas is not None and guards and not afterwards:
            self._listen(self._replicas)

    def _listen(self, replicas: DistributedDataParallel) -> None:
        from torch.distributed import GradBucket
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def hook(state: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
            places = [self._places.get(id(one), len(self._places)) for one in bucket.parameters()]
            self._own.append((places, multi_tensor.norms(bucket.gradients())))
            return allreduce_hook(state, bucket)

        try:
            replicas.register_comm_hook(replicas.process_group, hook)
        except RuntimeError:  # there is one already
            _log.info("the replicas have a communication hook of their own: the ledger will name no ranks")

    def backward(self, *, last: bool) -> AbstractContextManager[None]:
        """Return the context of a backward pass, of which the last in a window brings gradients together."""
        self._own = []
        if self._replicas is None or (last and not self._afterwards):
            return nullcontext()
        return self._replicas.no_sync()

    @torch.no_grad()
    def close(self, *, early: bool) -> None:
        """Bring gradients together that the backward passes did not.

        Args:
            early: Whether the window closes before its last micro-batch.
        """
        if self._replicas is None or self._ranks is None or not (early or self._afterwards):
            return
        held: list[Tensor] = []
        for one in self._parameters.values():
            if one.grad is None:  # it may have one on another rank
                one.grad = torch.zeros_like(one, dtype=one.grad_dtype)
            held.append(one.grad)
        for part in _parts(held):
            flat = torch.cat([one.reshape(-1) for one in part])
            means = (self._ranks.sum(flat) / self._ranks.world).split([one.numel() for one in part])
            multi_tensor.copy_(part, [mean.view_as(one) for mean, one in zip(means, part, strict=True)])

    def first(self, broken: tuple[Broken, ...], loss: Tensor) -> tuple[int | None, tuple[Broken, ...]]:
        """Return the first rank whose own numbers were not finite, and what is broken, with that rank's first ahead.

        Args:
            broken: What is broken after gradients came together, in the order of the backward pass.
            loss: This rank's own loss.
        """
        if self._ranks is None:
            return 0, broken
        nowhere = len(self._places) + 1
        place = min(
            (at for places, norms in self._own for at, norm in zip(places, norms, strict=True) if not norm.isfinite()),
            default=nowhere,
        )
        if not loss.isfinite():
            place = min(place, 0)
        mine = torch.zeros(self._ranks.world, device=loss.device)
        mine[self._ranks.rank] = place
        everyone = self._ranks.sum(mine).tolist()
        least = min(everyone)
        if least == nowhere:
            return None, broken
        names = list(reversed(list(self._parameters)))
        ahead = names[int(least)] if least < len(names) else ""
        return everyone.index(least), tuple(sorted(broken, key=lambda one: one.name != ahead))


def _parts(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Return tensors in groups of one dtype and a bounded size."""
    parts: list[list[Tensor]] = []
    size = 0
    for one in tensors:
        if not parts or size + one.numel() > _AT_ONCE or parts[-1][0].dtype != one.dtype:
            parts.append([])
            size = 0
        parts[-1].append(one)
        size += one.numel()
    return parts
