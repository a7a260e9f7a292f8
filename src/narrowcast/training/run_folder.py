"""The folder of a run: claimed for a new one, or taken up again where it stopped."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from narrowcast.errors import ConfigError, OutputError
from narrowcast.models.reference import RUN_RECORD
from narrowcast.models.runs import WEIGHTS
from narrowcast.training.config import Config
from narrowcast.training.logs import LOG, SKIPS, TENSORBOARD
from narrowcast.training.reading import dump, read_config
from narrowcast.training.writing import written

__all__ = ["CHECKPOINTS", "CONFIG", "DOCTOR", "TEACHER", "check_folder", "claim", "output_errors"]

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
DOCTOR = "doctor"
TEACHER = "teacher"

#: What a run writes, and all that ``force`` removes.
_WRITTEN = (CONFIG, LOG, SKIPS, WEIGHTS, RUN_RECORD, CHECKPOINTS, TENSORBOARD, DOCTOR, TEACHER)

#: What may change when a run is taken up again.
_FREE = {
    "epochs",
    "steps",
    "validate_every",
    "checkpoint",
    "log",
    "doctor",
    "device",
    "threads",
    "ranks",
    "tune",
}


def check_folder(out: Path, config: Config, *, resume: bool, force: bool) -> None:
    """Check that a run can begin, or go on, in a folder; nothing is written.

    Raises:
        OutputError: The folder holds something else, or a run that is to be resumed or replaced on request only.
        ConfigError: The run that it holds was begun with another config.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"output {out} is a file", allowed="a folder", next_step="name another with --out")
    if resume and (out / CONFIG).is_file():
        _check_same(read_config(out / CONFIG), config, out)
        return
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / CONFIG).is_file():
        raise OutputError(
            f"output folder {out} holds files that are no run",
            allowed="a folder that does not exist yet, is empty, or holds a run",
            next_step="name another with --out",
        )
    if not force:
        state = "a finished run" if (out / RUN_RECORD).is_file() else "a run that is not finished"
        raise OutputError(
            f"output folder {out} holds {state}",
            allowed="a new folder",
            next_step="go on with it: --resume; replace it: --force; or name another: --out",
        )


def claim(out: Path, config: Config, *, resume: bool) -> None:
    """Make the folder, remove what an earlier run wrote unless it is resumed, and write the config.

    Raises:
        OutputError: It cannot be written.
    """
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if not resume:
            for name in _WRITTEN:
                _remove(out / name)
        partial = out / f".{CONFIG}.partial"
        partial.write_text(dump(config), encoding="utf-8")
        partial.replace(out / CONFIG)


def output_errors(out: Path) -> AbstractContextManager[None]:
    """Turn what the system says of files into an error that names the folder.

    Raises:
        OutputError: No permission, no room, not a folder ...
    """
    return written(f"output folder {out}", elsewhere="name another with --out")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _check_same(before: Config, now: Config, out: Path) -> None:
    """Check that a run goes on as it began.

    Raises:
        ConfigError: A setting differs that decides what the weights become.
    """
    first, second = (_flat(one.model_dump(mode="json", exclude=_FREE)) for one in (before, now))
    differing = [key for key in sorted(first.keys() | second.keys()) if first.get(key) != second.get(key)]
    if differing:
        said = "; ".join(f"{key} was {first.get(key)!r}, now {second.get(key)!r}" for key in differing[:5])
        raise ConfigError(
            f"the run in {out} was begun with another config: {said}",
            allowed=f"the same config; only {', '.join(sorted(_FREE))} may change",
            next_step="put it back, or train in a new folder with --out",
        )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix.removesuffix("."): values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.")
    return found
