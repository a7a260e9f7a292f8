"""Checkpoints: safetensors and JSON, whole or not at all, and the last good one when training is resumed.

``folder/step-00000100/`` holds ``tensors.safetensors``, ``state.json`` (the rest of the state, which names the tensors) and
``manifest.json`` (sizes and SHA-256). :mod:`narrowcast.training.state_tree` says what a state may hold, and
:mod:`narrowcast.training.checkpoint_folder` why a kill at any instant leaves the last good one.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from narrowcast.artifacts.store import file_sha256
from narrowcast.errors import TrainingError
from narrowcast.training import checkpoint_folder as folders
from narrowcast.training.state_tree import Packed, is_sharded, pack, unpack

__all__ = ["STATE", "TENSORS", "Loaded", "Saver", "check_keys", "latest", "load", "load_latest", "save"]

TENSORS = "tensors.safetensors"
STATE = "state.json"
_SHOWN = 3  # differing keys of a kind in a message


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was read.

    Attributes:
        path: Its folder.
        step: The optimizer step that it was saved after.
        state: What was saved.
    """

    path: Path
    step: int
    state: dict[str, Any]


def save(folder: Path, state: Mapping[str, Any], *, step: int, keep: int = 2) -> Path:
    """Write a checkpoint so that it is there whole or not at all.

    Args:
        folder: Where this training's checkpoints are. Those of later steps, from a line that was left, go.
        state: Nested dictionaries of tensors, numbers and containers of them.
        step: The optimizer step that the state belongs to.
        keep: How many checkpoints stay, this one included; 1 or more.

    Returns:
        The checkpoint's folder, ``folder/step-00000100``.

    Raises:
        OutputError: The folder cannot be written, or the disk is full; earlier checkpoints still hold.
        TrainingError: The state holds something that no checkpoint can.
    """
    return _write(folder, pack(state), step, keep)


def latest(folder: Path) -> Path | None:
    """Return the last checkpoint that was written to its end; None if there is none."""
    return next(iter(folders.complete(folder)), None)


def load(path: Path, *, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Return the state of a checkpoint after its hashes were checked.

    A sharded checkpoint comes with whole tensors.

    Args:
        path: Its folder.
        map_location: Where its tensors are put.

    Raises:
        TrainingError: It is no checkpoint, or it is damaged.
    """
    try:
        folders.check(path)
        stored = json.loads((path / STATE).read_text(encoding="utf-8"))
        if not (path / TENSORS).exists():
            from narrowcast.training.sharded_checkpoint import whole_tensors  # loads torch's distributed part

            tensors = whole_tensors(path, stored)
        else:
            tensors = load_file(path / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingError(f"checkpoint {path} cannot be read: {error}") from error
    return unpack(stored, {name: tensor.to(map_location) for name, tensor in tensors.items()})


def load_latest(folder: Path, *, map_location: str | torch.device = "cpu") -> Loaded | None:
    """Return the last good checkpoint; None if there is no checkpoint at all.

    A damaged one is passed over with a warning that says what is wrong with it.

    Raises:
        TrainingError: There are checkpoints, and every one is damaged.
    """
    found = folders.complete(folder)
    for path in found:
        try:
            state = load(path, map_location=map_location)
        except TrainingError as error:
            warnings.warn(f"{error.what}; the one before is used", RuntimeWarning, stacklevel=2)
        else:
            return Loaded(path, folders.step_of(path) or 0, state)
    if found:
        raise TrainingError(
            f"all {len(found)} checkpoints in {folder} are damaged", next_step="train from the start, in a new folder"
        )
    return None


def check_keys(expected: Mapping[str, torch.Tensor], found: Mapping[str, Any], what: str) -> None:
    """Make sure that a checkpoint's tensors are those of a model: the same keys, shapes and dtypes.

    Args:
        expected: The model's ``state_dict()``.
        found: The checkpoint's.
        what: What is loaded, for the message, such as the checkpoint's path.

    Raises:
        TrainingError: They differ; the message counts the differing keys and names a few.
    """
    lacking = [key for key in expected if key not in found]
    unknown = [key for key in found if key not in expected]
    differing = [
        f"{key} ({_kind(tensor)} in the model, {_kind(found[key])} in the checkpoint)"
        for key, tensor in expected.items()
        if key in found and _kind(tensor) != _kind(found[key])
    ]
    parts = [("only in the model", lacking), ("only in the checkpoint", unknown), ("different", differing)]
    said = [f"{len(keys)} {how}: {_few(keys)}" for how, keys in parts if keys]
    if said:
        raise TrainingError(
            f"{what} is of another model: {'; '.join(said)}",
            allowed=f"a checkpoint with the model's {len(expected)} tensors",
            next_step="build the model that was trained, or train this one in a new folder",
        )


class Saver:
    """Writes checkpoints in a thread, from a copy, so that training goes on meanwhile.

    One is written at a time: the next :meth:`save` waits for the one before, and raises what went wrong with it, as
    leaving the ``with`` block does. The copy takes the state's size in main memory.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self._folder = folder
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[Path] | None = None

    def save(self, state: Mapping[str, Any], *, step: int) -> None:
        """Copy a state and begin to write it; raises what :func:`narrowcast.training.checkpoint.save` does."""
        self.wait()
        packed = pack(state)
        copied = {name: tensor.to("cpu", copy=True) for name, tensor in packed.tensors.items()}
        self._running = self._thread.submit(_write, self._folder, Packed(packed.tree, copied), step, self._keep)

    def wait(self) -> Path | None:
        """Wait for what is being written, and return its folder."""
        running, self._running = self._running, None
        return running.result() if running is not None else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def _write(folder: Path, packed: Packed, step: int, keep: int) -> Path:
    if keep < 1:
        raise TrainingError(f"keep = {keep} checkpoints", allowed="1 or more")
    for name, tensor in packed.tensors.items():
        if is_sharded(tensor):
            raise TrainingError(
                f"{name} is sharded over ranks", next_step="save it with narrowcast.training.sharded_checkpoint.save"
            )
    with folders.output_errors(folder):
        hidden = folders.begin(folder, step)
        try:
            save_file({name: tensor.cpu() for name, tensor in packed.tensors.items()}, hidden / TENSORS)
            folders.write_json(hidden / STATE, packed.tree)
            for name in (TENSORS, STATE):
                folders.sync(hidden / name)
            hashes = {name: file_sha256(hidden / name) for name in (TENSORS, STATE)}
            return folders.finish(folder, step, hashes, keep)
        except BaseException:
            folders.discard(folder, step)
            raise


def _kind(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _few(keys: list[str]) -> str:
    more = len(keys) - _SHOWN
    return ", ".join(keys[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
