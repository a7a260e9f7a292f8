"""Starts versions of models, for as long as that may take, and lets them go when others answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping

from narrowcast.errors import NarrowcastError
from narrowcast.serving.hosting import Hosting, ServedVersion
from narrowcast.serving.loader import Loader
from narrowcast.serving.model import Model
from narrowcast.serving.refusals import LoadTimeoutError, MemoryBudgetError
from narrowcast.serving.watching.events import fields
from narrowcast.serving.workers.sources import Source

__all__ = ["Starter"]

_log = logging.getLogger(__name__)


class Starter:
    """Starts and retires versions.

    Args:
        models: All models by name, as they are now.
        memory_budget: Bytes that loaded versions may take together, or None for no bound.
        load_timeout: Seconds that a version may take to load before that is broken off, or None for ever.
    """

    def __init__(self, models: Mapping[str, Model], memory_budget: int | None, load_timeout: float | None) -> None:
        self._models = models
        self._load_timeout = load_timeout
        self._retiring: set[asyncio.Task[None]] = set()
        self.loader = Loader(memory_budget, self._spare, self._dismiss)

    async def start(
        self,
        name: str,
        model: Model,
        sources: Mapping[int, Source],
        hosting: Hosting,
        *,
        replaced: Collection[ServedVersion] = (),
        evict: bool = True,
    ) -> dict[int, ServedVersion]:
        """Start versions; if one fails, none is left running.

        Args:
            name: The model.
            model: Its state, which says from now on what becomes of the versions.
            sources: The versions to start.
            hosting: How they are run.
            replaced: Versions that they take the place of.
            evict: Whether others may be unloaded for them.

        Raises:
            NarrowcastError: One cannot be started, there is no room for it, or it takes too long.
        """
        started: dict[int, ServedVersion] = {}
        for version, source in sources.items():
            model.states[version] = ("LOADING", "")
            try:
                async with asyncio.timeout(self._load_timeout):
                    started[version] = await self.loader.start(
                        name, version, source, hosting, replaced=replaced, evict=evict
                    )
            except BaseException as error:
                late = isinstance(error, TimeoutError)  # ours: those of a load have become failures of its runtime
                failure = _too_long(name, version, self._load_timeout or 0.0) if late else error
                what = failure.what if isinstance(failure, NarrowcastError) else "its load was broken off"
                model.states[version] = ("UNAVAILABLE", what)
                _log.warning(
                    "model %s version %d cannot be loaded: %s",
                    *(name, version, what),
                    extra=fields("model_failed", model=name, version=str(version)),
                )
                await asyncio.gather(*(self.loader.end(served) for served in started.values()))
                if failure is error:
                    raise
                raise failure from error
            model.states.pop(version)
            model.failures.pop(version, None)
        return started

    async def start_at_first(
        self, name: str, model: Model, sources: Mapping[int, Source], hosting: Hosting
    ) -> dict[int, ServedVersion]:
        """Start versions when the server starts; those that wait for a request, or find no room, are left for later."""
        if not hosting.on_demand:
            try:
                return await self.start(name, model, sources, hosting, evict=False)
            except MemoryBudgetError as error:
                if error.lasting:
                    raise
                _log.warning(
                    "model %s is not loaded before its first request: %s",
                    *(name, error.what),
                    extra=fields("model_deferred", model=name),
                )
        model.states.update(dict.fromkeys(sources, ("UNAVAILABLE", "its first request loads it")))
        return {}

    def retire(self, model: Model, retired: Iterable[ServedVersion], reason: str) -> list[asyncio.Task[None]]:
        """Let versions finish what they began and end their workers, in the background."""
        tasks: list[asyncio.Task[None]] = []
        for served in retired:
            version = int(served.version)
            if version not in model.sources:
                model.states[version] = ("UNAVAILABLE", reason)
            tasks.append(asyncio.create_task(self.loader.finish(served)))
        self._retiring.update(tasks)
        for task in tasks:
            task.add_done_callback(self._retiring.discard)
        return tasks

    async def close(self, served: Iterable[ServedVersion]) -> None:
        """End versions now, and those that are being retired; what waits is refused."""
        retiring = list(self._retiring)
        for task in retiring:
            task.cancel()
        await asyncio.gather(*(self.loader.end(item, "the server is ending") for item in served))
        await asyncio.gather(*retiring, return_exceptions=True)

    def _spare(self, served: ServedVersion, name: str) -> bool:
        """Whether a version may make room for one of a model: nobody uses or awaits it, and nobody changes its model."""
        model, version = self._models[served.name], int(served.version)
        changing = model.lock.locked() and served.name != name
        return (
            not (served.scheduler.busy or model.waiting.get(version) or changing)
            and model.loaded.get(version) is served
        )

    def _dismiss(self, served: ServedVersion) -> None:
        """Take a version out of service until a request asks for it."""
        model, version = self._models[served.name], int(served.version)
        del model.loaded[version]
        model.states[version] = ("UNAVAILABLE", "unloaded to make room; its next request loads it")


def _too_long(name: str, version: int, seconds: float) -> LoadTimeoutError:
    return LoadTimeoutError(
        f"model {name!r} version {version} was not loaded within {seconds:g} s, and its load was broken off",
        next_step="find out what its runtime waits for, or start the server with a longer --load-timeout",
    )
