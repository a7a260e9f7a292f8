"""The managed training run: from a config to a trained model in a folder, and on from where it stopped."""

from __future__ import annotations

from pathlib import Path

import torch

from narrowcast.errors import OutputError
from narrowcast.training.assembly import assemble, device_of
from narrowcast.training.config import Config
from narrowcast.training.distributed import Ranks
from narrowcast.training.loop import Loop
from narrowcast.training.outcome import RunResult, read_result
from narrowcast.training.progress import Progress, Silent
from narrowcast.training.run_folder import TEACHER, check_folder, claim
from narrowcast.training.shortage import answered

__all__ = ["fit"]


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
    ``model.safetensors`` and ``result.json``; it is a model reference. Started by ``torchrun``, the processes train
    together, and the first one writes.

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
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    check_folder(out, config, resume=resume, force=force)
    with Ranks.from_environment(device_of(config.device)) as ranks:
        ranks.check_same(config.model_dump(mode="json"), "the config")
        run = assemble(config, ranks)
        result = read_result(out) if resume else None
        if result is not None and run.is_done(result.steps, result.skipped):
            shown.note(f"{out} is finished: nothing to do")
            return result
        _claim(out, config, ranks, resume=resume)
        with ranks.watched(), answered(config, run.architecture, ranks):
            run.keep_teacher(out / TEACHER, shown.note)
            return Loop(run, out, shown).run(resume=resume)


def _claim(out: Path, config: Config, ranks: Ranks, *, resume: bool) -> None:
    """Make the folder, from the first process, and raise in all what goes wrong.

    Raises:
        OutputError: It cannot be written.
    """
    said: tuple[str, str, str] | None = None
    if ranks.rank == 0:
        try:
            claim(out, config, resume=resume)
        except OutputError as error:
            said = (error.what, error.allowed, error.next_step)
    first = ranks.gather(said)[0]
    if first is not None:
        what, allowed, next_step = first
        raise OutputError(what, allowed=allowed, next_step=next_step)
