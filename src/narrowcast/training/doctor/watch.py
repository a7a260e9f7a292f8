"""The doctor beside a training run: it counts, remembers, and when numbers break it looks for the cause.

The cheap level touches one layer at every fourth update (at most 2**18 numbers of each of its parameters' gradients, weights
and updates), and reads loss and norm when they have arrived: it installs no hooks, so compiled models train as without it.
The deep level adds, at every ``every``-th update, all activations and their gradients and all casts that saturate; parts that
are compiled run uncompiled in that one step, since what was compiled before does not call hooks that come later.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from narrowcast.errors import TrainingError
from narrowcast.training.doctor import record
from narrowcast.training.doctor.diagnosis import Diagnosis
from narrowcast.training.doctor.exchange import ranks
from narrowcast.training.doctor.histories import Histories, format_advice, scale_advice, shifted
from narrowcast.training.doctor.record import Event, Layer, Part, Reading, Record, Setting, Summary
from narrowcast.training.doctor.replay import Scene
from narrowcast.training.doctor.sampling import Mailbox, Sampler, compiled
from narrowcast.training.doctor.verdict import verdict
from narrowcast.training.doctor.whatif import element
from narrowcast.training.policies import Precision
from narrowcast.training.policies import precision as policy_of
from narrowcast.training.random_state import random_state
from narrowcast.training.trainer import Trainer
from narrowcast.training.window import StepInfo

__all__ = ["Watch"]

_log = logging.getLogger(__name__)
_STRIDE = 4  # updates from one layer's cheap sample to the next layer's
_REMEMBERED = 64  # micro-batches whose random states are kept
_WRITES = 10  # flushes from one write of the histograms to the next


class Watch:
    """Watches the numbers of a run; :class:`narrowcast.training.Trainer` calls it, or a loop of one's own does.

    Args:
        model: What is trained.
        level: ``cheap`` or ``deep``.
        every: Updates from one deep sample (or one write of cheap ones) to the next.
        formats: Formats that the report asks about.
        optimizer: What trains it; without it, stagnation is seen and not explained.
        loss: As the trainer takes it; without it, vanished gradients and saturation are seen and not explained.
        precision: The policy, or its name.
        folder: Where the record goes, ``RUN_DIR/doctor``; rank 0 alone writes. None keeps it in memory.
        rank: Number of this process.

    Raises:
        TrainingError: An unknown level, or an interval below 1.
        FormatError: An unknown format, or a block format.
    """

    def __init__(
        self,
        model: nn.Module,
        level: Literal["cheap", "deep"] = "cheap",
        *,
        every: int = 50,
        formats: Sequence[str] = ("fp16", "bf16", "e4m3fn", "e5m2"),
        optimizer: torch.optim.Optimizer | None = None,
        loss: Callable[[Any, Any], Any] | None = None,
        precision: str | Precision = "fp32",
        folder: Path | None = None,
        rank: int = 0,
    ) -> None:
        if level not in ("cheap", "deep"):
            raise TrainingError(f"doctor level {level!r} is unknown", allowed="cheap, deep")
        if every < 1:
            raise TrainingError(f"the doctor samples every {every} updates", allowed="a whole number of 1 or more")
        self.events: list[Event] = []
        self._model = model
        self._deep = level == "deep"
        self._every = every
        self._formats = tuple(element(name).name for name in formats)
        self._loss = loss
        self._precision = policy_of(precision)
        self._folder = folder if rank == 0 else None
        self._rank = rank
        self._diagnosis = Diagnosis(self._precision, optimizer, rank)
        self._sampler = Sampler(model)
        self._mail = Mailbox(self._sampler.device)
        self._trained = [number for number, one in enumerate(self._sampler.targets) if one.parameters]
        self._histories = Histories()
        self._readings: list[Reading] = []
        self._unwritten: list[Reading | Event] = []
        self._states: deque[tuple[int, Any]] = deque(maxlen=_REMEMBERED)
        self._batch: Any = None
        self._chosen: list[int] = []
        self._micro = self._turn = self._flushes = 0
        self._step = -1
        self._updates = 0
        self._scale = self._precision.scale.start().value
        self._scales: dict[int, float] = {}  # by step of a deep sample
        self._setting = self._described()
        if self._folder is not None:
            record.append(self._folder, [self._setting])

    def _described(self) -> Setting:
        inside = compiled(self._model)
        note = "parts of the model are compiled: " + (
            "deep samples run them uncompiled" if self._deep else "activations are not seen at the cheap level"
        )
        return Setting(
            level="deep" if self._deep else "cheap",
            every=self._every,
            precision=self._precision.name,
            compute=self._precision.compute,
            formats=self._formats,
            layers=tuple(
                Layer(
                    name=one.name, kind=type(one.module).__name__, parameters=sum(p.numel() for _, p in one.parameters)
                )
                for one in self._sampler.targets
            ),
            world=ranks(),
            compiled=inside,
            notes=(note,) if inside else (),
        )

    # What a trainer calls

    def before_forward(self, trainer_step: int, batch: tuple[Any, Any]) -> None:
        """Remember what a micro-batch starts from, and choose what is counted."""
        self._mail.collect()
        self._sampler.stop()
        self._states.append((id(batch), random_state()))
        self._batch = batch
        if self._micro or not self._trained:
            return
        again, self._step = trainer_step == self._step, trainer_step  # a step that was left out is tried again
        self._chosen = []
        if self._deep and trainer_step % self._every == 0 and not again:
            self._chosen = self._trained
            self._sampler.watch_activations(trainer_step, self._scale)
        elif trainer_step % _STRIDE == 0:
            self._chosen = [self._trained[self._turn % len(self._trained)]]
            self._turn += 1

    def after_backward(self, model: nn.Module, scale: float) -> None:
        """Count gradients of a window's first micro-batch."""
        if not self._micro:
            self._sampler.stop()
            self._sampler.gradients(self._chosen, self._step, scale)
            self._scales = {**dict(list(self._scales.items())[-_REMEMBERED:]), self._step: scale}
        self._scale = scale
        self._micro += 1

    def before_update(self, model: nn.Module) -> None:
        """Keep weights that are about to move."""
        self._sampler.before_update(self._chosen)

    def after_update(self, model: nn.Module, info: StepInfo) -> None:
        """Count what moved, and read what has arrived."""
        self._micro = 0
        self._updates += 1
        self._sampler.after_update(self._step)
        self._send_reading(info)
        deep = self._chosen is self._trained and self._deep
        if deep or (not self._deep and self._updates % self._every == 0):
            self._flush()
        if self._diagnosis.pending:
            self._note(self._diagnosis.explain(self._sampler.targets, self._scene(self._batch), self._step))

    def on_nonfinite(self, trainer: Trainer, batch: tuple[Any, Any], step: int) -> None:
        """Find out why a step broke, or that it is the loss scale being found."""
        self._micro = 0
        self._sampler.stop()
        scale = trainer.scale
        scene = Scene(
            trainer.model,
            trainer.loss,
            batch,
            trainer.precision,
            scale / trainer.accumulate,
            self._state(batch),
            step,
            self._rank,
        )
        self._keep(Reading(step=step, scale=scale, skipped=True))
        self._note(self._diagnosis.nonfinite(scene, self._updates))
        self.write()

    # What one reads

    def close(self) -> Summary:
        """Wait for what is under way, write everything, and return the verdict and the advice."""
        self._sampler.stop()
        self._flush()
        self._mail.collect(wait=True)
        if self._diagnosis.pending:
            self._note(self._diagnosis.explain(self._sampler.targets, None, self._step))
        return self.write()

    def summary(self) -> Summary:
        """Return the verdict and the advice, from what has arrived so far."""
        series = self._series()
        wanted = self._precision.compute == "fp16" or "fp16" in self._formats
        return Summary(
            verdict=verdict(self.events, self._updates),
            scale=scale_advice(series) if wanted else None,
            formats=format_advice(series, self._formats),
        )

    def record(self) -> Record:
        """Return all that was seen so far, as :func:`narrowcast.training.doctor.record.read` would."""
        return Record(self._setting, tuple(self._readings), tuple(self.events), self._series(), self.summary())

    def write(self) -> Summary:
        """Write the histograms and all that is new to the folder, if there is one, and return the summary."""
        summary = self.summary()
        if self._folder is not None:
            record.append(self._folder, [*self._unwritten, summary])
            record.write_series(self._folder, self._series())
            self._unwritten = []
        return summary

    # What happens in between

    def _series(self) -> tuple[record.Series, ...]:
        return self._histories.series([one.name for one in self._sampler.targets])

    def _state(self, batch: Any) -> Any:
        return next((state for key, state in reversed(self._states) if key == id(batch)), None)

    def _scene(self, batch: Any) -> Scene | None:
        if self._loss is None or batch is None:
            return None
        state = self._state(batch)
        return Scene(self._model, self._loss, batch, self._precision, self._scale, state, self._step, self._rank)

    def _send_reading(self, info: StepInfo) -> None:
        step, scale = self._step, info.scale
        norm = info.norm if info.norm is not None else torch.full_like(info.mean_loss, torch.nan)

        def read(tensors: list[Tensor]) -> None:
            loss, size = tensors[0].tolist()
            self._keep(Reading(step=step, loss=loss, grad_norm=size, scale=scale))
            self._diagnosis.read_norm(size)

        self._mail.send([torch.stack([info.mean_loss.float(), norm.float()])], read)

    def _keep(self, reading: Reading) -> None:
        self._readings.append(reading)
        self._unwritten.append(reading)

    def _note(self, events: Sequence[Event]) -> None:
        for event in events:
            self.events.append(event)
            self._unwritten.append(event)
            _log.log(logging.INFO if event.normal else logging.WARNING, "%s", event.sentence)

    def _flush(self) -> None:
        """Send what was counted on its way to main memory."""
        rows, tensors, places = self._sampler.take()
        if not rows:
            return
        scales = dict(self._scales)

        def read(copies: list[Tensor]) -> None:
            counts, largest = copies[0].numpy(), copies[1].numpy()
            for row, (number, part, step, assumed) in enumerate(rows):
                scale = scales.get(step, assumed)
                wrong = scale / assumed if part is Part.BACKWARD else 1.0
                found = shifted(counts[row], -torch.tensor(wrong).log2().item()) if wrong != 1.0 else counts[row]
                name = self._sampler.targets[number].name
                self._histories.add(name, part, step, scale, found, float(largest[row]) / wrong)
            self._diagnosis.read_stuck(copies[2])
            self._diagnosis.read_casts(places, copies[3].tolist())

        self._mail.send(tensors, read)
        self._flushes += 1
        if self._folder is not None and self._flushes % _WRITES == 0:
            self.write()
        elif self._folder is not None:
            record.append(self._folder, self._unwritten)
            self._unwritten = []
