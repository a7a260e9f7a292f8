"""The record beside checkpoints: each checkpoint finds in it what was seen until then, all of it and nothing later.

With a checkpoint goes a line of ``record.jsonl``, the :class:`~narrowcast.training.doctor.values.Mark`, and a copy of the
histograms, ``histograms-00000400.safetensors``: their totals cannot be taken back to an earlier step. Both are on the disk
before the checkpoint is, so whatever checkpoint a kill leaves, its part of the record is there.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from narrowcast.training.checkpoint_folder import sync
from narrowcast.training.doctor import record
from narrowcast.training.doctor.record import HISTOGRAMS, LINES
from narrowcast.training.doctor.values import Event, Mark, Reading, Setting

__all__ = ["mark", "rewind"]

_KEPT = re.compile(r"histograms-(\d{8,})\.safetensors")


def mark(folder: Path, step: int, keep: int) -> None:
    """Mark what the record holds as what a checkpoint goes on from, and bring it to the disk.

    Args:
        folder: The doctor's own folder, with lines and histograms written.
        step: Updates done, as the checkpoint counts them.
        keep: How many copies of the histograms stay; those of later steps, from a line that was left, go.
    """
    record.append(folder, [Mark(step=step)])
    sync(folder / LINES)
    _copy(folder / HISTOGRAMS, _kept_at(folder, step))
    steps = sorted(_steps(folder), reverse=True)
    for one in [one for one in steps if one > step] + [one for one in steps if one <= step][keep:]:
        _kept_at(folder, one).unlink()
    sync(folder)


def rewind(folder: Path, step: int) -> bool:
    """Take a record back to a checkpoint, and return whether there is one to go on with.

    Lines after the last mark of that step go, or of the step before it that has a mark, where the doctor was off since.
    Without any mark, readings and events of that step and later ones go; the histograms' totals then stay as they are.

    Args:
        folder: The doctor's own folder.
        step: Updates done; 0 clears the record, as training begins anew.

    Raises:
        ArtifactError: The record is damaged, or of another version.
    """
    for one in _steps(folder):
        if one > step or not step:
            _kept_at(folder, one).unlink()
    if not step:
        for name in (LINES, HISTOGRAMS):
            (folder / name).unlink(missing_ok=True)
        return False
    if not (folder / LINES).is_file():
        return False
    values = record.lines(folder / LINES)
    marks = [(number, one.step) for number, one in enumerate(values, 1) if isinstance(one, Mark) and one.step <= step]
    if marks:
        end, marked = marks[-1]
        values = values[:end]
        _copy(_kept_at(folder, marked), folder / HISTOGRAMS)
    else:
        values = [one for one in values if isinstance(one, Setting) or _before(one, step)]
    record.write_lines(folder, values)
    return any(isinstance(value, Setting) for value in values)


def _before(value: object, step: int) -> bool:
    return isinstance(value, Reading | Event) and value.step < step


def _kept_at(folder: Path, step: int) -> Path:
    return folder / f"histograms-{step:08d}.safetensors"


def _steps(folder: Path) -> list[int]:
    """Return the steps whose histograms are kept."""
    if not folder.is_dir():
        return []
    return [int(found[1]) for path in folder.iterdir() if (found := _KEPT.fullmatch(path.name))]


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(f"{target.name}.partial")
    shutil.copyfile(source, partial)
    sync(partial)
    partial.replace(target)
