"""The training step, for loops of one's own: forward, backward, one decision, one update.

A step takes one micro-batch; each ``accumulate``-th closes a window and updates the weights by the gradient of the
window's mean loss, whatever its micro-batches weigh.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from narrowcast.errors import TrainingError
from narrowcast.training.census import Finding
from narrowcast.training.checks import (
    check_rounding,
    check_settings,
    check_unchanged,
    check_weight,
    check_weights,
    moved_by,
    not_finite,
    trained_parameters,
    unwrapped,
)
from narrowcast.training.doctor.exchange import ranks as processes
from narrowcast.training.doctor.watch import Watch as Doctor
from narrowcast.training.gradients import FusedUpdate, Gradients, Ranks
from narrowcast.training.keeping import Keeping
from narrowcast.training.ledger import Ledger
from narrowcast.training.lookout import Lookout, Sighting
from narrowcast.training.policies import Precision
from narrowcast.training.policies import precision as policy_of
from narrowcast.training.reduction import Reduction
from narrowcast.training.rounding import WideUpdate, accumulate_in_fp32
from narrowcast.training.settling import Books, Settling
from narrowcast.training.stopping import Stopping
from narrowcast.training.updates import at_once, never, update_for
from narrowcast.training.watching import BrokenStep, Watch
from narrowcast.training.weighing import Unit
from narrowcast.training.window import (
    Batch,
    Decision,
    Fate,
    Loss,
    StepInfo,
    Window,
    as_batch,
    as_loss,
    outputs_of,
    samples_in,
)

__all__ = ["Loss", "StepInfo", "Trainer", "Watch"]

_log = logging.getLogger(__name__)


class Trainer:
    """Trains a module, step by step.

    A mean loss counts by the length of the first axis of its inputs; a :class:`Loss` by its weight. With loss scaling an
    update whose losses or gradients are not finite is left out on all ranks: neither the weights nor the schedule nor
    ``steps`` move, and the skip is in the step's info, in the log and in ``ledger``.

    Without loss scaling no step waits for the device. With it an update waits once, for the decision; but with fused
    optimizers, PyTorch's and :class:`~narrowcast.training.fused.FusedAdamW`, the device leaves updates out itself. The host
    learns of it just before the next backward pass, when a forward pass is queued, and a watch just after that backward
    pass. Only then do the schedule and the log move. What is read of the trainer or of a step's info is right at any time,
    on each rank by itself, and is waited for; ``steps_at_most`` and ``StepInfo.closed`` alone are not. That training cannot
    go on is raised by the next step, ``flush``, ``discard``, ``finish`` or ``state_dict``, on all ranks; a step that raises
    it has dropped its micro-batch.

    Args:
        model: Any module, compiled or not; it is cast or converted in place where the precision asks for it.
        optimizer: Any optimizer of PyTorch's kind that needs no closure, over the model's parameters (and the loss's, if it
            is a module). Fused ones unscale and clip within their step.
        loss: From outputs and targets to a mean over the batch (0-d), or to a :class:`Loss`.
        precision: A policy or its name.
        schedule: A learning-rate schedule, stepped after each update.
        clip_norm: The largest norm of all gradients together, after unscaling.
        accumulate: Micro-batches in a window.
        watch: What looks at the numbers: ``cheap`` or ``deep`` for the doctor at that level, which keeps its record in memory
            (``trainer.watch.summary()``, which has the last update after ``finish``) and tells the log what it finds; None
            for nothing. In a process group of several that ``ranks`` does not name, the doctor stays away, as it has to ask
            all processes.
        ranks: The processes that train together; each must run the same number of steps.
        nonfinite: Without loss scaling: ``raise`` an error when a loss or a gradient is not finite (on CUDA an update or
            more later, as nothing waits for it), or ``skip`` the update, as with loss scaling.

    Raises:
        TrainingError: What is given does not go together.
        DeviceError: The device does not compute in the precision.
        FormatError: The precision is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[Any, Any], Tensor | Loss],
        *,
        precision: str | Precision = "fp32",
        schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
        clip_norm: float | None = None,
        accumulate: int = 1,
        watch: Watch | Literal["cheap", "deep"] | None = "cheap",
        ranks: Ranks | None = None,
        nonfinite: Literal["raise", "skip"] = "raise",
    ) -> None:
        check_settings(optimizer, schedule, clip_norm=clip_norm, accumulate=accumulate, nonfinite=nonfinite)
        self.precision = policy_of(precision)
        self._parameters = trained_parameters(model, loss, optimizer)
        self.device = next(iter(self._parameters.values())).device
        self.precision.check(self.device)
        if self.precision.parameters == "fp32":
            check_weights(self._parameters, self.precision.name)
        self.model = self.precision.prepare(model)
        self._optimizer = optimizer
        self._moved = moved_by(optimizer)
        self.loss = loss
        self.clip_norm = clip_norm
        self.accumulate = accumulate
        self.ranks = ranks
        self._watch = watch if not isinstance(watch, str) else self._doctor(watch)
        self._guards = self.precision.scale.guards or nonfinite == "skip"
        self._decides = self._guards or self.device.type == "cpu"  # on the CPU nothing is waited for
        self._unit = Unit(self.device, ranks)
        self._window = Window()
        self._closed_at: float | None = None
        #: Whether all ranks are to stop between two windows: ``stopping.ask()`` on one, ``stopping.agreed`` on all.
        self.stopping = Stopping(self.device, ranks)
        fused = isinstance(optimizer, FusedUpdate)
        if fused and self.precision.parameters == "bf16":
            check_rounding(optimizer, self.precision.update)
        self._wide = WideUpdate(() if fused else self._parameters.values(), self.precision.update)
        if accumulate > 1 or not fused:
            accumulate_in_fp32(self._parameters.values())
        self._reduction = Reduction(
            self.model, self._parameters, ranks, guards=self._guards, afterwards=self.precision.parameters == "bf16"
        )
        self._update = update_for(optimizer, clip_norm, ranks, self._before_update)
        several = ranks is not None and ranks.world > 1
        looks_out = self.device.type == "cuda" and not self._guards
        self._lookout = Lookout(self.device, together=several) if looks_out else None
        self._books = Books(self.precision.scale, schedule, ranked=ranks is not None)  # without a decision under way
        self._settling = Settling(self._books, self.device)
        self._settles_late = self._guards and self.device.type == "cuda"
        self._keeping = Keeping(self.model, optimizer, self.precision, self._books, self._wide, self._unit)
        self._untold: tuple[StepInfo, Window] | None = None  # the last update, until the watch has heard of it

    def _doctor(self, level: Literal["cheap", "deep"]) -> Watch | None:
        """Return the doctor, unless it would ask processes that do not train together."""
        together, rank = (1, 0) if self.ranks is None else (self.ranks.world, self.ranks.rank)
        if processes() not in (1, together):
            _log.info("no doctor: the process group has %d members, and the trainer's ranks %d", processes(), together)
            return None
        model, optimizer, policy = unwrapped(self.model), self._optimizer, self.precision
        return Doctor(model, level, optimizer=optimizer, loss=self.loss, precision=policy, rank=rank)

    @property
    def watch(self) -> Watch | None:
        """What looks at the numbers.

        Of the last update it may hear no sooner than in the next step or by :meth:`finish`. Another one takes its place
        between two windows, on all ranks at the same place; it hears of the updates that come then.
        """
        return self._watch

    @watch.setter
    def watch(self, watch: Watch | None) -> None:
        self._settling.settled()
        self._tell()  # the watch that was there
        self._watch = watch

    @property
    def steps(self) -> int:
        """Updates done so far."""
        return self._settling.settled().steps

    @property
    def steps_at_most(self) -> int:
        """Updates done so far, with the last one if it is not known yet whether it was made; waits for nothing."""
        return self._books.steps + self._settling.under_way

    @property
    def skipped(self) -> int:
        """Updates left out so far."""
        return self._settling.settled().skipped

    @property
    def scale(self) -> float:
        """What the losses of the window at hand are multiplied with."""
        return self._settling.settled().scale.value

    @property
    def ledger(self) -> Ledger:
        """The updates left out so far; of many, the latest."""
        return self._settling.settled().ledger

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, with the learning rate of the next update."""
        self._settling.settled()
        return self._optimizer

    @property
    def schedule(self) -> torch.optim.lr_scheduler.LRScheduler | None:
        """The learning-rate schedule, stepped after each update."""
        return self._settling.settled().schedule

    @schedule.setter
    def schedule(self, schedule: torch.optim.lr_scheduler.LRScheduler | None) -> None:
        self._settling.settled().schedule = schedule

    def step(self, batch: Batch) -> StepInfo:
        """Run one micro-batch; each ``accumulate``-th updates the weights.

        Args:
            batch: Inputs and targets. Inputs are a tensor, a tuple (arguments) or a dict (arguments by name).

        Raises:
            TrainingError: The batch or the loss cannot be used, or training cannot go on.
        """
        inputs, targets = as_batch(batch)
        self._look_out()
        last = self._window.count + 1 == self.accumulate
        if not self._window.count:
            self._reduction.open()  # what replays between two windows said of gradients is not this one's
        if self._watch is not None:
            self._watch.before_forward(self.steps_at_most, batch)
        samples = samples_in(inputs)
        with self._reduction.backward(last=last), self.precision.running(self.device):
            with self.precision.autocast(self.device):
                value = self.loss(outputs_of(self.model, self.precision.inputs(inputs)), targets)
            loss, weighed, mean = as_loss(value, samples)
            total, weight = self._unit.share(loss, weighed, mean)
            books = self._settling.settled()  # waits for the update before, with this forward pass queued
            factor = books.scale.value / self.accumulate
            (total if factor == 1.0 else total * factor).backward()
        self._conclude()
        if self._watch is not None:
            self._window.batches.append((batch, loss.detach()))
            self._watch.after_backward(self.model, self.scale)
        self._window.add(total, weight, weighed, samples)
        if last:
            return self._close(early=False)
        return self._info(self._window.total, self._window.weight, Decision(Fate(self._books.steps)))

    def flush(self) -> StepInfo | None:
        """Close a window that holds fewer micro-batches than the others, normalised by what it holds; None if it is empty.

        With several ranks all must flush, with the same number of micro-batches.
        """
        self._conclude()
        return self._close(early=True) if self._window.count else None

    def discard(self) -> None:
        """Drop the micro-batches of a window that has not closed."""
        self._conclude()
        self._open()
        self._closed_at = time.perf_counter()

    def finish(self) -> None:
        """Wait until it is known of all updates so far whether they were finite.

        Raises:
            TrainingError: One was not, and training cannot go on.
        """
        self._conclude()
        self._look_out(wait=True)

    def _conclude(self) -> None:
        """Have the last update settled, tell the watch of it, and raise what it led to; all ranks call it at the same places.

        The watch goes first, as it may run the step again on all ranks together, and one of them alone may have something to
        raise: rank 0, which writes the ledger. What is raised drops the micro-batch that has begun.
        """
        self._settling.settled()
        self._tell()
        try:
            self._settling.check()
        except BaseException:
            self._open()
            raise

    def _tell(self) -> None:
        """Tell the watch what became of the last update, if the device decided; the weights have not moved since.

        Gradients of the next window's first micro-batch may be there already, which the window does not count yet. A watch
        that fails takes them with it.
        """
        if self._untold is None:
            return
        (info, window), self._untold = self._untold, None
        try:
            with self._reduction.unheard():
                if self._watch is not None and info.updated:
                    self._watch.after_update(self.model, info)
                elif self._watch is not None:
                    self._show_broken(self._watch, window.first_broken(), info.scale, info.step)
        except BaseException:
            self._open()
            raise

    def _close(self, *, early: bool) -> StepInfo:
        """Decide, and update the weights or leave the update out."""
        window = self._window
        assert window.total is not None
        check_unchanged(self._optimizer, self._moved)
        if self.ranks is None or self.ranks.world == 1:
            check_weight(window.weight)
        self._reduction.close(early=early)
        loss, weight, world = self.stopping.summed(window.total, window.weight)
        if world > 1 and self.device.type == "cpu":  # all raise or none does; elsewhere it would be waited for
            check_weight(float(weight))
        if self._guards:
            self._unit.closed(weight, window.count)
        factor = self.accumulate * world / (weight * self._books.scale.value)
        asked = self._watch is not None and self.precision.parameters == "bf16"  # by what the weights should have moved
        late = self._settles_late and self._update.leaves_out() and not asked
        decide = self._settling.later if late else at_once if self._decides else never
        census = self._reduction.census(window.total, located=self._decides)
        try:
            with self._wide.widened(self._books.steps):
                gradients = Gradients(self._parameters, self.device)
                norm, finding, finite = self._update(gradients, factor, loss, census, decide)
        except BaseException:
            self._settling.forget()
            raise
        if late:
            info = self._info(loss, weight, self._settling.decision, norm=norm)
            if self._watch is not None:
                self._untold = info, self._window
            self._open()
        else:
            fate = Fate.of(self._books.steps, updated=finite is not False)
            info = self._info(loss, weight, Decision(fate), norm=norm)
            if fate.updated:
                self._made(finding, info)
            else:
                self._left_out(finding)
        self._closed_at = time.perf_counter()
        return info

    def _made(self, finding: Finding, info: StepInfo) -> None:
        """Enter an update that was made, and open the next window."""
        if self._lookout is not None:
            batches = self._window.batches
            self._lookout.send(finding.broken == 0, Sighting(self._books.steps, batches[-1][0] if batches else None))
        self._books.count()
        try:
            if self._watch is not None:
                self._watch.after_update(self.model, info)
        finally:
            self._open()

    def _left_out(self, finding: Finding) -> None:
        """Say where the numbers broke, and open the next window with what the scale makes of it.

        Raises:
            TrainingError: Without loss scaling, unless told to skip; or when a scale has no answer left.
        """
        origin = finding.origin()
        try:
            if self._watch is not None:
                self._show_broken(self._watch, self._window.first_broken(), self._books.scale.value, self._books.steps)
        finally:
            if self._guards:
                self._open()
                self._books.leave_out(origin)
        if not self._guards:
            where = "" if self.ranks is None or origin.rank is None else f" on rank {origin.rank}"
            layer = f"; the first in the backward pass is {origin.layers[0]}" if origin.layers else ""
            raise not_finite(self._books.steps, self.precision.name, where + layer)

    def _show_broken(self, watch: Watch, batch: Batch | None, scale: float, step: int) -> None:
        """Show a watch the first broken micro-batch of a window, if it is known."""
        if batch is not None:
            factor = scale / self.accumulate
            watch.on_nonfinite(BrokenStep(self.model, self.loss, batch, self.precision, scale, factor, step))

    def _before_update(self, left_out: Tensor | None) -> None:
        self._wide.begin(left_out)
        if self._watch is not None:
            self._watch.before_update(self.model)

    def _look_out(self, *, wait: bool = False) -> None:
        seen = self._lookout.arrived(wait=wait) if self._lookout is not None else None
        if seen is None:
            return
        if self._watch is not None:
            self._show_broken(self._watch, seen.batch, self._books.scale.value, seen.step)
        raise not_finite(seen.step, self.precision.name)

    def _open(self) -> None:
        """Open the next window."""
        self._optimizer.zero_grad(set_to_none=True)
        self._reduction.open()
        self._window = Window()

    def _info(
        self, loss: Tensor | None, weight: Tensor | float, decision: Decision, *, norm: Tensor | None = None
    ) -> StepInfo:
        assert loss is not None
        return StepInfo(
            decision=decision,
            scale=self._books.scale.value,
            seconds=None if self._closed_at is None else time.perf_counter() - self._closed_at,
            samples=self._window.samples,
            weighed=self._window.weighed,
            mean_loss=loss if isinstance(weight, float) and weight == 1.0 else loss / weight,
            norm=norm,
            rate=self._rate(),
        )

    def _rate(self) -> Tensor | float:
        rate = self._optimizer.param_groups[0]["lr"]
        return rate.clone() if isinstance(rate, Tensor) else rate  # a schedule changes tensors in place

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, but the data and the global random states.

        It refers to the tensors that training goes on with: write or copy them before the next step.

        Raises:
            TrainingError: A window has not closed, or an update so far was not finite.
        """
        self.finish()
        if self._window.count:
            raise TrainingError(
                f"a window of {self.accumulate} micro-batches holds {self._window.count}, whose gradients no state holds",
                next_step="call flush() to update with them, or discard() to drop them, before state_dict()",
            )
        return self._keeping.state(self.loss)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned, bit for bit.

        Raises:
            TrainingError: It was saved in another precision or by an earlier version, or a schedule is missing on one side.
        """
        self._settling.settled()
        self._keeping.check(state)
        self.discard()
        self._keeping.load(state, self.loss)
