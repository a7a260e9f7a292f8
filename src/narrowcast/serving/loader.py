"""Starts and ends versions within a budget of memory: the least recently used make room, never one that is in use."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass

from narrowcast.serving.hosting import Hosting, ServedVersion, start_version
from narrowcast.serving.memory import Holding, Ledger
from narrowcast.serving.scheduling.statistics import Statistics
from narrowcast.serving.watching.events import fields
from narrowcast.serving.workers.sources import Placement, Source

__all__ = ["Loader", "MemoryUse"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryUse:
    """The host memory that loaded versions take.

    Attributes:
        used: Bytes, as far as they are known.
        budget: Bytes that they may take together, or None for no bound.
        loads: Versions that were loaded since the server started.
        evictions: Versions that were unloaded so that others fitted.
    """

    used: int
    budget: int | None
    loads: int
    evictions: int


class Loader:
    """Starts and ends versions.

    What a version takes is what its worker processes have for themselves alone, which is what the system gets back when
    they end; where workers share the server's process, the size that the source or the model states. Before the first load
    it is taken to be the size of the artifact, and what the leanest worker process so far took beyond its artifact.

    Args:
        budget: Bytes of memory that loaded versions may take together, or None for no bound.
        spare: Whether a version may be unloaded now so that one of a model fits, which is named.
        dismiss: Takes a version out of service that is about to be unloaded.
    """

    def __init__(
        self, budget: int | None, spare: Callable[[ServedVersion, str], bool], dismiss: Callable[[ServedVersion], None]
    ) -> None:
        self._ledger: Ledger[ServedVersion] = Ledger(budget)
        self._spare = spare
        self._dismiss = dismiss
        self._loads = 0
        self._statistics: defaultdict[tuple[str, int], Statistics] = defaultdict(Statistics)
        #: Bytes of one worker, by what it runs.
        self._measured: dict[tuple[str, int, Placement, int], int] = {}
        self._overhead: dict[Placement, int] = {}
        self._leaving: set[Holding[ServedVersion]] = set()
        self._making_room = asyncio.Lock()

    @property
    def bounded(self) -> bool:
        """Whether there is a budget, and the order of use counts."""
        return self._ledger.budget is not None

    @property
    def use(self) -> MemoryUse:
        """What is taken now."""
        return MemoryUse(self._ledger.used, self._ledger.budget, self._loads, self._ledger.evictions)

    def touch(self, served: ServedVersion) -> None:
        """Note that a version is used now."""
        self._ledger.touch(served.holding)

    async def start(
        self,
        name: str,
        version: int,
        source: Source,
        hosting: Hosting,
        *,
        replaced: Collection[ServedVersion] = (),
        evict: bool = True,
    ) -> ServedVersion:
        """Start a version, and unload others that are not in use where there is no room for it.

        Args:
            name: The model.
            version: The version.
            source: Where it comes from.
            hosting: How it is run.
            replaced: Versions that it takes the place of: they answer until it can, so for a while both are there.
            evict: Whether others may be unloaded for it.

        Raises:
            NarrowcastError: It cannot be started, or there is no room for it; a version that could never fit moves none.
        """
        what = f"model {name} version {version}"
        key = (name, version, hosting.placement, await asyncio.to_thread(source.size))
        worker = self._measured.get(key, key[3] + self._overhead.get(hosting.placement, 0))
        expected = worker * hosting.workers
        besides = {served.holding for served in replaced}

        def free(other: ServedVersion) -> bool:
            return evict and self._spare(other, name)

        async with self._making_room:
            await self._make_room(expected, expected, what, besides, free)
            holding = self._ledger.hold(expected)
        served: ServedVersion | None = None
        try:
            served = await start_version(name, version, source, hosting, self._statistics[name, version], holding)
            taken = await asyncio.to_thread(served.scheduler.memory)
            taken = expected if taken is None else taken
            self._learn(key, taken // hosting.workers)
            async with self._making_room:
                await self._make_room(taken - expected, taken, what, besides, free)
                holding.size = taken
        except BaseException:
            try:
                if served is not None:
                    await served.scheduler.close()
            finally:
                self._ledger.release(holding)  # not before its memory is free
            raise
        holding.owner = served
        self._loads += 1
        _log.info(
            "model %s version %d is ready", name, version, extra=fields("model_ready", model=name, version=str(version))
        )
        return served

    async def finish(self, served: ServedVersion) -> None:
        """Let a version that nobody finds any more finish what it began, and end it; its memory counts as free already."""
        self._leaving.add(served.holding)
        try:
            await served.scheduler.drained()
        finally:
            await self.end(served)

    async def end(self, served: ServedVersion, reason: str = "the model was unloaded") -> None:
        """End a version's workers, whatever they do."""
        try:
            await served.scheduler.close(reason)
        finally:
            self._leaving.discard(served.holding)
            self._ledger.release(served.holding)

    def _learn(self, key: tuple[str, int, Placement, int], worker: int) -> None:
        """Remember what a worker of a version takes, and what workers take at least beyond their artifacts."""
        self._measured[key] = worker
        beyond = max(0, worker - key[3])
        self._overhead[key[2]] = min(self._overhead.get(key[2], beyond), beyond)

    async def _make_room(
        self,
        more: int,
        whole: int,
        what: str,
        besides: Collection[Holding[ServedVersion]],
        free: Callable[[ServedVersion], bool],
    ) -> None:
        """Unload what has to go so that there are ``more`` bytes for something that takes ``whole`` in all."""
        self._ledger.admit(whole, what)
        going = self._ledger.room(max(0, more), what, free, self._leaving.union(besides))
        leaving: list[ServedVersion] = []
        for holding in going:
            assert holding.owner is not None
            leaving.append(holding.owner)
            self._dismiss(holding.owner)
            _log.info(
                "model %s version %s makes room for %s",
                *(holding.owner.name, holding.owner.version, what),
                extra=fields("model_evicted", model=holding.owner.name, version=holding.owner.version),
            )
        try:
            await asyncio.gather(*(served.scheduler.close() for served in leaving))
        finally:
            for holding in going:
                self._ledger.release(holding, evicted=True)
