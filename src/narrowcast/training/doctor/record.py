"""What the numerics doctor saw in a run, written to and read from ``RUN_DIR/doctor/``. It needs no torch.

:func:`read` gives a :class:`~narrowcast.training.doctor.values.Record`: the setting, one reading a step, one series of
histograms for each layer and pass, the events with their causes, the advice, and the verdict. Shares in other formats come
from a series by :func:`narrowcast.training.doctor.whatif.shares`::

    record = read("run")
    for series in record.series:
        print(series.layer, series.part, shares(series.total, "e5m2", largest=series.largest.max()).overflow.high)

Gradients are counted without the loss scale (divided by it), so one histogram serves every scale: what FP16 did to them at
the scale ``s`` is ``shares(series.total, "fp16", scale=s)``.

The folder holds ``record.jsonl``, one JSON object a line with the key ``type`` (``setting``, ``reading``, ``event``,
``mark``, ``summary``; the last summary holds), ``histograms.safetensors``, and copies of it beside checkpoints (see
:mod:`narrowcast.training.doctor.resuming`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from narrowcast.artifacts.store import write_atomic
from narrowcast.errors import ArtifactError
from narrowcast.training.doctor.buckets import BUCKETS, COLUMNS
from narrowcast.training.doctor.values import (
    SCHEMA,
    Event,
    Mark,
    Part,
    Reading,
    Record,
    Series,
    Setting,
    Summary,
)

__all__ = ["FOLDER", "HISTOGRAMS", "LINES", "append", "lines", "read", "write_lines", "write_series"]

#: Name of the folder in a run's folder.
FOLDER = "doctor"
#: Name of the file of readings, events and the rest in it.
LINES = "record.jsonl"
#: Name of the file of histograms in it.
HISTOGRAMS = "histograms.safetensors"

Line = Setting | Reading | Event | Mark | Summary
_TYPES: dict[str, type[Line]] = {
    "setting": Setting,
    "reading": Reading,
    "event": Event,
    "mark": Mark,
    "summary": Summary,
}
_NAMES = {kind: name for name, kind in _TYPES.items()}

# Writing --------------------------------------------------------------------------------------------------------------


def append(folder: Path, values: Iterable[Line]) -> None:
    """Append values to the record in a folder, which is made if it is missing.

    Args:
        folder: The doctor's own folder, ``RUN_DIR/doctor``.
        values: What to write, one line each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LINES).open("a", encoding="utf-8") as file:
        file.writelines(map(_line, values))


def write_lines(folder: Path, values: Iterable[Line]) -> None:
    """Write values in place of all lines before; a reader sees the old file or the new one, never half of one."""
    write_atomic(folder / LINES, "".join(map(_line, values)))


def _line(value: Line) -> str:
    return json.dumps({"type": _NAMES[type(value)], **json.loads(value.model_dump_json())}) + "\n"


def write_series(folder: Path, series: Sequence[Series]) -> None:
    """Write all histograms in place of those before; a reader sees the old file or the new one, never half of one."""
    from safetensors.numpy import save_file

    tensors = {f"{number}.{name}": array for number, one in enumerate(series) for name, array in _stored(one).items()}
    names = json.dumps([[one.layer, one.part.value] for one in series])
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{HISTOGRAMS}.partial"
    save_file(tensors, partial, metadata={"schema": str(SCHEMA), "series": names})
    partial.replace(folder / HISTOGRAMS)


def _stored(one: Series) -> dict[str, np.ndarray]:
    """Return the arrays of a series, without the empty columns at both ends and without empty buckets."""
    used = np.flatnonzero(one.columns.any(0))
    start, stop = (int(used[0]), int(used[-1]) + 1) if used.size else (0, 0)
    filled = np.flatnonzero(one.total)
    return {
        "steps": np.asarray(one.steps, np.int64),
        "scales": np.asarray(one.scales, np.float64),
        "largest": np.asarray(one.largest, np.float64),
        "columns": np.ascontiguousarray(one.columns[:, start:stop], np.int64),
        "start": np.array([start], np.int64),
        "buckets": filled.astype(np.int64),
        "counts": one.total[filled].astype(np.int64),
        "numbers": np.array([one.numbers], np.int64),
        "seen": np.array([one.seen], np.int64),
    }


# Reading --------------------------------------------------------------------------------------------------------------


def read(run_dir: str | Path) -> Record:
    """Return what the doctor saw in a run.

    Args:
        run_dir: The run's folder, or the doctor's own inside it.

    Raises:
        ArtifactError: No record, one that cannot be read, a damaged one, or one of another version.
    """
    folder = Path(run_dir)
    folder = folder if (folder / LINES).is_file() else folder / FOLDER
    if not (folder / LINES).is_file():
        raise ArtifactError(
            f"{Path(run_dir)} holds no record of the numerics doctor ({FOLDER}/{LINES})",
            next_step="train with the doctor on; `narrowcast train` has it on unless told otherwise",
        )
    values = lines(folder / LINES)
    setting = next((value for value in reversed(values) if isinstance(value, Setting)), None)
    if setting is None:
        raise ArtifactError(f"{folder / LINES} says nothing of its setting")
    readings = {value.step: value for value in values if isinstance(value, Reading)}
    return Record(
        setting=setting,
        readings=tuple(readings[step] for step in sorted(readings)),
        events=tuple(value for value in values if isinstance(value, Event)),
        series=_series(folder / HISTOGRAMS),
        summary=next((value for value in reversed(values) if isinstance(value, Summary)), None),
    )


def lines(path: Path) -> list[Line]:
    """Return the values of a record's lines; a last one without its end was cut off by a kill and is left out.

    Raises:
        ArtifactError: The file cannot be read, a line is damaged, or the record is of another version.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from None
    whole = content.split(b"\n")[:-1]  # behind the last end of a line there is nothing, or what was cut off
    return [_value(text, path, number) for number, text in enumerate(whole, 1)]


def _value(text: bytes, path: Path, number: int) -> Line:
    damaged = f"{path} is damaged at line {number}"
    try:
        data: Any = json.loads(text)
        kind = _TYPES[data.pop("type")]
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
        raise ArtifactError(damaged, allowed=f"JSON objects of type {', '.join(_TYPES)}") from None
    if kind is Setting:
        _check_version(path, data.get("schema_version"))
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{damaged}, {_NAMES[kind]}: {key}: {first['msg']}") from None


def _check_version(path: Path, version: object) -> None:
    if str(version) != str(SCHEMA):
        raise ArtifactError(
            f"{path} has version {version}",
            allowed=f"version {SCHEMA}",
            next_step="read it with the narrowcast that wrote it, or train again",
        )


def _series(path: Path) -> tuple[Series, ...]:
    if not path.is_file():
        return ()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            _check_version(path, about.get("schema"))
            names = json.loads(about["series"])
            return tuple(_one(file, number, layer, Part(part)) for number, (layer, part) in enumerate(names))
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from None


def _one(file: Any, number: int, layer: str, part: Part) -> Series:
    names = ("steps", "scales", "largest", "columns", "start", "buckets", "counts", "numbers", "seen")
    stored = {name: np.asarray(file.get_tensor(f"{number}.{name}")) for name in names}
    steps, kept = stored["steps"], stored["columns"]
    if {len(stored[name]) for name in ("scales", "largest", "columns")} != {len(steps)}:
        raise ValueError(f"series {number} does not hold as many samples of one kind as of another")
    columns = np.zeros((len(steps), COLUMNS), np.int64)
    start = int(stored["start"][0])
    columns[:, start : start + kept.shape[1]] = kept
    total = np.zeros(BUCKETS, np.int64)
    total[stored["buckets"]] = stored["counts"]
    counts = int(stored["numbers"][0]), int(stored["seen"][0])
    return Series(layer, part, steps, stored["scales"], columns, stored["largest"], total, *counts)
