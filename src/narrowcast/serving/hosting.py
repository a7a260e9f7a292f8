"""How a model is run, and a version of it that runs."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from narrowcast.errors import NarrowcastError, RuntimeFailedError
from narrowcast.serving.memory import Holding
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.repository import VersionPolicy
from narrowcast.serving.scheduling.scheduler import Scheduler, Settings
from narrowcast.serving.scheduling.statistics import Statistics
from narrowcast.serving.workers.sources import Placement, Source

__all__ = ["ColdError", "Hosting", "ServedVersion", "start_version"]


@dataclass(frozen=True)
class Hosting:
    """How models are run.

    Attributes:
        placement: Where their workers are.
        workers: How many each version has.
        settings: How their requests are scheduled.
        policy: Which versions are loaded.
        on_demand: Whether a version is loaded at its first request, and not when the server starts.
    """

    placement: Placement = Placement.PROCESS
    workers: int = 1
    settings: Settings = field(default_factory=Settings)
    policy: VersionPolicy = field(default_factory=VersionPolicy)
    on_demand: bool = False


@dataclass(frozen=True)
class ServedVersion:
    """One loaded version of a model.

    Attributes:
        name: The model.
        version: The number of the version.
        scheduler: What takes its requests.
        hosting: How it is run.
        holding: The memory that it takes.
    """

    name: str
    version: str
    scheduler: Scheduler
    hosting: Hosting
    holding: Holding[ServedVersion]


class ColdError(Exception):
    """A version is served and has to be loaded first.

    Args:
        name: The model.
        version: The version.
    """

    def __init__(self, name: str, version: int) -> None:
        super().__init__(f"model {name!r} version {version} has to be loaded first")
        self.name = name
        self.version = version


async def start_version(
    name: str,
    version: int,
    source: Source,
    hosting: Hosting,
    statistics: Statistics,
    holding: Holding[ServedVersion],
) -> ServedVersion:
    """Start the workers of a version and return it when all are ready.

    Raises:
        NarrowcastError: One cannot be started; then none is left.
    """
    workers = [source.worker(hosting.placement) for _ in range(hosting.workers)]
    starts = [asyncio.ensure_future(worker.start()) for worker in workers]
    try:
        await asyncio.gather(*starts)
    except BaseException as error:
        for start in starts:
            start.cancel()
        await asyncio.gather(*starts, return_exceptions=True)
        await asyncio.gather(*(worker.close() for worker in workers))
        if isinstance(error, NarrowcastError | Refusal) or not isinstance(error, Exception):
            raise
        raise RuntimeFailedError(f"model {name!r} version {version} cannot be loaded: {_said(error)}") from error
    scheduler = Scheduler(workers, hosting.settings, statistics)
    return ServedVersion(name, str(version), scheduler, hosting, holding)


def _said(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
