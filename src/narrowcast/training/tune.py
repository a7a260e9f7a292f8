"""The search for good settings with Optuna: each trial is a run of its own, and the study goes on where it stopped."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from narrowcast.errors import ConfigError, NarrowcastError, OutputError, RuntimeMissingError
from narrowcast.training.assembly import Assembled
from narrowcast.training.config import Config, Range, Tune
from narrowcast.training.objectives import Measure, Result, loss_of, measure_of
from narrowcast.training.progress import Progress, Silent
from narrowcast.training.reading import dump, put, validated
from narrowcast.training.run import fit
from narrowcast.training.run_folder import output_errors

__all__ = ["BEST", "STUDY", "TRIALS", "Trial", "Tuned", "tune"]

STUDY = "study.log"
BEST = "best.yaml"
TRIALS = "trials"

_STARTUP = 10  # trials that are drawn at random before the sampler learns from them; as Optuna has it
_STRIDE = 1_000_003  # between the seeds of two trials


class Trial(BaseModel):
    """One trial.

    Attributes:
        number: From 0.
        settings: What was tried, by key.
        value: The metric on the validation part; None where there is none.
        state: ``complete``, ``pruned``, ``fail`` or ``running``.
    """

    model_config = ConfigDict(frozen=True)

    number: int
    settings: dict[str, Any]
    value: float | None
    state: str


class Tuned(BaseModel):
    """A search.

    Attributes:
        metric: What was compared, on the validation part.
        keys: The keys that were searched.
        best: Number of the best trial.
        trials: All of them.
    """

    model_config = ConfigDict(frozen=True)

    metric: str
    keys: tuple[str, ...]
    best: int
    trials: tuple[Trial, ...]


def tune(
    config: Config,
    out: Path,
    *,
    trials: int,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Tuned:
    """Search the config's ``tune.space`` until so many trials are done, and write the best config to ``best.yaml``.

    What a trial tries follows from the seed and from the trials before it, so a search that was interrupted tries what it
    would have tried, and takes up the trial that was cut off. Trials see the validation part alone.

    Args:
        config: The config, with a section ``tune``.
        out: Folder of the study (``study.log``); the runs are in ``trials/``.
        trials: How many in all, those of earlier calls included.
        resume: Whether to go on with a study that is there.
        force: Whether a study that is there may be replaced.
        progress: Told about each run.

    Raises:
        ConfigError: There is no space to search, a key is unknown, or there is no validation part.
        OutputError: The folder holds a study already, or cannot be written.
        RuntimeMissingError: Optuna is not installed.
        KeyboardInterrupt: On SIGINT or SIGTERM, after a checkpoint of the trial at hand was written.
    """
    settings = _checked(config)
    optuna = _optuna()
    shown = progress or Silent()
    _claim(out, resume=resume, force=force)
    with _quiet(optuna):
        study = _open(optuna, out, config)
        running = study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
        # A trial that was cut off keeps its number, its settings and its folder.
        for trial in [optuna.trial.Trial(study, one._trial_id) for one in running]:
            _run(optuna, study, trial, config, out, shown)
        while len(study.get_trials()) < trials:
            # A sampler of its own for each trial: what it draws does not depend on who drew before, in which process.
            seed = settings.seed + _STRIDE * len(study.get_trials())
            study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP)
            _run(optuna, study, study.ask(), config, out, shown)
        return _summary(optuna, study, config, out)


def _run(optuna: Any, study: Any, trial: Any, config: Config, out: Path, shown: Progress) -> None:
    """Run a trial, or go on with one that was cut off."""
    assert config.tune is not None
    settings = {key: _suggested(trial, key, span) for key, span in config.tune.space.items()}
    said = ", ".join(f"{key} = {value}" for key, value in settings.items())
    shown.note(f"trial {trial.number}: {said}")
    watcher = _Watched(optuna, study, trial, shown, prune=config.tune.prune)
    score = None
    try:
        folder = out / TRIALS / f"{trial.number:04d}"
        score = fit(_with(config, settings), folder, resume=True, progress=watcher).validation
    except optuna.TrialPruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        shown.note(f"trial {trial.number}: stopped early")
        return
    except NarrowcastError as error:  # these settings cannot be trained with; others may
        shown.note(f"trial {trial.number}: {error.what}")
    if score is None or not math.isfinite(score.value):
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return
    study.tell(trial, score.value)
    shown.note(f"trial {trial.number}: {score.metric} {score.value:.4f}")


class _Watched:
    """Hands a run's validation scores to the study, which may stop it."""

    def __init__(self, optuna: Any, study: Any, trial: Any, shown: Progress, *, prune: bool) -> None:
        self._optuna = optuna
        self._trial = trial
        self._shown = shown
        self._prune = prune
        self._known = set(study.get_trials()[trial.number].intermediate_values)  # before the trial was cut off

    def started(self, run: Assembled, out: Path, step: int) -> None:
        self._shown.started(run, out, step)

    def stepped(self, step: int) -> None:
        self._shown.stepped(step)

    def logged(self, step: int, line: dict[str, Any]) -> None:
        self._shown.logged(step, line)

    def validated(self, step: int, result: Result) -> None:
        self._shown.validated(step, result)
        if step not in self._known and math.isfinite(result.value):
            self._known.add(step)
            self._trial.report(result.value, step)
        if self._prune and self._trial.should_prune():
            raise self._optuna.TrialPruned

    def note(self, text: str) -> None:
        self._shown.note(text)


def _summary(optuna: Any, study: Any, config: Config, out: Path) -> Tuned:
    """Return what was tried, and write the best config.

    Raises:
        ConfigError: No trial came to its end.
        OutputError: The config cannot be written.
    """
    assert config.tune is not None
    space = config.tune.space
    found = [
        Trial(number=one.number, settings=_settings(space, one.params), value=one.value, state=one.state.name.lower())
        for one in study.get_trials()
    ]
    if not any(one.state == "complete" for one in found):
        raise ConfigError(
            f"none of {len(found)} trials came to its end",
            allowed="settings that can be trained with",
            next_step=f"see {out / TRIALS}, and narrow tune.space",
        )
    best = study.best_trial
    with output_errors(out):
        (out / BEST).write_text(dump(_with(config, _settings(space, best.params))), encoding="utf-8")
    return Tuned(metric=_measure(config).name, keys=tuple(space), best=best.number, trials=tuple(found))


# The space ------------------------------------------------------------------------------------------------------------


def _checked(config: Config) -> Tune:
    """Return the search's settings after every key was tried with its ends.

    Raises:
        ConfigError: There is nothing to search, or a key or value is not allowed.
    """
    if config.tune is None or not config.tune.space:
        raise ConfigError(
            "tune.space is empty",
            allowed="values by key",
            next_step="add for example tune: {space: {optimizer.lr: {low: 1e-4, high: 1e-1, log: true}}}",
        )
    if config.data.report is not None and config.data.validation is None:
        raise ConfigError(
            "a search compares trials on the validation part, and there is none",
            allowed="data.validation, or data.train alone, which is then split in three",
            next_step="add data.validation",
        )
    for key, span in config.tune.space.items():
        for value in span.choices if span.choices is not None else (span.low, span.high):
            _with(config, {key: value})
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "a search in several processes", next_step="run it without torchrun: each trial is one process"
        )
    return config.tune


def _with(config: Config, settings: Mapping[str, Any]) -> Config:
    """Return the config of a trial.

    Raises:
        ConfigError: There is no such key, or the value is not allowed.
    """
    raw = config.model_dump(mode="json", exclude={"tune"}, exclude_none=True)
    for key, value in settings.items():
        put(raw, key, value)
    return validated(raw, "tune.space")


def _suggested(trial: Any, key: str, span: Range) -> Any:
    if span.choices is not None:
        return json.loads(trial.suggest_categorical(key, [json.dumps(choice) for choice in span.choices]))
    if isinstance(span.low, int) and isinstance(span.high, int):
        return trial.suggest_int(key, span.low, span.high, log=span.log)
    return trial.suggest_float(key, span.low, span.high, log=span.log)


def _settings(space: Mapping[str, Range], params: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a trial tried: choices are kept as JSON, since Optuna keeps plain values alone."""
    return {key: json.loads(value) if space[key].choices is not None else value for key, value in params.items()}


# The study ------------------------------------------------------------------------------------------------------------


def _claim(out: Path, *, resume: bool, force: bool) -> None:
    """Make the study's folder.

    Raises:
        OutputError: It holds something else, a study that is to be resumed or replaced on request only, or cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"output {out} is a file", allowed="a folder", next_step="name another with --out")
    if out.is_dir() and any(out.iterdir()) and not resume:
        if not (out / STUDY).is_file():
            raise OutputError(
                f"output folder {out} holds files that are no study",
                allowed="a folder that does not exist yet, is empty, or holds a study",
                next_step="name another with --out",
            )
        if not force:
            raise OutputError(
                f"output folder {out} holds a study",
                allowed="a new folder",
                next_step="go on with it: --resume; replace it: --force; or name another: --out",
            )
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if not resume:
            for name in (STUDY, BEST):
                (out / name).unlink(missing_ok=True)
            if (out / TRIALS).is_dir():
                shutil.rmtree(out / TRIALS)


def _open(optuna: Any, out: Path, config: Config) -> Any:
    """Return the study, with what is asked written into it, so that it is not mixed with another one.

    Raises:
        ConfigError: The study that is there asks for something else.
    """
    with output_errors(out):
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(out / STUDY)))
        study = optuna.create_study(
            storage=storage,
            study_name="narrowcast",
            direction="maximize" if _measure(config).higher_is_better else "minimize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
            load_if_exists=True,
        )
    asked = config.model_dump(mode="json", exclude_none=True)
    before = study.user_attrs.get("config")
    if before is not None and before != json.loads(json.dumps(asked)):
        raise ConfigError(
            f"the study in {out} was begun with another config",
            allowed="the same config",
            next_step="put it back, or search in a new folder with --out",
        )
    study.set_user_attr("config", asked)
    return study


def _measure(config: Config) -> Measure:
    return measure_of(config.metric, config.data.targets, loss_of(config.loss))


@contextmanager
def _quiet(optuna: Any) -> Generator[None]:
    """Keep Optuna from printing: what it says is told to the progress."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def _optuna() -> Any:
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        raise RuntimeMissingError(
            "a search for settings needs Optuna, which is not installed",
            next_step="install it with: pip install 'narrowcast[train]'",
        ) from error
