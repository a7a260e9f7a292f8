"""The models that are served: which versions are loaded, which one answers, and how they change without a gap."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from narrowcast.errors import NarrowcastError
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.repository import Repository, VersionPolicy
from narrowcast.serving.scheduling.scheduler import Scheduler, Settings
from narrowcast.serving.scheduling.statistics import Statistics
from narrowcast.serving.workers.sources import Placement, Source

__all__ = ["Catalogue", "Hosting", "IndexEntry", "ServedVersion"]

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


@dataclass(frozen=True)
class IndexEntry:
    """One line of the repository's index; states as Triton calls them."""

    name: str
    version: str
    state: str
    reason: str = ""


@dataclass(slots=True)
class _Model:
    """A model by its versions.

    Attributes:
        loaded: Versions that answer.
        default: The one that answers requests which name none.
        history: Defaults before it, the oldest first.
        states: State and reason of versions that do not answer.
        lock: Held while versions change.
    """

    loaded: dict[int, ServedVersion] = field(default_factory=dict[int, ServedVersion])
    default: int | None = None
    history: list[int] = field(default_factory=list[int])
    states: dict[int, tuple[str, str]] = field(default_factory=dict[int, tuple[str, str]])
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Catalogue:
    """Loads, finds and unloads models.

    Args:
        repository: Where they come from.
        hosting: How they are run.
    """

    def __init__(self, repository: Repository, hosting: Hosting) -> None:
        self.hosting = hosting
        self._repository = repository
        self._models: dict[str, _Model] = {}
        self._statistics: defaultdict[tuple[str, int], Statistics] = defaultdict(Statistics)
        self._retiring: set[asyncio.Task[None]] = set()

    # reading ----------------------------------------------------------------------------------------------------------

    def find(self, name: str, version: str = "") -> ServedVersion:
        """Return the version that answers a request.

        Raises:
            Refusal: There is no such model or version (404).
        """
        model = self._models.get(name)
        if model is None or not model.loaded:
            raise Refusal(404, f"model {name!r} is not found: {'not loaded' if model else 'unknown'}")
        if not version:
            assert model.default is not None
            return model.loaded[model.default]
        found = model.loaded.get(int(version)) if version.isascii() and version.isdecimal() else None
        if found is None:
            loaded = ", ".join(map(str, sorted(model.loaded)))
            raise Refusal(404, f"model {name!r} has no version {version!r} loaded; allowed: {loaded}")
        return found

    def served(self, name: str = "", version: str = "") -> list[ServedVersion]:
        """Return the loaded versions of all models, of one, or one of them.

        Raises:
            Refusal: There is no such model or version (404).
        """
        if version:
            return [self.find(name, version)]
        names = [self.find(name).name] if name else sorted(self._models)
        return [served for key in names for _, served in sorted(self._models[key].loaded.items())]

    def versions(self, name: str) -> list[str]:
        """Return the loaded versions of a model, in order."""
        return [str(version) for version in sorted(self._models[name].loaded)]

    @property
    def ready(self) -> bool:
        """Whether every loaded version has a worker that is alive."""
        return all(served.scheduler.workers_alive for served in self.served())

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return any(served.scheduler.busy for served in self.served())

    def index(self) -> list[IndexEntry]:
        """Return all models and versions, those included that are in the repository and not loaded."""
        entries: list[IndexEntry] = []
        for name in sorted({*self._repository.names(), *self._models}):
            model = self._models.get(name) or _Model()
            for version in sorted({*self._repository.versions(name), *model.loaded, *model.states}):
                state, reason = model.states.get(version, ("UNAVAILABLE", "not loaded"))
                if version in model.loaded:
                    alive = model.loaded[version].scheduler.workers_alive
                    state, reason = ("READY", "") if alive else ("UNAVAILABLE", "no worker is alive")
                entries.append(IndexEntry(name, str(version), state, reason))
        return entries

    # changing ---------------------------------------------------------------------------------------------------------

    async def load_all(self) -> None:
        """Load every model of the repository.

        Raises:
            NarrowcastError: One cannot be loaded.
        """
        for name in self._repository.names():
            await self.load(name)

    async def load(self, name: str) -> None:
        """Load or reload a model: the versions that the policy selects of those that are there now.

        Requests are answered by the versions before until all new ones are ready, and these finish what they began.

        Raises:
            Refusal: There is no such model (404).
            NarrowcastError: A version cannot be loaded; what was served before still is.
        """
        found = self._repository.versions(name)
        if not found:
            raise Refusal(404, f"model {name!r} is not in the repository")
        model = self._models.setdefault(name, _Model())
        async with model.lock:
            wanted = self.hosting.policy.select(sorted(found))
            if not wanted:
                raise Refusal(404, f"model {name!r} has none of the versions that the policy names")
            started = await self._start(name, model, {version: found[version] for version in wanted})
            previous = model.default
            retired = list(model.loaded.values())
            model.loaded, model.default = started, max(started)
            if previous not in (None, model.default):
                model.history.append(previous)
            self._retire(model, retired, "a newer load replaced it")

    async def unload(self, name: str) -> None:
        """Unload a model; what it began is finished.

        Raises:
            Refusal: There is no such model (404).
        """
        model = self._models.get(name)
        if model is None:
            raise Refusal(404, f"model {name!r} is not found")
        async with model.lock:
            retired = list(model.loaded.values())
            model.loaded, model.default = {}, None
            await asyncio.gather(*self._retire(model, retired, "unloaded"))

    async def promote(self, name: str, version: int) -> None:
        """Let a version answer the requests that name none; it is loaded first if it is not.

        Raises:
            Refusal: There is no such model or version (404).
            NarrowcastError: The version cannot be loaded.
        """
        model = self._models.get(name)
        if model is None:
            raise Refusal(404, f"model {name!r} is not found")
        async with model.lock:
            previous = model.default
            await self._switch(name, model, version)
            if previous is not None and previous != version:
                model.history.append(previous)

    async def rollback(self, name: str) -> int:
        """Let the version before answer again, and return it.

        Raises:
            Refusal: There is no such model (404), or it has had no other version (400).
            NarrowcastError: The version cannot be loaded.
        """
        model = self._models.get(name)
        if model is None:
            raise Refusal(404, f"model {name!r} is not found")
        async with model.lock:
            if not model.history:
                raise Refusal(400, f"model {name!r} has no version to go back to")
            await self._switch(name, model, model.history[-1])
            return model.history.pop()

    async def close(self) -> None:
        """Unload everything; what waits is refused."""
        served = self.served()
        for model in self._models.values():
            model.loaded, model.default = {}, None
        await asyncio.gather(*(item.scheduler.close("the server is ending") for item in served))
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)

    async def _switch(self, name: str, model: _Model, version: int) -> None:
        """Make a version the default, load it if need be, and unload what neither the policy nor anybody wants."""
        found = self._repository.versions(name)
        if version not in model.loaded:
            if version not in found:
                raise Refusal(404, f"model {name!r} has no version {version} in the repository")
            model.loaded |= await self._start(name, model, {version: found[version]})
        model.default = version
        kept = {version, *self.hosting.policy.select(sorted(found))}
        retired = [model.loaded.pop(other) for other in list(model.loaded) if other not in kept]
        self._retire(model, retired, "another version was promoted")

    async def _start(self, name: str, model: _Model, sources: Mapping[int, Source]) -> dict[int, ServedVersion]:
        """Start versions; if one fails, none is left running."""
        started: dict[int, ServedVersion] = {}
        for version, source in sources.items():
            model.states[version] = ("LOADING", "")
            try:
                started[version] = await self._start_one(name, version, source)
            except NarrowcastError as error:
                model.states[version] = ("UNAVAILABLE", error.what)
                _log.warning("model %s version %d cannot be loaded: %s", name, version, error.what)
                await asyncio.gather(*(served.scheduler.close() for served in started.values()))
                raise
            model.states.pop(version)
        return started

    async def _start_one(self, name: str, version: int, source: Source) -> ServedVersion:
        hosting = self.hosting
        workers = [source.worker(hosting.placement) for _ in range(hosting.workers)]
        outcomes = await asyncio.gather(*(worker.start() for worker in workers), return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if failures:
            await asyncio.gather(*(worker.close() for worker in workers))
            raise failures[0]
        scheduler = Scheduler(workers, hosting.settings, self._statistics[name, version])
        _log.info("model %s version %d is ready", name, version)
        return ServedVersion(name, str(version), scheduler)

    def _retire(self, model: _Model, retired: Iterable[ServedVersion], reason: str) -> list[asyncio.Task[None]]:
        """Let versions finish what they began and end their workers, in the background."""
        tasks: list[asyncio.Task[None]] = []
        for served in retired:
            version = int(served.version)
            if version not in model.loaded:
                model.states[version] = ("UNAVAILABLE", reason)
            tasks.append(asyncio.create_task(_finish(served.scheduler)))
        self._retiring.update(tasks)
        for task in tasks:
            task.add_done_callback(self._retiring.discard)
        return tasks


async def _finish(scheduler: Scheduler) -> None:
    try:
        await scheduler.drained()
    finally:
        await scheduler.close()
