"""What a run writes while it goes: a line of JSON for each step that is logged, and TensorBoard's scalars."""

from __future__ import annotations

import importlib
import json
import math
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from narrowcast.errors import RuntimeMissingError
from narrowcast.training.writing import written

__all__ = ["LOG", "SKIPS", "TENSORBOARD", "RunLog", "keep_lines", "read_log"]

LOG = "log.jsonl"
SKIPS = "skips.jsonl"
TENSORBOARD = "tensorboard"


class RunLog:
    """Writes ``log.jsonl``, and scalars for TensorBoard where they are asked for; to be closed.

    Args:
        folder: The run's.
        tensorboard: Whether scalars go to ``tensorboard/`` as well.
        lines: Lines of an interrupted run that hold; those after them go.
        step: The step that it goes on after; TensorBoard drops what came later.

    Raises:
        OutputError: The folder cannot be written.
        RuntimeMissingError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, *, tensorboard: bool, lines: int = 0, step: int = 0) -> None:
        self._path = folder / LOG
        self.lines = lines
        with self._written():
            self._board = _writer(folder / TENSORBOARD, step) if tensorboard else None
            keep_lines(self._path, lines)
            self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, record: dict[str, Any]) -> None:
        """Add a line: the step, and what is known of it; numbers also go to TensorBoard.

        Raises:
            OutputError: The file cannot be written.
        """
        with self._written():
            self._file.write(json.dumps({"step": step, **_plain(record)}, allow_nan=False) + "\n")
            self._file.flush()  # a killed process leaves what was logged
        self.lines += 1
        if self._board is not None:
            for name, value in _scalars(record):
                self._board.add_scalar(name, value, step)

    def _written(self) -> AbstractContextManager[None]:
        return written(
            f"the log {self._path}",
            elsewhere="name another folder with --out",
            then="checkpoints that are there still hold",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is not None:
            self._board.close()
        with self._written():  # what a full disk did not take is tried again
            self._file.close()


def keep_lines(path: Path, lines: int) -> None:
    """Cut a file after its first lines; one that is not there stays so."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        whole = 0
        for _ in range(lines):
            if not file.readline().endswith(b"\n"):  # it holds fewer, and perhaps a torn one
                break
            whole = file.tell()
        file.truncate(whole)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log; a last one that was cut off by a kill is left out."""
    text = (folder / LOG).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _plain(value: Any) -> Any:
    """Return a value with texts in place of the numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _scalars(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, dict):
            found += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((f"{prefix}{name}", float(value)))
    return found


def _writer(folder: Path, step: int) -> Any:
    try:
        importlib.import_module("tensorboard")
    except ImportError as error:
        raise RuntimeMissingError(
            "log.tensorboard needs TensorBoard, which is not installed",
            next_step="install it with: pip install 'narrowcast[train]', or leave log.tensorboard out",
        ) from error
    library: Any = importlib.import_module("torch.utils.tensorboard")
    return library.SummaryWriter(str(folder), purge_step=step + 1 if step else None)
