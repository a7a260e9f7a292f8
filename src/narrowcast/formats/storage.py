"""Arrays by name in a safetensors file, with what describes them in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np

from narrowcast.errors import FormatError

__all__ = ["read", "write"]

_VERSION = "1"


def write(path: str | Path, arrays: Mapping[str, np.ndarray], described: Mapping[str, Any]) -> None:
    """Write a file, all of it or nothing.

    Raises:
        FormatError: The folder cannot be written.
    """
    from safetensors.numpy import save

    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    content = save(whole, {"narrowcast.formats": _VERSION, "tensors": json.dumps(described)})
    path = _path(path)
    try:
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            file.write(content)
        Path(file.name).replace(path)
    except OSError as error:
        raise FormatError(f"{path} cannot be written: {error.strerror}", allowed="a folder that can be") from None


def read(path: str | Path, *, torch: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays of a file, as NumPy's or torch's, and what describes them.

    Raises:
        FormatError: No such file, or one that this version cannot read.
    """
    from safetensors import SafetensorError, safe_open

    path = _path(path)
    try:
        with safe_open(path, framework="pt" if torch else "numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path} cannot be read: {error}", allowed="a safetensors file") from None
    if metadata.get("narrowcast.formats") != _VERSION:
        raise FormatError(
            f"{path} holds no quantised tensors of this version (it says {metadata.get('narrowcast.formats')!r})",
            allowed=f"version {_VERSION!r}",
            next_step="write it again with narrowcast.formats.save",
        )
    try:
        return arrays, dict(json.loads(metadata["tensors"]))
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path} is damaged: {error!r}", next_step="write it again") from None


def _path(path: str | Path) -> Path:
    try:
        return Path(path)
    except TypeError:
        raise FormatError(f"path = {path!r:.100}", allowed="the path of a file, as text or pathlib.Path") from None
