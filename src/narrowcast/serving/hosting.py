"""How a model is run, and a version of it that runs."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from narrowcast.serving.repository import VersionPolicy
from narrowcast.serving.scheduling.scheduler import Scheduler, Settings
from narrowcast.serving.scheduling.statistics import Statistics
from narrowcast.serving.workers.sources import Placement, Source

__all__ = ["Hosting", "ServedVersion", "start_version"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hosting:
    """How models are run.

    Attributes:
        placement: Where their workers are.
        workers: How many each version has.
        settings: How their requests are scheduled.
        policy: Which versions are loaded.
    """

    placement: Placement = Placement.PROCESS
    workers: int = 1
    settings: Settings = field(default_factory=Settings)
    policy: VersionPolicy = field(default_factory=VersionPolicy)


@dataclass(frozen=True)
class ServedVersion:
    """One loaded version of a model."""

    name: str
    version: str
    scheduler: Scheduler
    hosting: Hosting


async def start_version(
    name: str, version: int, source: Source, hosting: Hosting, statistics: Statistics
) -> ServedVersion:
    """Start the workers of a version and return it when all are ready.

    Raises:
        NarrowcastError: One cannot be started; then none is left.
    """
    workers = [source.worker(hosting.placement) for _ in range(hosting.workers)]
    outcomes = await asyncio.gather(*(worker.start() for worker in workers), return_exceptions=True)
    failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    if failures:
        await asyncio.gather(*(worker.close() for worker in workers))
        raise failures[0]
    _log.info("model %s version %d is ready", name, version)
    return ServedVersion(name, str(version), Scheduler(workers, hosting.settings, statistics), hosting)
