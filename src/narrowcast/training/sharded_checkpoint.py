"""Checkpoints of several processes, which any number of processes loads, sharded or not.

The files are those of :mod:`narrowcast.training.checkpoint`, except that each process writes its part of the tensors into a
safetensors file of its own: through :mod:`torch.distributed.checkpoint`, whose safetensors storage keeps where a part
belongs in the file's header and needs no pickle. All processes must see the same folder.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load as tensors_from
from safetensors.torch import save as bytes_of
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import zeros as distributed_zeros
from torch.optim import Optimizer

from narrowcast.artifacts.store import file_sha256
from narrowcast.errors import OutputError, TrainingError
from narrowcast.training import checkpoint
from narrowcast.training import checkpoint_folder as folders
from narrowcast.training.checkpoint import STATE, Loaded
from narrowcast.training.distributed import Ranks
from narrowcast.training.state_tree import Leaf, leaves, pack, unpack

__all__ = ["Layout", "OwnLoaded", "load_latest", "save", "whole_tensors"]

_OWN = "own"


@dataclass(frozen=True)
class OwnLoaded(Loaded):
    """A checkpoint that was read on this rank.

    Attributes:
        own: What this rank saved of its own; None if another number of ranks saved.
    """

    own: dict[str, Any] | None


@dataclass(frozen=True)
class Layout:
    """Which tensors of a state are sharded, and how: sharded parameters, their optimizer states, and what rounding cut off.

    Attributes:
        parameters: Sharded parameters by the keys that lead to them, to their optimizer states, or to what rounding cut off.
    """

    parameters: Mapping[tuple[str, ...], DTensor]

    @classmethod
    def of(cls, model: nn.Module, optimizer: Optimizer, *, under: tuple[str, ...] = ("trainer",)) -> Layout:
        """Return the layout of a trainer's state.

        Args:
            model: The module inside of any wrapper.
            optimizer: Its optimizer.
            under: The keys in the saved state that lead to the trainer's.
        """
        moved = [one for group in optimizer.param_groups for one in group["params"]]
        named = {(*under, "model", name): one for name, one in model.named_parameters(remove_duplicate=False)}
        named |= {(*under, "optimizer", "state", str(place)): one for place, one in enumerate(moved)}
        ids = {id(one) for one in moved}
        narrow = [one for one in model.parameters() if one.dtype == torch.bfloat16 and id(one) in ids]
        named |= {(*under, "rounding", "lost", str(place)): one for place, one in enumerate(narrow)}
        return cls({path: one for path, one in named.items() if isinstance(one, DTensor)})

    def empty(self, path: tuple[str, ...], leaf: Leaf) -> Tensor:
        """Return a tensor for a leaf to be read into: of its shape, sharded as its parameter is."""
        parameter = self.parameters.get(path)
        if parameter is None:
            parameter = self.parameters.get(path[:-1])  # a state of the parameter
        if parameter is None or tuple(parameter.shape) != leaf.shape or leaf.stored_dtype != leaf.dtype:
            return torch.empty(leaf.stored_shape, dtype=leaf.stored_dtype)
        return distributed_zeros(
            leaf.shape, dtype=leaf.dtype, device_mesh=parameter.device_mesh, placements=parameter.placements
        )


def save(
    folder: Path,
    state: Mapping[str, Any],
    *,
    step: int,
    ranks: Ranks,
    own: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Write a checkpoint from all ranks so that it is there whole or not at all; each rank must call.

    Args:
        folder: Where this training's checkpoints are, the same for all ranks.
        state: The same on all ranks but for sharded tensors; where ranks differ, rank 0's is saved.
        step: The optimizer step that it belongs to.
        ranks: The processes.
        own: What each rank has of its own, such as random states; saved with the state as ``own``, a list by rank.
        keep: How many checkpoints stay.

    Returns:
        The checkpoint's folder.

    Raises:
        OutputError: The folder cannot be written, or the disk is full; on all ranks, and earlier checkpoints still hold.
        TrainingError: The state holds something that no checkpoint can.
    """
    whole = {**state, _OWN: _gathered(own or {}, ranks)}
    if ranks.world == 1:
        return checkpoint.save(folder, whole, step=step, keep=keep)
    packed = pack(whole)
    hidden = folders.begun(folder, step)
    try:
        _on_first(ranks, lambda: folders.begin(folder, step), folder)
        written = _written(hidden, packed.tensors, ranks, folder)

        def finish() -> None:
            folders.write_json(hidden / STATE, packed.tree)
            folders.sync(hidden / STATE)
            folders.finish(folder, step, written | {STATE: file_sha256(hidden / STATE)}, keep)

        _on_first(ranks, finish, folder)
    except BaseException:
        if ranks.rank == 0:
            folders.discard(folder, step)
        raise
    return folder / f"step-{step:08d}"


def load_latest(folder: Path, *, ranks: Ranks, layout: Layout | None = None) -> OwnLoaded | None:
    """Return the last good checkpoint; None if there is none at all. Each rank must call.

    Args:
        folder: Where the checkpoints are, of any number of ranks, sharded or not.
        ranks: The processes.
        layout: How the tensors of this training are sharded; whole tensors unless given.

    Raises:
        TrainingError: There are checkpoints, and every one is damaged.
    """
    path = _first_good(folder, ranks)
    if path is None:
        return None
    tree = json.loads((path / STATE).read_text(encoding="utf-8"))
    state = unpack(tree, _read(path, tree, layout or Layout({})))
    everyone: list[dict[str, Any]] = state.pop(_OWN, [])
    own = everyone[ranks.rank] if len(everyone) == ranks.world else None
    return OwnLoaded(path, folders.step_of(path) or 0, state, own)


def whole_tensors(path: Path, tree: Any) -> dict[str, Tensor]:
    """Return the tensors of a sharded checkpoint, each put together."""
    return _read(path, tree, Layout({}))


def _read(path: Path, tree: Any, layout: Layout) -> dict[str, Tensor]:
    """Return the parts of a checkpoint's tensors that this process holds."""
    tensors: dict[str, Tensor] = {}
    for keys, leaf in leaves(tree):
        if leaf.name not in tensors:  # tied weights are read once, for all of their names
            tensors[leaf.name] = layout.empty(keys, leaf)
    reader = HuggingFaceStorageReader(str(path))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each reads for itself
            dcp.load(cast("dict[str, Any]", tensors), storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise TrainingError(f"checkpoint {path} cannot be read: {_reason(error)}") from error
    return tensors


def _written(hidden: Path, tensors: Mapping[str, Tensor], ranks: Ranks, folder: Path) -> dict[str, str]:
    """Write each rank's part of the tensors, and return the SHA-256 of every file."""
    writer = HuggingFaceStorageWriter(str(hidden), save_distributed=True)
    try:
        with ranks.watched():
            dcp.save(dict(tensors), storage_writer=writer, planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True))
    except CheckpointException as error:
        rank, (problem, _) = next(iter(error.failures.items()))
        raise folders.not_written(folder, problem, f"rank {rank}: ") from error
    mine = sorted(hidden.glob(f"shard-{ranks.rank + 1:05d}-*"))
    for path in mine:
        folders.sync(path)
    everyone = ranks.gather({path.name: file_sha256(path) for path in mine})
    return {name: sha256 for files in everyone for name, sha256 in files.items()}


def _on_first(ranks: Ranks, work: Callable[[], object], folder: Path) -> None:
    """Run work on rank 0 alone, and raise on all ranks what goes wrong."""
    problem: OutputError | None = None
    if ranks.rank == 0:
        try:
            with folders.output_errors(folder):
                work()
        except OutputError as error:
            problem = error
    said = None if problem is None else (problem.what, problem.allowed, problem.next_step)
    first = ranks.gather(said)[0]
    if first is not None:
        what, allowed, next_step = first
        raise OutputError(what, allowed=allowed, next_step=next_step) from problem


def _gathered(own: Mapping[str, Any], ranks: Ranks) -> list[Any]:
    """Return every rank's own state, in order of ranks."""
    packed = pack(own)
    trees = ranks.gather(packed.tree)
    contents = ranks.gather_bytes(bytes_of({name: tensor.cpu() for name, tensor in packed.tensors.items()}))
    return [unpack(tree, tensors_from(content)) for tree, content in zip(trees, contents, strict=True)]


def _first_good(folder: Path, ranks: Ranks) -> Path | None:
    """Return the last checkpoint whose hashes hold, which rank 0 checks for all."""
    found = folders.complete(folder) if ranks.rank == 0 else []
    chosen: str | None = None
    for path in found:
        try:
            folders.check(path)
        except TrainingError as error:
            warnings.warn(f"{error.what}; the one before is used", RuntimeWarning, stacklevel=3)
        else:
            chosen = path.name
            break
    chosen, count = ranks.gather([chosen, len(found)])[0]
    if chosen is None and count:
        raise TrainingError(
            f"all {count} checkpoints in {folder} are damaged", next_step="train from the start, in a new folder"
        )
    return folder / chosen if chosen is not None else None


def _reason(error: CheckpointException) -> str:
    rank, (problem, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__}"
