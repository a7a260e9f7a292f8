"""What a decision moves, and decisions that the host learns late.

Where the device itself leaves an update out, the host need not wait to learn whether it did: everything that it would do
with the answer (count, schedule, scale, ledger) can wait until the next backward pass needs the loss scale. By then the
next forward pass is queued, so the device is busy while the host asks.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from narrowcast.errors import TrainingError
from narrowcast.training.gradients import Census
from narrowcast.training.ledger import Ledger, Skip
from narrowcast.training.loss_scale import Scale
from narrowcast.training.reduction import Origin, Reduction
from narrowcast.training.window import Decision, Fate

__all__ = ["Books", "Courier", "Settling"]

_log = logging.getLogger(__name__)


class Books:
    """What decisions move: the counts, the schedule, the loss scale and the ledger.

    Args:
        rule: How losses are scaled.
        schedule: A learning-rate schedule, stepped after each update.
        ranked: Whether messages name the rank.
    """

    def __init__(self, rule: Scale, schedule: LRScheduler | None, *, ranked: bool) -> None:
        self.steps = 0
        self.skipped = 0
        self.schedule = schedule
        self.scale = rule.start()
        self.ledger = Ledger()
        self._rule = rule
        self._ranked = ranked

    def count(self) -> None:
        """Enter an update that was made."""
        self.steps += 1
        if self.schedule is not None:
            self.schedule.step()
        self.scale = self._rule.after(self.scale, True)

    def leave_out(self, origin: Origin) -> None:
        """Enter an update that was left out.

        Raises:
            OutputError: The ledger's file cannot be written.
            TrainingError: The scale has no answer left.
        """
        skip = Skip(self.steps, self.steps + self.skipped, origin.rank, origin.layers, origin.kind, self.scale.value)
        self.ledger.add(skip)
        self.skipped += 1
        self.scale = self._rule.after(self.scale, False)
        _log.warning(
            "update %d left out: %s in %s%s; loss scale %g -> %g",
            skip.step,
            skip.kind,
            _place(skip),
            f" on rank {skip.rank}" if self._ranked and skip.rank is not None else "",
            skip.scale,
            self.scale.value,
        )
        self._check_patience(skip)

    def _check_patience(self, skip: Skip) -> None:
        patience = self._rule.patience
        if self.scale.stuck < patience:
            return
        layer = skip.layers[0].rpartition(".")[0] if skip.layers else "LAYER"
        raise TrainingError(
            f"{patience} updates in a row were left out at loss scale {skip.scale:g}, which falls no further "
            f"({skip.kind} in {_place(skip)}, step {skip.step})",
            next_step="check the data for NaN, lower the learning rate, set clip_norm, keep that layer in FP32 with "
            f"overrides={{{layer!r}: 'fp32'}}, or use bf16-mixed",
        )


class Settling:
    """Holds the one decision that the host may not know yet.

    Args:
        books: What the decision will be entered in.
        reduction: Knows where numbers broke.
        device: Where decisions are made.
        parameters: How many there are.
    """

    def __init__(self, books: Books, reduction: Reduction, device: torch.device, parameters: int) -> None:
        self._books = books
        self._reduction = reduction
        self._courier = Courier(device, parameters + 2)
        self._pending: tuple[Decision, Census] | None = None

    @property
    def under_way(self) -> int:
        """How many decisions the host does not know: 0 or 1."""
        return self._pending is not None

    def later(self, census: Census, loss: Tensor, finite: Tensor) -> Decision:
        """Return a decision that is on its way to the host; the one before must be settled.

        Args:
            census: What tells where numbers broke.
            loss: This rank's own loss, 0-d.
            finite: Whether the update was made, 0-d, bool.
        """
        assert self._pending is None
        self._courier.send(torch.cat([census.row, torch.stack([loss.float(), finite.float()])]))
        decision = Decision(ask=self.settled)
        self._pending = decision, census
        return decision

    def settled(self) -> Books:
        """Return the books with every decision in them; waits for the device if one is on its way.

        Raises:
            OutputError: The ledger's file cannot be written.
            TrainingError: An update was left out, and the scale has no answer left.
        """
        if self._pending is None:
            return self._books
        decision, census = self._pending
        row = self._courier.receive()
        rest, loss, finite = row[:-2], row[-2], bool(row[-1])
        self._pending = None
        decision.settle(Fate.of(self._books.steps, updated=finite))
        if finite:
            self._books.count()
        else:
            self._books.leave_out(self._reduction.origin(census.broken(rest), loss))
        return self._books


class Courier:
    """Brings one row of numbers at a time from a device to the host, which waits when it asks for it.

    Args:
        device: Where rows come from.
        longest: How many numbers a row has at most.
    """

    def __init__(self, device: torch.device, longest: int) -> None:
        self._device = device
        self._host = torch.empty(longest, pin_memory=device.type == "cuda")
        self._row = self._host[:0]
        self._arrival: torch.cuda.Event | None = None

    def send(self, row: Tensor) -> None:
        """Start to copy a row (1-d, FP32) to the host; the row before it is lost."""
        self._row = self._host[: len(row)]
        self._row.copy_(row, non_blocking=True)
        if self._device.type == "cuda":
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(self._device))

    def receive(self) -> Tensor:
        """Return the row that was sent last; it is on the host, and there until the next is sent."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._row


def _place(skip: Skip) -> str:
    return f"the gradient of {skip.layers[0]}" if skip.layers else "the loss"
