"""The managed training run: from a config to a trained model in a folder, and on from where it stopped."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from narrowcast.models.loaders import fresh_module
from narrowcast.models.runs import load_weights, read_weights
from narrowcast.training import checkpoint
from narrowcast.training.assembly import Assembled, assemble, device_of, optimizer_of, schedule_of
from narrowcast.training.config import Config
from narrowcast.training.feeding import Place
from narrowcast.training.interrupts import Interrupts
from narrowcast.training.logs import SKIPS, RunLog, keep_lines
from narrowcast.training.objectives import Result
from narrowcast.training.outcome import RunResult, environment, part_of, read_result, write_result, write_weights
from narrowcast.training.random_state import random_state, set_random_state
from narrowcast.training.run_folder import CHECKPOINTS, check_folder, claim
from narrowcast.training.shortage import is_shortage, shortage
from narrowcast.training.trainer import Trainer
from narrowcast.training.window import StepInfo

__all__ = ["Progress", "Silent", "fit"]


class Progress(Protocol):
    """Told about a run as it goes."""

    def started(self, run: Assembled, out: Path, step: int) -> None:
        """Everything is there; training begins, or goes on after a step."""
        ...

    def stepped(self, step: int, skipped: int) -> None:
        """An update was made, or left out."""
        ...

    def logged(self, step: int, line: dict[str, Any]) -> None:
        """A line was logged: loss, grad_norm, scale, skipped, lr, samples_per_s."""
        ...

    def validated(self, step: int, result: Result) -> None:
        """The validation part was scored."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line happened."""
        ...


class Silent:
    """Says nothing."""

    def started(self, run: Assembled, out: Path, step: int) -> None:
        """Do nothing."""

    def stepped(self, step: int, skipped: int) -> None:
        """Do nothing."""

    def logged(self, step: int, line: dict[str, Any]) -> None:
        """Do nothing."""

    def validated(self, step: int, result: Result) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""


def fit(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Train what a config describes, and write the run to a folder.

    The folder then holds ``config.yaml``, ``log.jsonl``, ``skips.jsonl`` (where updates were left out), ``checkpoints/``,
    ``model.safetensors`` and ``result.json``; it is a model reference.

    Args:
        config: The config.
        out: The folder.
        resume: Whether to go on from the folder's last checkpoint, if there is one; a finished run is only read.
        force: Whether a run that is in the folder may be replaced.
        progress: Told about the run as it goes.

    Raises:
        UserError: The request cannot be carried out; see the kinds in :mod:`narrowcast.errors`.
        KeyboardInterrupt: On SIGINT or SIGTERM, after a checkpoint was written.
    """
    shown = progress or Silent()
    check_folder(out, config, resume=resume, force=force)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    place = Place(device_of(config.device))
    run = assemble(config, place)
    if resume and (done := _finished(out, run)) is not None:
        shown.note(f"{out} is finished: nothing to do")
        return done
    claim(out, config, resume=resume)
    try:
        return _Managed(run, out, shown).run(resume=resume)
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        problem = shortage(config, run.architecture, place.device, place.world)
        raise problem from error


@dataclass
class _Position:
    """How far a run has come."""

    batches: int = 0
    lines: int = 0
    seconds: float = 0.0
    loss: float | None = None
    validation: dict[str, Any] | None = None


class _Managed:
    """One run: the loop and what it writes."""

    def __init__(self, run: Assembled, out: Path, shown: Progress) -> None:
        self._run = run
        self._config = run.config
        self._out = out
        self._shown = shown
        self._at = _Position()
        self._student = self._taught()
        parameters = [one for one in self._student.parameters() if one.requires_grad]
        optimizer = optimizer_of(run.config, parameters, run.policy)
        self._trainer = Trainer(
            self._student,
            optimizer,
            run.distillation or run.measure.loss,
            precision=run.policy,
            schedule=schedule_of(run.config.schedule, optimizer, run.windows),
            clip_norm=run.config.clip_norm,
            accumulate=run.config.accumulate,
        )

    def run(self, *, resume: bool) -> RunResult:
        """Train to the end and return the result."""
        if resume:
            self._restore()
        keep_lines(self._out / SKIPS, self._trainer.skipped)
        self._trainer.ledger.write_to(self._out / SKIPS)
        self._shown.started(self._run, self._out, self._trainer.steps)
        started = time.perf_counter() - self._at.seconds
        with (
            RunLog(
                self._out,
                tensorboard=self._config.log.tensorboard,
                lines=self._at.lines,
                step=self._trainer.steps,
            ) as log,
            Interrupts() as interrupts,
        ):
            self._log = log
            self._loop(interrupts, started)
            self._at.seconds = time.perf_counter() - started
            self._save()
            return self._finish()

    # The loop ---------------------------------------------------------------------------------------------------------

    def _loop(self, interrupts: Interrupts, started: float) -> None:
        run, trainer, at = self._run, self._trainer, self._at
        end = run.batches
        pace = _Pace(self._config.batch)
        closed = at.batches // run.feeder.per_epoch
        batches = run.feeder.batches(at.batches, end)
        try:
            while not self._done():
                info = trainer.step(run.taught(next(batches)))
                at.batches += 1
                pace.count()
                if at.batches == end and not (info.updated or info.skipped):
                    info = trainer.flush() or info
                if not (info.updated or info.skipped):
                    continue
                self._shown.stepped(trainer.steps, trainer.skipped)
                epoch = at.batches // run.feeder.per_epoch
                self._after(info, pace, new_epoch=epoch > closed)
                closed = epoch
                at.seconds = time.perf_counter() - started
                if info.updated and trainer.steps % self._config.checkpoint.every == 0:
                    self._save()
                if interrupts.asked and not self._done():
                    self._save()
                    raise KeyboardInterrupt
        finally:
            batches.close()

    def _done(self) -> bool:
        if self._config.steps is not None:
            return self._trainer.steps >= self._config.steps
        return self._run.batches is not None and self._at.batches >= self._run.batches

    def _after(self, info: StepInfo, pace: _Pace, *, new_epoch: bool) -> None:
        """Log and validate where it is time to."""
        step, every = self._trainer.steps, self._config.validate_every
        if info.updated and (step % self._config.log.every == 0 or self._done()):
            self._at.loss = info.loss
            line = {
                "loss": info.loss,
                "grad_norm": info.grad_norm,
                "scale": info.scale,
                "skipped": self._trainer.skipped,
                "lr": info.lr,
                "samples_per_s": pace.rate(),
            }
            self._log.write(step, line)
            self._at.lines = self._log.lines
            self._shown.logged(step, line)
        due = new_epoch if every is None else info.updated and step % every == 0
        if self._run.parts.validation is not None and (due or self._done()):
            self._validate(step)
            pace.restart()

    def _validate(self, step: int) -> None:
        autocast = self._run.policy.autocast(self._run.place.device)
        result = self._run.score(self._trainer.model, "validation", autocast)
        self._at.validation = result.model_dump()
        self._log.write(step, {"validation": self._at.validation})
        self._at.lines = self._log.lines
        self._shown.validated(step, result)

    # State ------------------------------------------------------------------------------------------------------------

    def _save(self) -> Path:
        state = {
            "trainer": self._trainer.state_dict(),
            "random": random_state(),
            "position": {
                "batches": self._at.batches,
                "lines": self._at.lines,
                "seconds": self._at.seconds,
                "loss": self._at.loss,
                "validation": self._at.validation,
            },
        }
        return checkpoint.save(
            self._out / CHECKPOINTS, state, step=self._trainer.steps, keep=self._config.checkpoint.keep
        )

    def _restore(self) -> None:
        found = checkpoint.load_latest(self._out / CHECKPOINTS)
        if found is None:
            self._shown.note(f"{self._out} holds no checkpoint yet: training begins anew")
            return
        state = found.state
        checkpoint.check_keys(self._trainer.model.state_dict(), state["trainer"]["model"], f"checkpoint {found.path}")
        self._trainer.load_state_dict(state["trainer"])
        set_random_state(state["random"])
        self._at = _Position(**state["position"])

    def _taught(self) -> nn.Module:
        """Return what is trained: the network, or a student around it whose features are compared."""
        distillation = self._run.distillation
        if distillation is None:
            return self._run.network
        return distillation.student(self._run.network, self._run.example())

    # The end ----------------------------------------------------------------------------------------------------------

    def _finish(self) -> RunResult:
        run = self._run
        sha256 = write_weights(self._out, run.network.state_dict())
        module = fresh_module(run.architecture).module
        load_weights(module, read_weights(self._out, sha256), str(self._out))
        result = RunResult(
            model=run.architecture.name,
            arguments=dict(run.architecture.arguments),
            input=run.architecture.input,
            sha256=sha256,
            parameters=run.parameters,
            precision=run.policy.name,
            seed=self._config.seed,
            split_seed=self._config.data.split_seed,
            parts={name: part_of(part) for name, part in run.parts._asdict().items() if part is not None},
            validation=None if self._at.validation is None else Result(**self._at.validation),
            report=run.score(module.to(run.place.device), "report"),
            loss=self._at.loss,
            steps=self._trainer.steps,
            skipped=self._trainer.skipped,
            seconds=self._at.seconds,
            environment=environment(run.place.device, run.place.world),
        )
        write_result(self._out, result)
        return result


class _Pace:
    """Samples per second since it was last asked."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self.restart()

    def restart(self) -> None:
        """Begin anew: what came between was no training."""
        self._count = 0
        self._since = time.perf_counter()

    def count(self) -> None:
        """A batch was computed."""
        self._count += 1

    def rate(self) -> float | None:
        """Return the rate, None without batches, and begin anew."""
        seconds = time.perf_counter() - self._since
        rate = self._count * self._batch / seconds if self._count else None
        self.restart()
        return rate


def _finished(out: Path, run: Assembled) -> RunResult | None:
    """Return the result of a run that has come as far as its config asks; None if there is still to do."""
    result = read_result(out)
    if result is None:
        return None
    done = result.steps if run.config.steps is not None else result.steps + result.skipped
    return result if done >= run.windows else None
