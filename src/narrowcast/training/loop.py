"""The loop of a managed run: batches in, steps, lines of the log, validations, checkpoints, and the result at the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from narrowcast.errors import TrainingError
from narrowcast.models.loaders import fresh_module
from narrowcast.models.runs import load_weights, read_weights
from narrowcast.training import sharded_checkpoint as checkpoints
from narrowcast.training.assembly import Assembled, optimizer_of, schedule_of
from narrowcast.training.checkpoint import check_keys
from narrowcast.training.checks import unwrapped
from narrowcast.training.distillation import Distillation
from narrowcast.training.distributed import replicate
from narrowcast.training.doctor.watch import Watch
from narrowcast.training.interrupts import Interrupts
from narrowcast.training.logs import SKIPS, RunLog, keep_lines
from narrowcast.training.objectives import LossFunction, Result
from narrowcast.training.outcome import RunResult, environment, part_of, read_result, write_result, write_weights
from narrowcast.training.policies import precision
from narrowcast.training.progress import Progress
from narrowcast.training.random_state import random_state, set_random_state
from narrowcast.training.run_folder import CHECKPOINTS, DOCTOR
from narrowcast.training.sharding import reshard, shard
from narrowcast.training.trainer import Trainer
from narrowcast.training.window import StepInfo

__all__ = ["Loop"]

_log = logging.getLogger(__name__)


@dataclass
class _Position:
    """How far a run has come."""

    batches: int = 0
    lines: int = 0
    seconds: float = 0.0
    loss: float | None = None
    validation: dict[str, Any] | None = None


class Loop:
    """One run, from its first or its next batch to its result.

    Args:
        run: What is trained.
        out: Folder of the run; the first process writes into it.
        shown: Told about the run as it goes.
    """

    def __init__(self, run: Assembled, out: Path, shown: Progress) -> None:
        self._run = run
        self._config = run.config
        self._ranks = run.ranks
        self._out = out
        self._shown = shown
        self._at = _Position()
        self._log: RunLog | None = None
        self._said: tuple[str, ...] | None = None
        torch.manual_seed(run.config.seed)  # of projections that distillation adds
        module = _placed(run)
        torch.manual_seed(run.config.seed + run.ranks.rank)  # of dropout, which differs between processes
        parameters = [one for one in module.parameters() if one.requires_grad]
        optimizer = optimizer_of(run.config, parameters, run.policy)
        loss = run.distillation or run.measure.loss
        self._watch = self._doctor(unwrapped(module), optimizer, loss)
        self._trainer = Trainer(
            module,
            optimizer,
            loss,
            precision=run.policy,
            schedule=schedule_of(run.config.schedule, optimizer, run.windows),
            clip_norm=run.config.clip_norm,
            accumulate=run.config.accumulate,
            watch=self._watch,
            ranks=run.ranks,
            nonfinite=run.config.nonfinite,
        )

    def _doctor(self, module: nn.Module, optimizer: Optimizer, loss: LossFunction | Distillation) -> Watch | None:
        """Return what looks at the numbers, if the config wants it."""
        level = self._config.doctor
        if level == "off":
            return None
        return Watch(
            module,
            level,
            optimizer=optimizer,
            loss=loss,
            precision=self._run.policy,
            folder=self._out / DOCTOR,
            rank=self._ranks.rank,
        )

    def run(self, *, resume: bool) -> RunResult:
        """Train to the end and return the result.

        Raises:
            KeyboardInterrupt: On SIGINT or SIGTERM, after a checkpoint was written.
            UserError: Training cannot go on, or the folder cannot be written.
        """
        if resume:
            self._restore()
        if self._watch is not None:
            self._watch.start(self._trainer.steps)
        self._shown.started(self._run, self._out, self._trainer.steps)
        started = time.perf_counter() - self._at.seconds
        with self._watched(), self._logging(), Interrupts() as interrupts:
            self._train(interrupts, started)
            self._trainer.finish()
            self._at.seconds = time.perf_counter() - started
            self._save()
            return self._finish()

    # The loop ---------------------------------------------------------------------------------------------------------

    def _train(self, interrupts: Interrupts, started: float) -> None:
        run, trainer, at = self._run, self._trainer, self._at
        pace = _Pace(self._config.batch)
        closed = at.batches
        batches = run.feeder.batches(at.batches, run.batches)
        try:
            while not self._done():
                info = trainer.step(run.taught(next(batches)))
                at.batches += 1
                pace.count()
                if at.batches == run.batches:
                    info = trainer.flush() or info
                if not info.closed:
                    continue
                self._shown.stepped(trainer.steps_at_most)
                new_epoch = at.batches // run.feeder.per_epoch > closed // run.feeder.per_epoch
                closed = at.batches
                self._after(info, pace, new_epoch=new_epoch)
                at.seconds = time.perf_counter() - started
                if self._is_due(info, self._config.checkpoint.every):
                    self._save()
                if interrupts.asked:
                    trainer.stopping.ask()
                if trainer.stopping.agreed and not self._done():
                    self._save()
                    raise KeyboardInterrupt
        finally:
            batches.close()

    def _done(self) -> bool:
        steps = self._config.steps
        if steps is not None:
            return self._trainer.steps_at_most >= steps and self._trainer.steps >= steps
        return self._run.batches is not None and self._at.batches >= self._run.batches

    def _is_due(self, info: StepInfo, every: int) -> bool:
        """Return whether a step made an update of which each so many are due; waits only where the answer may be yes."""
        return self._trainer.steps_at_most % every == 0 and info.updated

    def _after(self, info: StepInfo, pace: _Pace, *, new_epoch: bool) -> None:
        """Log and validate where it is time to."""
        every = self._config.validate_every
        if self._is_due(info, self._config.log.every) or (self._done() and info.updated):
            step = self._trainer.steps
            self._at.loss = info.loss
            line = {
                "loss": info.loss,
                "grad_norm": info.grad_norm,
                "scale": info.scale,
                "skipped": self._trainer.skipped,
                "lr": info.lr,
                "samples_per_s": pace.rate(),
            }
            self._write(step, line)
            self._shown.logged(step, line)
        due = new_epoch if every is None else self._is_due(info, every)
        if self._run.parts.validation is not None and (due or self._done()):
            result = self._run.score(self._trainer.model, "validation", self._run.policy)
            reshard(self._trainer.model)
            self._at.validation = result.model_dump()
            self._write(self._trainer.steps, {"validation": self._at.validation})
            self._shown.validated(self._trainer.steps, result)
            pace.restart()

    # What is written --------------------------------------------------------------------------------------------------

    @contextmanager
    def _logging(self) -> Generator[None]:
        """Write the log and the skips from the first process, on from where the run stands."""
        if self._ranks.rank != 0:
            yield
            return
        skips = self._out / SKIPS
        keep_lines(skips, self._trainer.skipped)
        self._trainer.ledger.write_to(skips)
        tensorboard, step = self._config.log.tensorboard, self._trainer.steps
        with RunLog(self._out, tensorboard=tensorboard, lines=self._at.lines, step=step) as self._log:
            yield

    @contextmanager
    def _watched(self) -> Generator[None]:
        """Have the doctor write what it saw, however the run ends; an error that ended it goes before one of the doctor's."""
        try:
            yield
        except BaseException:
            try:
                self._verdict()
            except Exception as error:
                _log.warning("the doctor's record lacks its end: %s", error)
            raise
        self._verdict()

    def _verdict(self) -> tuple[str, ...] | None:
        """Return what the doctor says of the run, which is then written; None without one."""
        if self._watch is not None and self._said is None:
            self._said = self._watch.close().verdict.sentences
        return self._said

    def _write(self, step: int, record: dict[str, Any]) -> None:
        self._at.lines += 1
        if self._log is not None:
            self._log.write(step, record)

    def _save(self) -> None:
        """Write a checkpoint, and before it the doctor's record up to it."""
        keep = self._config.checkpoint.keep
        self._trainer.finish()  # has the doctor told of the last update
        if self._watch is not None:
            self._watch.save(self._trainer.steps, keep=keep)
        checkpoints.save(
            self._out / CHECKPOINTS,
            {"trainer": self._trainer.state_dict(), "position": asdict(self._at), "data": self._hashes},
            step=self._trainer.steps,
            ranks=self._ranks,
            own={"random": random_state()},
            keep=keep,
        )

    def _restore(self) -> None:
        """Go on from the last good checkpoint, if there is one."""
        model = unwrapped(self._trainer.model)
        layout = checkpoints.Layout.of(model, self._trainer.optimizer)
        found = checkpoints.load_latest(self._out / CHECKPOINTS, ranks=self._ranks, layout=layout)
        if found is None:
            self._shown.note(f"{self._out} holds no checkpoint yet: training begins anew")
            return
        check_keys(model.state_dict(), found.state["trainer"]["model"], f"checkpoint {found.path}")
        self._check_data(found.state["data"], str(found.path))
        self._trainer.load_state_dict(found.state["trainer"])
        self._at = _Position(**found.state["position"])
        if found.own is not None:
            set_random_state(found.own["random"])
        else:  # other processes than before: any numbers do, if they are the same each time
            torch.manual_seed(hash((self._config.seed, self._trainer.steps, self._ranks.rank)))

    @cached_property
    def _hashes(self) -> dict[str, str]:
        return self._run.hashes()

    def _check_data(self, before: dict[str, str], checkpoint: str) -> None:
        """Check that data and teacher are those of a checkpoint: others could hold trained samples in the reported part.

        Raises:
            TrainingError: A reference names something else now.
        """
        for name, sha256 in self._hashes.items():
            if before.get(name) != sha256:
                what = f"the {name}" if name == "teacher" else f"the data of the {name} part"
                raise TrainingError(
                    f"{what} ({self._run.source(name)}) changed since {checkpoint} was written",
                    allowed="the same data and the same teacher",
                    next_step="put them back, or begin anew in another folder: --out",
                )

    def _finish(self) -> RunResult:
        """Write the weights and the result, from the first process."""
        weights = {name: _whole(tensor) for name, tensor in self._run.network.state_dict().items()}
        if self._ranks.rank == 0:
            write_result(self._out, self._result(write_weights(self._out, weights)))
        self._ranks.gather(None)  # the others wait for the files
        result = read_result(self._out)
        assert result is not None
        return result

    def _result(self, sha256: str) -> RunResult:
        """Return what the run came to; the report part is scored with the weights as they were written, in FP32."""
        run = self._run
        module = fresh_module(run.architecture).module
        load_weights(module, read_weights(self._out, sha256), str(self._out))
        return RunResult(
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
            report=run.score(module.to(self._ranks.device), "report", precision("fp32")),
            loss=self._at.loss,
            steps=self._trainer.steps,
            skipped=self._trainer.skipped,
            seconds=self._at.seconds,
            doctor=self._verdict(),
            environment=environment(self._ranks.device, self._ranks.world),
        )


def _placed(run: Assembled) -> nn.Module:
    """Return what is trained, on the processes: the network, or a student around it whose features are compared."""
    module = run.network
    if run.distillation is not None:
        module = run.distillation.student(module, run.example())
    spread = shard if run.config.ranks == "sharded" else replicate
    return spread(module, run.ranks, run.policy)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
