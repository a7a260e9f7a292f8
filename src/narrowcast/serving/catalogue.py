"""The models that are served: which versions are loaded, which answer, and how they change without a gap."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from narrowcast.errors import NarrowcastError
from narrowcast.serving.hosting import Hosting, ServedVersion, start_version
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.repository import Repository
from narrowcast.serving.scheduling.scheduler import Scheduler
from narrowcast.serving.scheduling.statistics import Statistics
from narrowcast.serving.settings import read_model_options
from narrowcast.serving.state import ModelState, read_state, write_state
from narrowcast.serving.traffic import Traffic
from narrowcast.serving.watching.events import fields
from narrowcast.serving.workers.sources import Source

__all__ = ["Catalogue", "Change", "Hosting", "IndexEntry", "ServedVersion"]

_log = logging.getLogger(__name__)
#: Changes of a model that can be taken back.
_REMEMBERED = 32


@dataclass(frozen=True)
class IndexEntry:
    """One line of the repository's index; states as Triton calls them."""

    name: str
    version: str
    state: str
    reason: str = ""


@dataclass(frozen=True)
class Change:
    """What a change has led to.

    Attributes:
        traffic: Share of each version in the requests that name none; empty where the model is unloaded.
        forgotten: Why a restart will not remember it; empty where it will.
    """

    traffic: dict[str, float]
    forgotten: str = ""


@dataclass(slots=True)
class _Model:
    """A model by its versions.

    Attributes:
        hosting: How it is run.
        loaded: Versions that answer.
        traffic: Those that answer requests which name none; None where nothing is loaded.
        chosen: Whether somebody chose them; else they are the newest.
        history: Traffic before, the oldest first.
        states: State and reason of versions that do not answer.
        lock: Held while versions change.
    """

    hosting: Hosting
    loaded: dict[int, ServedVersion] = field(default_factory=dict[int, ServedVersion])
    traffic: Traffic | None = None
    chosen: bool = False
    history: list[Traffic] = field(default_factory=list[Traffic])
    states: dict[int, tuple[str, str]] = field(default_factory=dict[int, tuple[str, str]])
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def direct(self, traffic: Traffic, *, chosen: bool, back: bool = False) -> None:
        """Let other versions answer; what answered before is put into the history, or the way back is taken out of it."""
        if back:
            self.history.pop()
        elif self.traffic is not None and self.traffic != traffic:
            self.history = [*self.history, self.traffic][-_REMEMBERED:]
        self.traffic, self.chosen = traffic, chosen

    def state(self) -> ModelState:
        """Return what a restart has to know."""
        kept = dict(self.traffic.weights) if self.traffic is not None and self.chosen else None
        return ModelState(traffic=kept, history=tuple(dict(traffic.weights) for traffic in self.history))


class Catalogue:
    """Loads, finds and unloads models.

    Args:
        repository: Where they come from.
        hosting: How they are run.
        draw: Gives numbers in [0, 1), by which requests are split among versions.
    """

    def __init__(self, repository: Repository, hosting: Hosting, draw: Callable[[], float] = random.random) -> None:
        self.hosting = hosting
        self._repository = repository
        self._draw = draw
        self._models: dict[str, _Model] = {}
        self._statistics: defaultdict[tuple[str, int], Statistics] = defaultdict(Statistics)
        self._retiring: set[asyncio.Task[None]] = set()
        self._writing = asyncio.Lock()

    # reading ----------------------------------------------------------------------------------------------------------

    def find(self, name: str, version: str = "") -> ServedVersion:
        """Return the version that answers a request.

        Raises:
            Refusal: There is no such model or version (404).
        """
        model = self._models.get(name)
        if model is None or model.traffic is None:
            raise Refusal(404, f"model {name!r} is not found: {'not loaded' if model else 'unknown'}")
        if not version:
            return model.loaded[model.traffic.pick(self._draw)]
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

    def traffic(self, name: str) -> dict[str, float]:
        """Return the share of each version in the requests that name none; empty where the model is not loaded.

        Raises:
            Refusal: There is no such model (404).
        """
        return _shares(self._known(name))

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
            model = self._models.get(name) or _Model(self.hosting)
            for version in sorted({*self._repository.versions(name), *model.loaded, *model.states}):
                state, reason = model.states.get(version, ("UNAVAILABLE", "not loaded"))
                if version in model.loaded:
                    alive = model.loaded[version].scheduler.workers_alive
                    state, reason = ("READY", "") if alive else ("UNAVAILABLE", "no worker is alive")
                entries.append(IndexEntry(name, str(version), state, reason))
        return entries

    # changing ---------------------------------------------------------------------------------------------------------

    async def load_all(self) -> None:
        """Load every model of the repository, and let those versions answer that answered before the server ended.

        Raises:
            NarrowcastError: One cannot be loaded, or what is remembered cannot be read.
        """
        remembered = {root: read_state(root) for root in self._repository.roots}
        for name in self._repository.names():
            root = self._repository.root(name)
            await self._load(name, ModelState() if root is None else remembered[root].get(name, ModelState()))

    async def load(self, name: str) -> Change:
        """Load or reload a model: the versions that the policy selects of those that are there now.

        The newest answers then; a promotion or a split ends. Requests are answered by the versions before until all new
        ones are ready, and these finish what they began.

        Raises:
            Refusal: There is no such model (404).
            NarrowcastError: A version cannot be loaded; what was served before still is.
        """
        await self._load(name)
        return await self._remember(name)

    async def _load(self, name: str, before: ModelState | None = None) -> None:
        """Load a model as it is now, or as it was before the server was started."""
        found = self._repository.versions(name)
        if not found:
            raise Refusal(404, f"model {name!r} is not in the repository")
        model = self._models.setdefault(name, _Model(self.hosting))
        async with model.lock:
            hosting = self._hosting(name)
            wanted = hosting.policy.select(sorted(found))
            if not wanted:
                raise Refusal(404, f"model {name!r} has none of the versions that the policy names")
            traffic, chosen = Traffic.all_to(max(wanted)), False
            if before is not None:
                model.history = [Traffic.of(weights) for weights in before.history]
                if before.traffic is not None:
                    traffic, chosen = _promised(name, Traffic.of(before.traffic), found, traffic)
            wanted = {*wanted, *traffic.versions}
            sources = {version: found[version] for version in sorted(wanted)}
            started = await self._start(name, model, sources, hosting)
            retired = list(model.loaded.values())
            model.loaded, model.hosting = started, hosting
            model.direct(traffic, chosen=chosen)
            self._retire(model, retired, "a newer load replaced it")

    async def unload(self, name: str) -> Change:
        """Unload a model; what it began is finished. A promotion or a split ends.

        Raises:
            Refusal: There is no such model (404).
        """
        model = self._known(name)
        async with model.lock:
            retired = list(model.loaded.values())
            model.loaded, model.traffic, model.chosen = {}, None, False
            await asyncio.gather(*self._retire(model, retired, "unloaded"))
        return await self._remember(name)

    async def promote(self, name: str, version: int) -> Change:
        """Let a version answer the requests that name none; it is loaded first if it is not.

        Raises:
            Refusal: There is no such model or version (404).
            NarrowcastError: The version cannot be loaded.
        """
        return await self._redirect(name, lambda model: Traffic.all_to(version))

    async def split(self, name: str, weights: Mapping[int, float]) -> Change:
        """Let several versions answer the requests that name none, each request one of them, drawn by weight.

        Without weights, the version that answered alone before does so again.

        Raises:
            Refusal: There is no such model or version (404), or a weight is no positive number (400).
            NarrowcastError: A version cannot be loaded.
        """
        return await self._redirect(name, lambda model: Traffic.of(weights) if weights else _unsplit(name, model))

    async def rollback(self, name: str) -> Change:
        """Take the last promotion, split or load back: what answered before it answers again.

        Raises:
            Refusal: There is no such model (404), or nothing else has answered (400).
            NarrowcastError: A version cannot be loaded.
        """

        def before(model: _Model) -> Traffic:
            if not model.history:
                raise Refusal(400, f"model {name!r} has no version to go back to")
            return model.history[-1]

        return await self._redirect(name, before, back=True)

    async def close(self) -> None:
        """Unload everything; what waits is refused."""
        served = self.served()
        for model in self._models.values():
            model.loaded, model.traffic = {}, None
        await asyncio.gather(*(item.scheduler.close("the server is ending") for item in served))
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)

    def _known(self, name: str) -> _Model:
        model = self._models.get(name)
        if model is None:
            raise Refusal(404, f"model {name!r} is not found")
        return model

    async def _redirect(self, name: str, choose: Callable[[_Model], Traffic], *, back: bool = False) -> Change:
        """Let other versions answer: load those that are not, and unload what neither the policy nor anybody wants.

        Args:
            name: The model.
            choose: Gives the traffic to come; asked when no other change is under way.
            back: Whether the traffic is the last of the history, and leaves it.
        """
        model = self._known(name)
        async with model.lock:
            traffic = choose(model)
            found = self._repository.versions(name)
            missing = [version for version in traffic.versions if version not in model.loaded]
            for version in missing:
                if version not in found:
                    raise Refusal(404, f"model {name!r} has no version {version} in the repository")
            sources = {version: found[version] for version in missing}
            started = await self._start(name, model, sources, model.hosting)
            model.loaded.update(started)
            model.direct(traffic, chosen=True, back=back)
            kept = {*traffic.versions, *model.hosting.policy.select(sorted(found))}
            retired = [model.loaded.pop(version) for version in list(model.loaded) if version not in kept]
            self._retire(model, retired, "other versions answer")
        return await self._remember(name)

    async def _remember(self, name: str) -> Change:
        """Write down which versions of a model answer, for the next start of the server."""
        model = self._models[name]
        root = self._repository.root(name)
        forgotten = ""
        if root is None:
            forgotten = "the model is in no folder of models"
        else:
            try:
                async with self._writing:
                    await asyncio.to_thread(write_state, root, name, model.state())
            except NarrowcastError as error:
                forgotten = error.what
                _log.warning(
                    "a change of model %s will be forgotten: %s",
                    *(name, error.what),
                    extra=fields("change_not_kept", model=name),
                )
        shares = _shares(model)
        answers = ", ".join(f"version {version} ({share:.4g})" for version, share in shares.items())
        _log.info(
            "model %s is answered by %s", name, answers or "nobody", extra=fields("traffic", model=name, shares=shares)
        )
        return Change(shares, forgotten)

    def _hosting(self, name: str) -> Hosting:
        """Return how a model is run, by the file beside its versions and for what that leaves out as all models are."""
        root = self._repository.root(name)
        return self.hosting if root is None else read_model_options(root / name, self.hosting)

    async def _start(
        self, name: str, model: _Model, sources: Mapping[int, Source], hosting: Hosting
    ) -> dict[int, ServedVersion]:
        """Start versions; if one fails, none is left running."""
        started: dict[int, ServedVersion] = {}
        for version, source in sources.items():
            model.states[version] = ("LOADING", "")
            try:
                statistics = self._statistics[name, version]
                started[version] = await start_version(name, version, source, hosting, statistics)
            except NarrowcastError as error:
                model.states[version] = ("UNAVAILABLE", error.what)
                _log.warning(
                    "model %s version %d cannot be loaded: %s",
                    *(name, version, error.what),
                    extra=fields("model_failed", model=name, version=str(version)),
                )
                await asyncio.gather(*(served.scheduler.close() for served in started.values()))
                raise
            model.states.pop(version)
        return started

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


def _shares(model: _Model) -> dict[str, float]:
    return {} if model.traffic is None else {str(version): share for version, share in model.traffic.shares.items()}


def _unsplit(name: str, model: _Model) -> Traffic:
    """Return the traffic before all splits that are in force."""
    alone = next((traffic for traffic in reversed(model.history) if len(traffic.versions) == 1), None)
    if model.traffic is None or len(model.traffic.versions) == 1 or alone is None:
        raise Refusal(400, f"model {name!r} has no split that could end")
    return alone


def _promised(name: str, chosen: Traffic, found: Mapping[int, Source], newest: Traffic) -> tuple[Traffic, bool]:
    """Return the traffic that was chosen before the server was started, or the newest version where it cannot be had."""
    gone = [version for version in chosen.versions if version not in found]
    if not gone:
        return chosen, True
    _log.warning("model %s: version %d answered before and is no longer there; the newest answers", name, gone[0])
    return newest, False
