"""The doctor beside a training run: it counts, remembers, and when numbers break it looks for the cause.

The cheap level touches one layer at every fourth update (its parameters' gradients, weights and updates), and reads loss and
norm when they have arrived: it installs no hooks, so compiled models train as without it. The deep level adds, at every
``every``-th update, all activations and their gradients and all casts that saturate; parts that are compiled run uncompiled
in that one step, since what was compiled before does not call hooks that come later.

Of each activation and gradient at most 2**18 numbers are counted, evenly spaced, and the least and the greatest of all of
them; of each parameter and its update at most 2**16.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from narrowcast.errors import TrainingError
from narrowcast.training.doctor.diagnosis import Diagnosis
from narrowcast.training.doctor.exchange import ranks
from narrowcast.training.doctor.histories import Sample, shifted
from narrowcast.training.doctor.interventions import gathered_narrow
from narrowcast.training.doctor.journal import Journal
from narrowcast.training.doctor.replay import Scene, spread
from narrowcast.training.doctor.sampling import Mailbox, Sampler, compiled
from narrowcast.training.doctor.values import Event, Layer, Part, Reading, Record, Setting, Summary
from narrowcast.training.doctor.whatif import element
from narrowcast.training.policies import Precision
from narrowcast.training.policies import precision as policy_of
from narrowcast.training.random_state import random_state
from narrowcast.training.watching import BrokenStep
from narrowcast.training.window import StepInfo

__all__ = ["Watch"]

_STRIDE = 4  # updates from one layer's cheap sample to the next layer's
_REMEMBERED = 64  # micro-batches whose random states are kept, beside the one that has just begun


class _Begun(NamedTuple):
    """What a watch has once the run has begun.

    Attributes:
        sampler: Counts.
        mail: Brings counts to main memory.
        journal: Keeps them.
        trained: Numbers of the targets with parameters.
        together: Whether no rank can run the model alone.
    """

    sampler: Sampler
    mail: Mailbox
    journal: Journal
    trained: list[int]
    together: bool


class _Updating(NamedTuple):
    """The latest update that has begun. The next micro-batch may begin before it is told what became of it.

    Attributes:
        step: Updates done before.
        chosen: Numbers of the targets that are counted.
        batch: Its last micro-batch; None once it is told.
    """

    step: int
    chosen: list[int]
    batch: Any


class Watch:
    """Watches the numbers of a run; :class:`narrowcast.training.Trainer` calls it, or a loop of one's own does.

    Where ranks hold parts of the weights each, every rank has a watch and calls the same methods: they replay together.

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
        self._model = model
        self._deep = level == "deep"
        self._every = every
        self._formats = tuple(element(name).name for name in formats)
        self._loss = loss
        self._precision = policy_of(precision)
        self._folder = folder if rank == 0 else None
        self._rank = rank
        self._diagnosis = Diagnosis(self._precision, optimizer, rank)
        self._begun: _Begun | None = None
        self._states: deque[tuple[int, Any]] = deque(maxlen=_REMEMBERED + 1)
        self._batch: Any = None
        self._chosen: list[int] = []
        self._updating = _Updating(-1, [], None)
        self._micro = 0
        self._ahead = 0  # micro-batches that have begun, of which no backward pass is told
        self._step = -1
        self._scale = self._precision.scale.start().value
        self._scales: dict[int, float] = {}  # by step of a deep sample

    def _begin(self, step: int) -> _Begun:
        """Look at the model when it is used first: until then a precision may convert its modules."""
        if self._begun is None:
            sampler = Sampler(self._model)
            journal = Journal(self._described(sampler), self._folder, step)
            trained = [number for number, one in enumerate(sampler.targets) if one.parameters]
            self._begun = _Begun(sampler, Mailbox(sampler.device), journal, trained, spread(self._model))
        return self._begun

    @property
    def events(self) -> tuple[Event, ...]:
        """What happened so far; of many, the latest 4096."""
        return tuple(self._begin(0).journal.events)

    def _described(self, sampler: Sampler) -> Setting:
        inside = compiled(self._model)
        seen = "deep samples run them uncompiled" if self._deep else "activations are not seen at the cheap level"
        notes = [f"parts of the model are compiled: {seen}"] if inside else []
        if gathered_narrow(self._model):
            notes.append(
                f"sharded weights come together in {self._precision.compute} (gather='compute'), so no layer can be run in "
                "another format, and none is tried as a remedy"
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
                for one in sampler.targets
            ),
            world=ranks(),
            compiled=inside,
            notes=tuple(notes),
        )

    # What a loop that writes checkpoints calls

    def start(self, step: int) -> None:
        """Take up the record of a run as of a checkpoint, before its first step; else that step says how far it was.

        Args:
            step: Updates done; 0 for a new run, whose folder then holds no record of another.

        Raises:
            ArtifactError: The folder holds a damaged record.
        """
        self._begin(step)

    def save(self, step: int, *, keep: int = 2) -> None:
        """Write everything that was seen, so that a checkpoint that is written next goes on from the whole record.

        Args:
            step: Updates done, as the checkpoint counts them.
            keep: How many checkpoints stay.

        Raises:
            OutputError: The folder cannot be written.
        """
        _, mail, journal, *_ = self._begin(step)
        self._flush()
        mail.collect(wait=True)
        self._explain(self._batch, self._step, everyone=True)
        journal.mark(step, keep + 1)  # the checkpoint that goes is there until the new one is

    # What a trainer calls

    def before_forward(self, trainer_step: int, batch: tuple[Any, Any]) -> None:
        """Remember what a micro-batch starts from, and choose what is counted."""
        sampler, mail, _, trained, _ = self._begin(trainer_step)
        mail.collect()
        sampler.stop()
        self._states.append((id(batch), random_state()))
        self._batch = batch
        self._ahead += 1
        if self._micro:
            return
        again, self._step = trainer_step == self._step, trainer_step  # a step that was left out is tried again
        if self._deep and trained and trainer_step % self._every == 0 and not again:
            self._chosen = trained
            sampler.watch_activations(trainer_step, self._scale)
        else:
            self._chosen = self._one_layer(trainer_step)

    def after_backward(self, model: nn.Module, scale: float) -> None:
        """Count gradients of a window's first micro-batch."""
        sampler, _, _, trained, _ = self._begin(self._step)
        self._ahead = 0
        if not self._micro:
            sampler.stop()
            self._scales = {**dict(list(self._scales.items())[-_REMEMBERED:]), self._step: scale}
            if self._chosen is trained:
                self._flush()  # the activations: if the step is tried again, its scale will be another
            sampler.gradients(self._chosen, self._step, scale)
        self._scale = scale
        self._micro += 1

    def before_update(self, model: nn.Module) -> None:
        """Keep weights that are about to move."""
        self._micro = 0
        self._updating = _Updating(self._step, self._chosen, self._batch)
        self._begin(self._step).sampler.before_update(self._chosen)

    def after_update(self, model: nn.Module, info: StepInfo) -> None:
        """Count what moved, and read what has arrived."""
        step, chosen, batch = self._updating
        self._updating = self._updating._replace(batch=None)
        sampler, _, journal, trained, _ = self._begin(step)
        sampler.stop()  # hooks for the next micro-batch, whose passes are over: they are not to count a replay
        sampler.after_update(step)
        self._send_reading(step, info)
        sampled = chosen is trained if self._deep else (step + 1) % self._every == 0
        if sampled:
            self._flush(activations=self._step == step)  # those of the next step wait for its scale to be told
            journal.save()
        self._explain(batch, step, everyone=sampled)

    def on_nonfinite(self, broken: BrokenStep) -> None:
        """Find out why a step broke, or that it is the loss scale being found."""
        step, batch = broken.step, broken.batch
        self._updating = self._updating._replace(batch=None)
        sampler, _, journal, *_ = self._begin(step)
        self._micro = 0
        sampler.stop()
        if self._step > step:  # the micro-batch that has begun was taken for the next step's, and tries this one again
            sampler.forget_activations()
            self._step, self._chosen = step, self._one_layer(step)
        scene = Scene(
            broken.model,
            broken.loss,
            batch,
            broken.precision,
            broken.factor,
            self._state(batch),
            step,
            self._rank,
        )
        journal.keep(Reading(step=step, scale=broken.scale, skipped=True))
        journal.note(self._diagnosis.nonfinite(scene, step))
        journal.write()

    # What one reads

    def close(self) -> Summary:
        """Wait for what is under way, write everything, and return the verdict and the advice."""
        sampler, mail, journal, *_ = self._begin(0)
        sampler.stop()
        self._flush()
        mail.collect(wait=True)
        if self._diagnosis.pending:
            journal.note(self._diagnosis.explain(sampler.targets, None, self._step))
        return journal.write()

    def summary(self) -> Summary:
        """Return the verdict and the advice, from what has arrived so far."""
        return self._begin(0).journal.summary()

    def record(self) -> Record:
        """Return what was seen so far: of readings and events the latest, of the rest all; a folder holds all of them."""
        return self._begin(0).journal.record()

    # What happens in between

    def _explain(self, batch: Any, step: int, *, everyone: bool) -> None:
        """Note what waits to be explained.

        Args:
            batch: The latest micro-batch that an update is known of.
            step: Its step.
            everyone: Whether every rank asks at this step; where they run the model together, nothing is explained else.
        """
        sampler, mail, journal, _, together = self._begin(step)
        if together and everyone:
            mail.collect(wait=True)
        if everyone if together else self._diagnosis.pending:
            journal.note(self._diagnosis.explain(sampler.targets, self._scene(batch, step), step))

    def _state(self, batch: Any) -> Any:
        """Return where the generators stood before a micro-batch; a loop may give the same one again, for the next step too."""
        begun = list(self._states)[: len(self._states) - self._ahead]
        return next((state for key, state in reversed(begun) if key == id(batch)), None)

    def _scene(self, batch: Any, step: int) -> Scene | None:
        if self._loss is None or batch is None:
            return None
        state = self._state(batch)
        return Scene(self._model, self._loss, batch, self._precision, self._scale, state, step, self._rank)

    def _one_layer(self, step: int) -> list[int]:
        """Return the target whose weights and updates are counted at an update, or none."""
        trained = self._begin(step).trained
        return [trained[step // _STRIDE % len(trained)]] if trained and step % _STRIDE == 0 else []

    def _send_reading(self, step: int, info: StepInfo) -> None:
        _, mail, journal, *_ = self._begin(step)
        scale = info.scale
        norm = info.norm if info.norm is not None else torch.full_like(info.mean_loss, torch.nan)

        def read(tensors: list[Tensor]) -> None:
            loss, size = tensors[0].tolist()
            journal.keep(Reading(step=step, loss=loss, grad_norm=size, scale=scale))
            self._diagnosis.read_norm(size)

        mail.send([torch.stack([info.mean_loss.float(), norm.float()])], read)

    def _flush(self, *, activations: bool = True) -> None:
        """Send what was counted on its way to main memory, perhaps without what was counted of activations."""
        sampler, mail, journal, *_ = self._begin(self._step)
        rows, tensors, places = sampler.take(activations=activations)
        if not rows:
            return
        scales = dict(self._scales)

        def read(copies: list[Tensor]) -> None:
            counts, largest = copies[0].numpy(), copies[1].numpy()
            for one, found, most in zip(rows, counts, largest.tolist(), strict=True):
                scale = scales.get(one.step, one.scale)
                wrong = scale / one.scale if one.part is Part.BACKWARD else 1.0  # hooks ran before the scale was told
                found = shifted(found, -math.log2(wrong)) if wrong != 1.0 else found
                sample = Sample(one.step, scale, found, most / wrong, one.numbers)
                journal.histories.add(sampler.targets[one.target].name, one.part, sample)
                if one.part is Part.GRADIENT:
                    self._diagnosis.read_gradient(one.target, zero=int(found[0]) == int(found.sum()))
            self._diagnosis.read_stuck(copies[2])
            self._diagnosis.read_casts(places, copies[3].tolist())

        mail.send(tensors, read)
