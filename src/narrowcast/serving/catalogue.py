"""The models that are served: which versions are loaded, which answer, and how they change without a gap."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Mapping
from functools import wraps
from typing import Any, Concatenate, ParamSpec

from narrowcast.errors import ConfigError
from narrowcast.serving.hosting import ColdError, Hosting, ServedVersion
from narrowcast.serving.loader import MemoryUse
from narrowcast.serving.model import Change, IndexEntry, Model
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.repository import Repository
from narrowcast.serving.settings import read_model_options
from narrowcast.serving.starting import Starter
from narrowcast.serving.state import ModelState, StateKeeper, read_state
from narrowcast.serving.traffic import Traffic
from narrowcast.serving.warming import Warming
from narrowcast.serving.watching.events import fields

__all__ = ["LOAD_TIMEOUT", "Catalogue", "Change", "Hosting", "IndexEntry", "ServedVersion"]

#: Seconds that a version may take to load, unless somebody says otherwise.
LOAD_TIMEOUT = 600.0
#: Clients of Triton wait 60 seconds for an answer: half of that leaves them time to read why there is none.
_PATIENCE = 30.0
_log = logging.getLogger(__name__)
_Given = ParamSpec("_Given")


def _to_its_end(
    change: Callable[Concatenate[Catalogue, _Given], Coroutine[Any, Any, Change]],
) -> Callable[Concatenate[Catalogue, _Given], Coroutine[Any, Any, Change]]:
    """Have a change go on where the client that asked for it goes away: half a change is none that anybody wants."""

    @wraps(change)
    async def run(self: Catalogue, *args: _Given.args, **options: _Given.kwargs) -> Change:
        return await asyncio.shield(self.begin(change(self, *args, **options)))

    return run


class Catalogue:
    """Loads, finds and unloads models.

    Args:
        repository: Where they come from.
        hosting: How they are run.
        draw: Gives numbers in [0, 1), by which requests are split among versions.
        memory_budget: Bytes that loaded versions may take together, or None for no bound.
        load_timeout: Seconds that a version may take to load before that is broken off, or None for ever.
        patience: Seconds that a change waits for another one of the same model to end.
    """

    def __init__(
        self,
        repository: Repository,
        hosting: Hosting,
        draw: Callable[[], float] = random.random,
        memory_budget: int | None = None,
        load_timeout: float | None = LOAD_TIMEOUT,
        patience: float = _PATIENCE,
    ) -> None:
        self.hosting = hosting
        self._repository = repository
        self._draw = draw
        self.patience = patience
        self._models: dict[str, Model] = {}
        self._starter = Starter(self._models, memory_budget, load_timeout)
        self._loader = self._starter.loader
        self._ordered = self._loader.bounded  # whether the order of use counts
        self._warming = Warming(self._starter)
        self._changes: set[asyncio.Task[Change]] = set()
        self._keeper = StateKeeper()

    # reading ----------------------------------------------------------------------------------------------------------

    def find(self, name: str, version: str = "") -> ServedVersion:
        """Return the version that answers a request.

        Raises:
            Refusal: There is no such model or version (404).
            ColdError: It has to be loaded first; :meth:`get` does so.
        """
        model = self._models.get(name)
        if model is None or model.traffic is None:
            raise Refusal(404, f"model {name!r} is not found: {'not loaded' if model else 'unknown'}")
        if not version:
            number = model.traffic.pick(self._draw)
        else:
            number = int(version) if version.isascii() and version.isdecimal() and len(version) < 19 else 0
        served = model.loaded.get(number)
        if served is None:
            if number in model.sources:
                raise ColdError(name, number)
            allowed = ", ".join(map(str, sorted(model.sources)))
            raise Refusal(404, f"model {name!r} has no version {version!r} loaded; allowed: {allowed}")
        if self._ordered:
            self._loader.touch(served)
        return served

    async def get(self, name: str, version: str = "") -> ServedVersion:
        """Return the version that answers a request, and load it first where it is not.

        The caller makes use of it before anything else happens: it is not unloaded until then.

        Raises:
            Refusal: There is no such model or version (404), too many wait for it or it cannot be loaded (503), it takes
                too long (504), or it can never fit into the memory (507).
        """
        while True:
            try:
                return self.find(name, version)
            except ColdError as cold:
                served = await self._warming.get(name, self._models[name], cold.version)
            if served is not None:
                return served

    def can_answer(self, name: str, version: str = "") -> bool:
        """Return whether a model or version answers requests, be it that it is loaded first.

        Raises:
            Refusal: There is no such model or version (404).
        """
        try:
            return self.find(name, version).scheduler.workers_alive > 0
        except ColdError:
            return True

    def served(self, name: str = "", version: str = "") -> list[ServedVersion]:
        """Return the loaded versions of all models, of one, or one of them.

        Raises:
            Refusal: There is no such model or version (404).
        """
        if name:
            self.can_answer(name, version)
        models = {name: self._models[name]} if name else dict(sorted(self._models.items()))
        loaded = [served for model in models.values() for _, served in sorted(model.loaded.items())]
        return [served for served in loaded if version in ("", served.version)]

    @property
    def names(self) -> list[str]:
        """The models that answer requests, in order."""
        return [name for name, model in sorted(self._models.items()) if model.traffic is not None]

    def versions(self, name: str) -> list[str]:
        """Return the versions of a model that answer requests, in order."""
        return [str(version) for version in sorted(self._models[name].sources)]

    def traffic(self, name: str) -> dict[str, float]:
        """Return the share of each version in the requests that name none; empty where the model is not loaded.

        Raises:
            Refusal: There is no such model (404).
        """
        return self._known(name).shares

    @property
    def ready(self) -> bool:
        """Whether every loaded version has a worker that is alive."""
        return all(served.scheduler.workers_alive for served in self.served())

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return self._warming.busy or any(served.scheduler.busy for served in self.served())

    @property
    def memory(self) -> MemoryUse:
        """The memory that loaded versions take."""
        return self._loader.use

    def index(self) -> list[IndexEntry]:
        """Return all models and versions, those included that are in the repository and not loaded."""
        entries: list[IndexEntry] = []
        for name in sorted({*self._repository.names(), *self._models}):
            model = self._models.get(name) or Model(self.hosting)
            entries += model.entries(name, self._repository.versions(name))
        return entries

    # changing ---------------------------------------------------------------------------------------------------------

    async def load_all(self) -> None:
        """Load every model of the repository, and let those versions answer that answered before the server ended.

        Models that are loaded on demand are not loaded yet, nor are those that no room is left for.

        Raises:
            NarrowcastError: One cannot be loaded, or what is remembered cannot be read.
        """
        for name, before in self.remembered().items():
            await self.restore(name, before)

    def remembered(self) -> dict[str, ModelState]:
        """Return every model of the repository, with what is remembered of it.

        Raises:
            NarrowcastError: What is remembered cannot be read.
        """
        states = {root: read_state(root) for root in self._repository.roots}
        roots = {name: self._repository.root(name) for name in self._repository.names()}
        return {
            name: ModelState() if root is None else states[root].get(name, ModelState()) for name, root in roots.items()
        }

    async def restore(self, name: str, before: ModelState) -> None:
        """Load a model as the server starts, and let those versions answer that answered before it ended.

        Raises:
            NarrowcastError: It cannot be loaded.
        """
        try:
            await self._load(name, before)
        except Refusal as refusal:
            raise ConfigError(refusal.message, next_step="correct the model's folder, or --versions") from refusal

    @_to_its_end
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
        """Load a model as it is now, or let it be served as it was before the server was started."""
        found = self._repository.versions(name)
        if not found:
            raise Refusal(404, f"model {name!r} is not in the repository")
        model = self._models.setdefault(name, Model(self.hosting))
        async with model.turn(name, self.patience):
            hosting = self._hosting(name)
            wanted = hosting.policy.select(sorted(found))
            if not wanted:
                raise Refusal(404, f"model {name!r} has none of the versions that the policy names")
            chosen = None if before is None else model.restore(name, before, found)
            traffic = chosen or Traffic.all_to(max(wanted))
            sources = {version: found[version] for version in sorted({*wanted, *traffic.versions})}
            retired = tuple(model.loaded.values())
            if before is None:
                started = await self._starter.start(name, model, sources, hosting, replaced=retired)
            else:
                started = await self._starter.start_at_first(name, model, sources, hosting)
            retired = tuple(model.loaded.values())
            model.sources, model.loaded, model.hosting = sources, started, hosting
            model.direct(traffic, chosen=chosen is not None)
            self._starter.retire(model, retired, "a newer load replaced it")

    @_to_its_end
    async def unload(self, name: str) -> Change:
        """Unload a model; what it began is finished. A promotion or a split ends.

        Raises:
            Refusal: There is no such model (404).
        """
        model = self._known(name)
        async with model.turn(name, self.patience):
            retired = tuple(model.loaded.values())
            model.states.update(dict.fromkeys(model.sources, ("UNAVAILABLE", "unloaded")))
            model.sources, model.loaded, model.traffic, model.chosen = {}, {}, None, False
            await asyncio.gather(*self._starter.retire(model, retired, "unloaded"))
        return await self._remember(name)

    @_to_its_end
    async def promote(self, name: str, version: int) -> Change:
        """Let a version answer the requests that name none; it is loaded first if it is not.

        Raises:
            Refusal: There is no such model or version (404).
            NarrowcastError: The version cannot be loaded.
        """
        return await self._redirect(name, lambda model: Traffic.all_to(version))

    @_to_its_end
    async def split(self, name: str, weights: Mapping[int, float]) -> Change:
        """Let several versions answer the requests that name none, each request one of them, drawn by weight.

        Without weights, the version that answered alone before does so again.

        Raises:
            Refusal: There is no such model or version (404), or a weight is no positive number (400).
            NarrowcastError: A version cannot be loaded.
        """
        return await self._redirect(name, lambda model: Traffic.of(weights) if weights else model.unsplit(name))

    @_to_its_end
    async def rollback(self, name: str) -> Change:
        """Take the last promotion, split or load back: what answered before it answers again.

        Raises:
            Refusal: There is no such model (404), or nothing else has answered (400).
            NarrowcastError: A version cannot be loaded.
        """
        return await self._redirect(name, lambda model: model.before(name), back=True)

    async def close(self) -> None:
        """Unload everything; what waits is refused."""
        for change in list(self._changes):
            change.cancel()
        await asyncio.gather(*self._changes, return_exceptions=True)
        served = self.served()
        for model in self._models.values():
            model.sources, model.loaded, model.traffic = {}, {}, None
        await asyncio.gather(self._warming.close(), self._starter.close(served))

    def begin(self, change: Coroutine[Any, Any, Change]) -> asyncio.Task[Change]:
        """Return a change that is under way, which the end of the catalogue waits for."""
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Change]) -> None:
        self._changes.discard(task)
        if not task.cancelled():
            task.exception()  # whoever still waits gets it; else nobody does

    def _known(self, name: str) -> Model:
        model = self._models.get(name)
        if model is None:
            raise Refusal(404, f"model {name!r} is not found")
        return model

    async def _redirect(self, name: str, choose: Callable[[Model], Traffic], *, back: bool = False) -> Change:
        """Let other versions answer: load those that are not, and unload what neither the policy nor anybody wants.

        Args:
            name: The model.
            choose: Gives the traffic to come; asked when no other change is under way.
            back: Whether the traffic is the last of the history, and leaves it.
        """
        model = self._known(name)
        async with model.turn(name, self.patience):
            traffic = choose(model)
            found = self._repository.versions(name)
            missing = [version for version in traffic.versions if version not in model.loaded]
            for version in missing:
                if version not in found:
                    raise Refusal(404, f"model {name!r} has no version {version} in the repository")
            kept = {*traffic.versions, *model.hosting.policy.select(sorted(found))}
            replaced = tuple(served for version, served in model.loaded.items() if version not in kept)
            sources = {version: found[version] for version in missing}
            started = await self._starter.start(name, model, sources, model.hosting, replaced=replaced)
            model.loaded.update(started)
            model.sources = {
                version: source for version, source in (model.sources | sources).items() if version in kept
            }
            model.direct(traffic, chosen=True, back=back)
            retired = [model.loaded.pop(version) for version in list(model.loaded) if version not in kept]
            self._starter.retire(model, retired, "other versions answer")
        return await self._remember(name)

    async def _remember(self, name: str) -> Change:
        """Write down which versions of a model answer, for the next start of the server."""
        model = self._models[name]
        forgotten = await self._keeper.keep(self._repository.root(name), name, model.state)
        shares = model.shares
        answers = ", ".join(f"version {version} ({share:.3g})" for version, share in shares.items() if share < 1)
        answers = answers or ", ".join(f"version {version}" for version in shares)
        _log.info(
            "model %s is answered by %s", name, answers or "nobody", extra=fields("traffic", model=name, shares=shares)
        )
        return Change(shares, forgotten)

    def _hosting(self, name: str) -> Hosting:
        """Return how a model is run, by the file beside its versions and for what that leaves out as all models are."""
        root = self._repository.root(name)
        return self.hosting if root is None else read_model_options(root / name, self.hosting)
