"""How the gradients of ranks come together, and which rank's were not finite before they did."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from narrowcast.errors import TrainingError
from narrowcast.training import multi_tensor
from narrowcast.training.checks import replicas_in, unwrapped
from narrowcast.training.gradients import Broken, Ranks

if TYPE_CHECKING:
    from torch.distributed import GradBucket

__all__ = ["Origin", "Reduction"]

_log = logging.getLogger(__name__)
_AT_ONCE = 1 << 24  # elements that are summed over ranks at once


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
        self._heard: list[tuple[list[str], Tensor]] = []  # parameters, and the norm of their gradients on this rank
        if self._ranks is not None and guards:
            if self._replicas is None:
                from narrowcast.training.sharding import listen

                listen(unwrapped(model), lambda names, row: self._heard.append((names, torch.linalg.vector_norm(row))))
            elif not afterwards:
                self._listen(self._replicas)

    def _listen(self, replicas: DistributedDataParallel) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def heard(bucket: GradBucket) -> None:
            norms = multi_tensor.norms(bucket.gradients())
            names = [self._names.get(id(one), "") for one in bucket.parameters()]
            self._heard.extend(([name], norm) for name, norm in zip(names, norms, strict=True))

        try:  # a lambda, as annotations that are strings are refused
            replicas.register_comm_hook(
                replicas.process_group, lambda group, bucket: (heard(bucket), allreduce_hook(group, bucket))[1]
            )
        except RuntimeError:  # there is one already
            _log.info("the replicas have a communication hook of their own: the ledger will name no ranks")

    def open(self) -> None:
        """Forget what was heard in the window before."""
        self._heard = []

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
        self._heard += [([name], norm) for name, norm in zip(self._parameters, multi_tensor.norms(held), strict=True)]
        for part in _parts(held):
            flat = torch.cat([one.reshape(-1) for one in part])
            means = (self._ranks.sum(flat) / self._ranks.world).split([one.numel() for one in part])
            multi_tensor.copy_(part, [mean.view_as(one) for mean, one in zip(means, part, strict=True)])

    def origin(self, broken: tuple[Broken, ...], loss: Tensor) -> Origin:
        """Return where numbers broke first. All ranks must ask, and all get the same answer.

        Args:
            broken: What is broken on this rank after gradients came together, in the order of the backward pass.
            loss: This rank's own loss.
        """
        if self._ranks is not None:
            broken = self._on_all(broken, self._ranks, loss.device)
        kind = broken[0].kind if broken else "nan" if loss.isnan() else "inf"
        layers = tuple(one.name for one in broken)
        if self._ranks is None:
            return Origin(0, layers, kind)
        heard = any(layers[0] in names and not norm.isfinite() for names, norm in self._heard) if layers else False
        said = torch.zeros(2, self._ranks.world, device=loss.device)
        said[:, self._ranks.rank] = torch.tensor([heard, not loss.isfinite()])
        by_gradient, by_loss = self._ranks.sum(said).tolist()
        ranks = [rank for found in (by_gradient, by_loss) for rank, one in enumerate(found) if one]
        return Origin(ranks[0] if ranks else None, layers, kind)

    def _on_all(self, broken: tuple[Broken, ...], ranks: Ranks, device: torch.device) -> tuple[Broken, ...]:
        """Return what is broken on any rank: each has seen its own parts of sharded gradients."""
        found = {one.name: (max(one.inf, int(not one.nan)), one.nan) for one in broken}
        counts = torch.tensor([found.get(name, (0, 0)) for name in self._parameters], dtype=torch.float64)
        summed = ranks.sum(counts.to(device)).tolist()
        named = [
            Broken(name, int(inf), int(nan))
            for name, (inf, nan) in zip(self._parameters, summed, strict=True)
            if inf or nan
        ]
        return tuple(reversed(named))


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
