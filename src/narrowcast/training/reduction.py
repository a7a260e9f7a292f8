"""How the gradients of ranks come together, and which rank's were not finite before they did."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from narrowcast.errors import TrainingError
from narrowcast.training import multi_tensor
from narrowcast.training.census import Census
from narrowcast.training.checks import replicas_in, unwrapped
from narrowcast.training.gradients import Ranks

if TYPE_CHECKING:
    from torch.distributed import GradBucket

__all__ = ["Reduction"]

_log = logging.getLogger(__name__)
_AT_ONCE = 1 << 24  # elements that are summed over ranks at once


class Reduction:
    """Brings gradients of ranks together: by PyTorch during the backward pass that closes a window, or afterwards.

    Sharded modules bring them together after each backward pass themselves.

    Args:
        model: The module as it is called.
        parameters: Parameters by name, in the order of the forward pass.
        ranks: The processes that train together; None if there is one.
        guards: Whether updates are left out: then each rank's own norms are taken before gradients are summed.
        afterwards: Whether replicas sum gradients in FP32 when the window has closed, as for BF16 weights.

    Raises:
        TrainingError: A trained parameter is outside of the model that several ranks share.
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
        apart = [name for name in parameters if name.startswith("loss.")]
        if self._ranks is not None and apart:
            raise TrainingError(
                f"parameter {apart[0]} belongs to the loss, whose gradients ranks do not share",
                allowed="several ranks with all trained parameters in the model",
                next_step="make it a part of the module before that is replicated or sharded",
            )
        self._replicas = replicas_in(model) if self._ranks is not None else None
        self._parameters = parameters
        self._names = {id(one): name for name, one in parameters.items()}
        self._afterwards = afterwards
        self._heard: dict[str, Tensor] = {}  # norms by parameter, of the gradients on this rank; 0-d
        if self._ranks is not None and guards:
            if self._replicas is None:
                from narrowcast.training.sharding import listen

                listen(unwrapped(model), lambda names, row: self._hear(names, torch.linalg.vector_norm(row)))
            elif not afterwards:
                self._listen(self._replicas)

    def _listen(self, replicas: DistributedDataParallel) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def heard(bucket: GradBucket) -> None:
            for one, norm in zip(bucket.parameters(), multi_tensor.norms(bucket.gradients()), strict=True):
                self._hear([self._names.get(id(one), "")], norm)

        try:  # a lambda, as annotations that are strings are refused
            replicas.register_comm_hook(
                replicas.process_group, lambda group, bucket: (heard(bucket), allreduce_hook(group, bucket))[1]
            )
        except RuntimeError:  # there is one already
            _log.info("the replicas have a communication hook of their own: the ledger will name no ranks")

    def _hear(self, names: list[str], norm: Tensor) -> None:
        """Note the norm of some parameters' gradients; a window of sharded modules hears of each several times."""
        before = self._heard.get(names[0])
        self._heard |= dict.fromkeys(names, norm if before is None else before + norm)

    def open(self) -> None:
        """Forget what was heard in the window before."""
        self._heard = {}

    @contextmanager
    def unheard(self) -> Generator[None]:
        """Return the context of backward passes that are not the window's."""
        heard, self._heard = self._heard, {}
        try:
            yield
        finally:
            self._heard = heard

    def backward(self, *, last: bool) -> AbstractContextManager[None]:
        """Return the context of a backward pass; gradients of replicas come together in the last one of a window."""
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
        self._heard = dict(zip(self._parameters, multi_tensor.norms(held), strict=True))
        for part in _parts(held):
            flat = torch.cat([one.reshape(-1) for one in part])
            means = (self._ranks.sum(flat) / self._ranks.world).split([one.numel() for one in part])
            multi_tensor.copy_(part, [mean.view_as(one) for mean, one in zip(means, part, strict=True)])

    def census(self, loss: Tensor, *, located: bool) -> Census:
        """Return what takes the census of an update, once gradients have come together.

        Args:
            loss: This rank's own loss, 0-d.
            located: Whether somebody will want to know where numbers broke.
        """
        return Census(tuple(self._parameters), loss, self._ranks, self._heard, located)


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
