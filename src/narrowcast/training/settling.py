"""What a decision moves, and decisions that the host learns late.

Where the device itself leaves an update out, the host need not wait to learn whether it did: everything that it would do
with the answer (count, schedule, scale, ledger) can wait until the next backward pass needs the loss scale. By then the
next forward pass is queued, so the device is busy while the host asks.

What the host gets is the same on all ranks and whole: each rank may ask when it likes, and none needs the others for it.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from narrowcast.errors import TrainingError, UserError
from narrowcast.training.census import Finding, Origin
from narrowcast.training.ledger import Ledger, Skip
from narrowcast.training.loss_scale import Scale
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
        self.ledger.add(skip)  # last: a file that cannot be written changes nothing of what the ranks decided together
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
        device: Where decisions are made.
    """

    def __init__(self, books: Books, device: torch.device) -> None:
        self._books = books
        self._courier = Courier(device)
        self._pending: tuple[Decision, Finding] | None = None
        self._error: UserError | None = None

    @property
    def under_way(self) -> int:
        """How many decisions the host does not know: 0 or 1."""
        return self._pending is not None

    @property
    def decision(self) -> Decision:
        """The decision that is under way."""
        assert self._pending is not None
        return self._pending[0]

    def later(self, finding: Finding) -> None:
        """Send on its way to the host what a decision follows from; the one before must be settled."""
        assert self._pending is None
        self._courier.send(finding.row)
        self._pending = Decision(ask=self.settled), finding

    def forget(self) -> None:
        """Drop the decision that is under way: the update that it was about has failed."""
        self._pending = None

    def settled(self) -> Books:
        """Return the books with every decision in them; waits for the device if one is on its way."""
        if self._pending is None:
            return self._books
        decision, finding = self._pending
        row = self._courier.receive()
        self._pending = None
        made = not row[-1]
        decision.settle(Fate.of(self._books.steps, updated=made))
        try:
            if made:
                self._books.count()
            else:
                self._books.leave_out(finding.read(row))
        except UserError as error:
            self._error = error
        return self._books

    def check(self) -> None:
        """Raise what a decision led to; all ranks check at the same places, whichever of them asked before.

        Raises:
            OutputError: The ledger's file cannot be written.
            TrainingError: An update was left out, and the scale has no answer left.
        """
        error, self._error = self._error, None
        if error is not None:
            raise error


class Courier:
    """Brings one row of numbers at a time from a device to the host, which waits when it asks for it.

    Args:
        device: Where rows come from.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.empty(0, dtype=torch.float32, device="cpu")
        self._row = self._host
        self._arrival: torch.cuda.Event | None = None

    def send(self, row: Tensor) -> None:
        """Start to copy a row (1-d, FP32) to the host; the row before it is lost."""
        if len(row) > len(self._host):
            pinned = self._device.type == "cuda"
            self._host = torch.empty(len(row), dtype=torch.float32, device="cpu", pin_memory=pinned)
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
