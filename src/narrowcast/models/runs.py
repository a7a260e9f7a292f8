"""The folder of a finished training run, read as a trained model: `result.json` names the network, safetensors its weights."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from narrowcast.errors import ModelError
from narrowcast.models.reference import RUN_RECORD

if TYPE_CHECKING:
    from torch import nn

__all__ = ["WEIGHTS", "Architecture", "architecture_of", "load_weights", "read_weights", "sha256_of"]

#: The weights of a finished run.
WEIGHTS = "model.safetensors"

#: Keys that a message lists.
_LISTED = 3


@dataclass(frozen=True)
class Architecture:
    """What a network is, without its weights.

    Attributes:
        name: Reference: ``bundled:``, ``timm:``, ``torchvision:`` or ``py:``.
        arguments: Keyword arguments of its constructor.
        input: Shape of one sample, for schemes that let it be chosen; None for their own.
    """

    name: str
    arguments: Mapping[str, Any]
    input: tuple[int, ...] | None = None


def architecture_of(folder: Path) -> tuple[Architecture, str]:
    """Return what a run trained, and the SHA-256 of the weights that it wrote.

    Raises:
        ModelError: The folder holds no finished run, or its record is damaged.
    """
    file = folder / RUN_RECORD
    if not file.is_file():
        raise ModelError(
            f"folder {folder} holds no {RUN_RECORD}",
            allowed="the folder of a finished training run",
            next_step="finish it: narrowcast train CONFIG --out FOLDER --resume",
        )
    try:
        record = cast(dict[str, Any], json.loads(file.read_text(encoding="utf-8")))
        shape = record["input"]
        found = Architecture(
            str(record["model"]), dict(record["arguments"]), None if shape is None else tuple(map(int, shape))
        )
        return found, str(record["sha256"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ModelError(
            f"{file} cannot be read as the record of a training run: {type(error).__name__}: {error}",
            next_step="train again, or restore the file",
        ) from error


def read_weights(folder: Path, sha256: str) -> dict[str, Any]:
    """Return the tensors that a run wrote.

    Raises:
        ModelError: The file is missing, damaged, or not the one that the record names.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        raise ModelError(f"folder {folder} holds no {WEIGHTS}", next_step="train again, or restore the file")
    if sha256_of(file) != sha256:
        raise ModelError(
            f"{file} is not the file that {RUN_RECORD} names: its SHA-256 differs",
            next_step="restore the file, or train again",
        )
    safetensors: Any = importlib.import_module("safetensors.torch")
    return dict(safetensors.load_file(file))


def load_weights(module: nn.Module, tensors: Mapping[str, Any], source: str) -> None:
    """Copy tensors into a module, which must have the same keys and shapes; dtypes follow the module.

    Raises:
        ModelError: Keys or shapes differ; the message names the first ones.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    missing, extra = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    other = [name for name in sorted(wanted.keys() & given.keys()) if wanted[name] != given[name]]
    parts = [f"without {_some(missing)}"] if missing else []
    parts += [f"with {_some(extra)}, which the network has not"] if extra else []
    parts += [f"{other[0]} is {list(given[other[0]])}, in the network {list(wanted[other[0]])}"] if other else []
    if parts:
        raise ModelError(
            f"the weights of {source} are of another network: {'; '.join(parts)}",
            next_step="give the network, with its arguments, that the weights were trained in",
        )
    module.load_state_dict(dict(tensors))


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
