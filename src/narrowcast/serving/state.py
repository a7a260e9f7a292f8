"""What a repository remembers of the changes that were made to it: promotions, splits and what was before them.

One small JSON file per root. A server that may not write there serves all the same, and says that it will forget.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, ValidationError

from narrowcast.errors import ConfigError, NarrowcastError, OutputError
from narrowcast.serving.plain_files import NotPlainError, read_plain
from narrowcast.serving.watching.events import fields

__all__ = ["STATE", "ModelState", "StateKeeper", "read_state", "write_state"]

_log = logging.getLogger(__name__)
#: Name of the file in the root of a repository.
STATE = "serving-state.json"
#: A longer file is none of ours.
_LONGEST = 1 << 20

Weights = Annotated[dict[PositiveInt, Annotated[FiniteFloat, Field(gt=0)]], Field(min_length=1, max_length=16)]


class ModelState(BaseModel):
    """What is remembered of one model.

    Attributes:
        traffic: Weights by version as somebody chose them; None where the newest version answers.
        history: The same of before, the oldest first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    traffic: Weights | None = None
    history: tuple[Weights, ...] = ()


class _State(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Annotated[int, Field(ge=1, le=1)] = 1
    models: dict[str, ModelState] = {}


def read_state(root: Path) -> dict[str, ModelState]:
    """Return what a root remembers, by model; nothing where it has no file.

    Raises:
        ConfigError: The file cannot be read, is a link, or holds something else.
    """
    path = root / STATE
    try:
        text = read_plain(path, _LONGEST)
    except NotPlainError as error:
        raise _broken(path, str(error)) from error
    if text is None:
        return {}
    try:
        return _State.model_validate_json(text).models
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise _broken(path, f"{where}: {first['msg']}" if where else first["msg"]) from error


def _broken(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"the promotions in {path} cannot be read: {why}",
        next_step="mend the file, or remove it and the newest versions answer",
    )


def write_state(root: Path, name: str, state: ModelState) -> None:
    """Remember one model's state beside those of the others; the file is there as it was or as it will be, never in part.

    Raises:
        ConfigError: The file that is there cannot be read.
        OutputError: It cannot be written.
    """
    models = read_state(root)
    if models.get(name, ModelState()) == state:
        return
    if state == ModelState():
        models.pop(name, None)
    else:
        models[name] = state
    partial: Path | None = None
    try:
        with NamedTemporaryFile("wb", dir=root, prefix=f".{STATE}.", delete=False) as file:
            partial = Path(file.name)
            file.write(_State(models=models).model_dump_json(indent=1).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o644)
        partial.replace(root / STATE)
        partial = None
    except OSError as error:
        raise OutputError(f"{root / STATE} cannot be written: {error.strerror or error}") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


class StateKeeper:
    """Writes states down, one after the other, while the server goes on."""

    def __init__(self) -> None:
        self._writing = asyncio.Lock()

    async def keep(self, root: Path | None, name: str, state: Callable[[], ModelState]) -> str:
        """Remember a model's state, as it is when its turn has come; return why that is not so, or nothing.

        Args:
            root: The folder of models that it is in, or None where it is in none.
            name: The model.
            state: Gives its state.
        """
        if root is None:
            return "the model is in no folder of models"
        try:
            async with self._writing:
                await asyncio.to_thread(write_state, root, name, state())
        except NarrowcastError as error:
            _log.warning(
                "a change of model %s will be forgotten: %s",
                *(name, error.what),
                extra=fields("change_not_kept", model=name),
            )
            return error.what
        return ""
