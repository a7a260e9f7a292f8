"""What a person says about serving, on the command line or in a file beside a model, as values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt, ValidationError
from pydantic_core import from_json

from narrowcast.errors import ConfigError, choices
from narrowcast.serving.hosting import Hosting
from narrowcast.serving.plain_files import NotPlainError, read_plain
from narrowcast.serving.repository import VersionPolicy
from narrowcast.serving.scheduling.queue import Batching
from narrowcast.serving.workers.sources import Placement

__all__ = [
    "OPTIONS",
    "ModelOptions",
    "read_model_options",
    "read_options",
    "read_placement",
    "read_sizes",
    "read_versions",
]

#: Name of the file beside a model's versions.
OPTIONS = "serving.json"
_LONGEST = 1 << 16
_NAMED = re.compile(r"=\d{1,18}(,\d{1,18})*")
_SIZES = re.compile(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*")
_LATEST = re.compile(r"[1-9]\d{0,5}")

_T = TypeVar("_T")
Size = Annotated[int, Field(ge=1, le=1 << 20)]
Level = Annotated[int, Field(ge=1, le=64)]


class ModelOptions(BaseModel):
    """How a model is served, as far as somebody said so; None leaves it as it is.

    Attributes:
        placement: Where its workers are: process, thread or inline.
        workers: Workers of each version.
        versions: Versions to load, as :func:`read_versions` reads them.
        load: When they are loaded: at startup, or on-demand, which is at their first request.
        batching: dynamic runs what waits; static waits for full batches and fills up those that it cannot wait for.
        max_batch: Rows that run together at most; the size of every static batch.
        delay: Milliseconds that the oldest request waits for company.
        preferred: Batch sizes that run at once.
        pad: Whether batches are filled up to the next preferred size.
        queue: Requests that may wait.
        timeout: Seconds that a request waits where its client says nothing; 0 for ever.
        batch_timeout: Seconds that a batch may run before its worker is ended; 0 for ever.
        priority_levels: Highest number that a request may give as its priority; 1 goes first.
        default_priority: Priority of requests that give none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    placement: str | None = None
    workers: Annotated[int, Field(ge=1, le=1024)] | None = None
    versions: str | PositiveInt | None = None
    load: Literal["startup", "on-demand"] | None = None
    batching: Literal["dynamic", "static"] | None = None
    max_batch: Size | None = None
    delay: Annotated[NonNegativeFloat, Field(le=60_000)] | None = None
    preferred: list[Size] | None = None
    pad: bool | None = None
    queue: PositiveInt | None = None
    timeout: NonNegativeFloat | None = None
    batch_timeout: NonNegativeFloat | None = None
    priority_levels: Level | None = None
    default_priority: Level | None = None

    def over(self, hosting: Hosting) -> Hosting:
        """Return how a model is run that would otherwise be run so.

        Raises:
            ConfigError: What is said contradicts itself, or what it is put over.
        """
        settings = hosting.settings
        levels = _or(self.priority_levels, settings.priority_levels)
        default = _or(self.default_priority, min(settings.default_priority, levels))
        if default > levels:
            raise ConfigError(f"default_priority {default} is above priority_levels {levels}", allowed=f"1 to {levels}")
        settings = replace(
            settings,
            batching=self._batching(settings.batching),
            queue=_or(self.queue, settings.queue),
            timeout=settings.timeout if self.timeout is None else self.timeout or None,
            batch_timeout=settings.batch_timeout if self.batch_timeout is None else self.batch_timeout or None,
            priority_levels=levels,
            default_priority=default,
        )
        return Hosting(
            placement=hosting.placement if self.placement is None else read_placement(self.placement),
            workers=_or(self.workers, hosting.workers),
            settings=settings,
            policy=hosting.policy if self.versions is None else read_versions(str(self.versions)),
            on_demand=hosting.on_demand if self.load is None else self.load == "on-demand",
        )

    def _batching(self, before: Batching) -> Batching:
        largest = _or(self.max_batch, before.largest)
        delay_ns = before.delay_ns if self.delay is None else round(self.delay * 1e6)
        static = before.is_static if self.batching is None else self.batching == "static"
        if static:
            if self.preferred or self.pad is False:
                raise ConfigError(
                    "static batches all have the size max_batch and are filled up to it",
                    next_step="leave preferred and pad out, or use dynamic batching",
                )
            if not delay_ns:
                raise ConfigError(
                    "static batching needs a delay: how long a batch that is not full waits",
                    allowed="milliseconds above 0",
                )
            return Batching.static(largest, delay_ns)
        kept = Batching() if before.is_static else before
        preferred = tuple(sorted(set(self.preferred))) if self.preferred is not None else kept.preferred
        if preferred and preferred[-1] > largest:
            raise ConfigError(
                f"preferred batch size {preferred[-1]} is above max_batch {largest}", allowed=f"sizes up to {largest}"
            )
        return Batching(largest, delay_ns, preferred, _or(self.pad, kept.pad))


def _or(given: _T | None, otherwise: _T) -> _T:
    return otherwise if given is None else given


def read_options(values: Mapping[str, Any], source: str) -> ModelOptions:
    """Return the options that names and values describe.

    Args:
        values: The values by name.
        source: Where they come from, for messages.

    Raises:
        ConfigError: A name is unknown, or a value is not allowed.
    """
    names = list(ModelOptions.model_fields)
    for name in values:
        if name not in names:
            raise ConfigError(f"{source}: {name!r} is unknown", allowed=choices(name, names))
    try:
        return ModelOptions.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise ConfigError(f"{source}: {first['loc'][0]} {first['input']!r}: {first['msg']}") from error


def read_model_options(folder: Path, hosting: Hosting) -> Hosting:
    """Return how the model in a folder is run, by the file beside its versions, if there is one.

    Args:
        folder: The folder of the model.
        hosting: How it is run where its file says nothing.

    Raises:
        ConfigError: The file cannot be read, or says something that is not allowed.
    """
    path = folder / OPTIONS
    try:
        text = read_plain(path, _LONGEST)
        values = {} if text is None else from_json(text)
    except (NotPlainError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", allowed="a JSON object of options") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no object", allowed="a JSON object of options")
    try:
        return read_options(values, str(path)).over(hosting)
    except ConfigError as error:
        if error.what.startswith(str(path)):
            raise
        raise ConfigError(f"{path}: {error.what}", allowed=error.allowed, next_step=error.next_step) from error


def read_sizes(text: str) -> list[int]:
    """Return batch sizes as in ``4,8``; none for an empty text.

    Raises:
        ConfigError: The text is none of these.
    """
    if not text:
        return []
    if not _SIZES.fullmatch(text):
        raise ConfigError(f"batch sizes {text!r} cannot be read", allowed="numbers as in 4,8")
    return [int(size) for size in text.split(",")]


def read_placement(text: str) -> Placement:
    """Return where models run.

    Raises:
        ConfigError: There is no such place.
    """
    try:
        return Placement(text)
    except ValueError:
        raise ConfigError(f"placement {text!r} is unknown", allowed=choices(text, list(Placement))) from None


def read_versions(text: str) -> VersionPolicy:
    """Return which versions are loaded: ``2`` for the two newest, ``all``, or ``=3,7`` for these.

    Raises:
        ConfigError: The text is none of these.
    """
    if text == "all":
        return VersionPolicy(latest=0)
    if _LATEST.fullmatch(text):
        return VersionPolicy(latest=int(text))
    if _NAMED.fullmatch(text):
        return VersionPolicy(named=tuple(int(number) for number in text[1:].split(",")))
    raise ConfigError(f"versions {text!r} cannot be read", allowed="a number of the newest, all, or numbers as in =3,7")
