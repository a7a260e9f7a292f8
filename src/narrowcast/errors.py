"""Every error that narrowcast raises on purpose.

The tree::

    NarrowcastError
    ├── UserError                 something the user gave or asked for cannot be used (exit code 2)
    │   ├── ModelError            the model cannot be found, read, or exported
    │   ├── DataError             the data cannot be read or does not fit the model
    │   ├── MetricError           the metric is unknown or does not fit the data
    │   ├── FormatError           a number format is unknown, or cannot hold or encode what was given
    │   ├── DeviceError           a device is unknown, or the user's catalogue of devices cannot be read
    │   ├── BudgetError           the budget cannot be parsed or contradicts itself
    │   ├── ConfigError           a training config has an unknown key or a value that is not allowed
    │   ├── TrainingError         training cannot start or go on with what was given (batch, checkpoint, loss, ranks)
    │   ├── OutputError           the output folder cannot be used
    │   ├── ArtifactError         a folder is not an artifact, is damaged, or was built by an incompatible version
    │   └── RuntimeMissingError   the runtime (or an extra that is needed) is unknown or not installed
    └── RuntimeFailedError        a runtime refused a graph that narrowcast gave it (exit code 2)

A budget that cannot be met is not an error: it is an answer (``Result.met`` is false, exit code 3).
Each message names the thing and its value, says what is allowed, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArtifactError",
    "BudgetError",
    "ConfigError",
    "DataError",
    "DeviceError",
    "FormatError",
    "MetricError",
    "ModelError",
    "NarrowcastError",
    "OutputError",
    "RuntimeFailedError",
    "RuntimeMissingError",
    "TrainingError",
    "UserError",
    "choices",
]


class NarrowcastError(Exception):
    """Base of all errors that narrowcast raises on purpose.

    Args:
        what: The thing that is wrong, with its name and value.
        allowed: What would have been accepted.
        next_step: What the reader can do about it.
    """

    def __init__(self, what: str, *, allowed: str = "", next_step: str = "") -> None:
        self.what = what
        self.allowed = allowed
        self.next_step = next_step
        lines = [what]
        if allowed:
            lines.append(f"Allowed: {allowed}")
        if next_step:
            lines.append(f"Next: {next_step}")
        super().__init__("\n".join(lines))


class UserError(NarrowcastError):
    """Something that the user gave or asked for cannot be used."""


class ModelError(UserError):
    """A model cannot be found, read or exported."""


class DataError(UserError):
    """Data cannot be read, or do not fit the model."""


class MetricError(UserError):
    """A metric is unknown, or does not fit the data or the model's outputs."""


class FormatError(UserError):
    """A number format is unknown or contradicts itself, or cannot hold or encode what it was given."""


class DeviceError(UserError):
    """A device is unknown, or a catalogue of devices cannot be read."""


class BudgetError(UserError):
    """A budget cannot be parsed, or contradicts itself."""


class ConfigError(UserError):
    """A training config has a key that nothing reads, or a value that is not allowed."""


class TrainingError(UserError):
    """Training cannot start or go on with what was given: the batch, the checkpoint, the loss or the ranks."""


class OutputError(UserError):
    """The output folder cannot be written, or holds something already."""


class ArtifactError(UserError):
    """A folder is no artifact, is damaged, or was built by an incompatible version."""


class RuntimeMissingError(UserError):
    """A runtime is unknown, or an extra that the request needs is not installed."""


class RuntimeFailedError(NarrowcastError):
    """A runtime refused a graph, or failed while running it."""


def choices(given: str, known: Iterable[str], nearest: int = 1) -> str:
    """Return the allowed names as a sentence part, and those nearest to what was given, if there are any.

    >>> choices("onxruntime", ["onnxruntime", "openvino"])
    'onnxruntime, openvino (did you mean onnxruntime?)'
    """
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=nearest)
    text = ", ".join(names)
    return f"{text} (did you mean {' or '.join(near)}?)" if near else text
