"""The folders of checkpoints: each is there whole or not at all, whenever the process is killed.

A checkpoint is written into a hidden folder beside its place. Its files reach the disk (fsync) before the folder gets its
name, and the name reaches the disk before an older checkpoint goes. ``manifest.json`` holds size and SHA-256 of every other
file, so that damage is noticed.

A folder holds one line of training: a checkpoint of step 100 ends what lay after step 100.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from narrowcast.artifacts.store import file_sha256
from narrowcast.errors import OutputError, TrainingError
from narrowcast.training import writing
from narrowcast.training.writing import written

__all__ = [
    "MANIFEST",
    "begin",
    "begun",
    "check",
    "complete",
    "discard",
    "finish",
    "not_written",
    "output_errors",
    "step_of",
    "sync",
    "write_json",
]

MANIFEST = "manifest.json"
_VERSION = 1
_PLACED = re.compile(r"step-(\d{8,})")
_REPLACED = re.compile(
    r"\.step-(\d{8,})\.replaced"
)  # moved aside for a new one of the same step: good until that is there
_KEPT = "checkpoints that are there still hold"
_LEFT_OVER = re.compile(r"\.step-(\d{8,})\.(writing|removed)")


def step_of(path: Path) -> int | None:
    """Return the step of a checkpoint folder by its name; None if it is not named as one."""
    found = _PLACED.fullmatch(path.name) or _REPLACED.fullmatch(path.name)
    return int(found[1]) if found else None


def complete(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, latest first: all that were written to their end."""
    if not folder.is_dir():
        return []
    placed = [(step, path) for path in folder.iterdir() if (step := step_of(path)) is not None]
    return [path for _, path in sorted(placed, key=lambda one: (one[0], one[1].name), reverse=True)]


def begun(folder: Path, step: int) -> Path:
    """Return where a checkpoint is written until it is whole."""
    return folder / f".step-{step:08d}.writing"


def begin(folder: Path, step: int) -> Path:
    """Return an empty hidden folder to write a checkpoint into; what a killed process left goes or gets its place back."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in list(folder.iterdir()):
        replaced = _REPLACED.fullmatch(path.name)
        if replaced and not (folder / f"step-{replaced[1]}").exists():
            path.rename(folder / f"step-{replaced[1]}")
        elif replaced or _LEFT_OVER.fullmatch(path.name):
            shutil.rmtree(path)
    hidden = begun(folder, step)
    hidden.mkdir()
    return hidden


def finish(folder: Path, step: int, hashes: dict[str, str], keep: int) -> Path:
    """Give a written checkpoint its place, and let older ones go.

    Args:
        folder: Where checkpoints are.
        step: The step, whose hidden folder holds files that reached the disk.
        hashes: SHA-256 of each, by file name.
        keep: How many checkpoints stay.
    """
    hidden = begun(folder, step)
    files = {name: {"bytes": (hidden / name).stat().st_size, "sha256": hashes[name]} for name in sorted(hashes)}
    write_json(hidden / MANIFEST, {"checkpoint": _VERSION, "step": step, "files": files})
    sync(hidden / MANIFEST)
    sync(hidden)
    for later in complete(folder):
        if (step_of(later) or 0) > step:
            _remove(later)
    place = folder / f"step-{step:08d}"
    replaced = folder / f".{place.name}.replaced"
    if place.exists():
        if replaced.exists():
            _remove(replaced)
        place.rename(replaced)
    hidden.rename(place)
    sync(folder)
    sync(folder.absolute().parent)  # where the folder itself may be new
    if replaced.exists():
        _remove(replaced)
    for old in complete(folder)[keep:]:
        _remove(old)
    return place


def discard(folder: Path, step: int) -> None:
    """Remove what was written of a checkpoint that will not be finished, as far as that can be done."""
    shutil.rmtree(begun(folder, step), ignore_errors=True)


def check(path: Path) -> None:
    """Make sure that a checkpoint is as it was written.

    Raises:
        TrainingError: It is none, is of another version, or a file is missing or damaged.
    """
    manifest = _read_manifest(path)
    for name, file in manifest.items():
        inside = path / name
        if not inside.is_file():
            raise _damaged(path, f"{name} is missing")
        size = inside.stat().st_size
        if size != file["bytes"]:
            raise _damaged(path, f"{name} has {size} bytes instead of {file['bytes']}")
        if file_sha256(inside) != file["sha256"]:
            raise _damaged(path, f"{name} has changed since it was written")


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise TrainingError(f"no checkpoint at {path}", next_step="check the path, or train from the start")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, step, files = manifest["checkpoint"], manifest["step"], manifest["files"]
        whole = all(type(one["bytes"]) is int and type(one["sha256"]) is str for one in files.values())
    except FileNotFoundError as error:
        raise TrainingError(
            f"{path} is no checkpoint: it has no {MANIFEST}", allowed="a folder step-NUMBER that training wrote"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"{MANIFEST} cannot be read ({error})") from error
    if version != _VERSION:
        raise TrainingError(
            f"checkpoint {path} is of version {version}", allowed=f"version {_VERSION}", next_step="train again"
        )
    if not whole or step != step_of(path) or any(Path(name).name != name for name in files):
        raise _damaged(path, f"{MANIFEST} does not describe it")
    return files


def output_errors(folder: Path) -> AbstractContextManager[None]:
    """Turn what the system says of files into an error that names the folder.

    Raises:
        OutputError: No permission, no room, not a folder ...
    """
    return written(f"checkpoint in {folder}", then=_KEPT)


def not_written(folder: Path, error: BaseException, where: str = "") -> OutputError | TrainingError:
    """Return the error to raise for a checkpoint that was not written, see :func:`narrowcast.training.writing.not_written`.

    Args:
        folder: Where it should be.
        error: What went wrong.
        where: What goes before the reason, such as ``rank 1:`` and a blank.
    """
    return writing.not_written(f"checkpoint in {folder}", error, where=where, then=_KEPT)


def write_json(path: Path, content: Any) -> None:
    """Write JSON that every reader understands: no NaN, no infinity."""
    path.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a half of one never has its name."""
    step = step_of(path)
    hidden = path.with_name(f".step-{step:08d}.removed")
    if hidden.exists():
        shutil.rmtree(hidden)
    path.rename(hidden)
    shutil.rmtree(hidden)


def _damaged(path: Path, what: str) -> TrainingError:
    return TrainingError(
        f"checkpoint {path} is damaged: {what}",
        allowed="files as they were written",
        next_step="resume from the one before, or copy it again",
    )
