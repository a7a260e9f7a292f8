"""Loads versions at a request: each once, however many requests wait for it."""

from __future__ import annotations

import asyncio

from narrowcast.errors import NarrowcastError
from narrowcast.serving.hosting import ServedVersion
from narrowcast.serving.model import Model
from narrowcast.serving.refusals import MemoryBudgetError, Refusal, change_refusal
from narrowcast.serving.starting import Starter

__all__ = ["Warming"]


class Warming:
    """Loads versions that requests wait for.

    Args:
        starter: Starts them.
    """

    def __init__(self, starter: Starter) -> None:
        self._starter = starter
        self._tasks: dict[tuple[str, int], asyncio.Task[ServedVersion | None]] = {}

    @property
    def busy(self) -> bool:
        """Whether any version is being loaded."""
        return bool(self._tasks)

    async def get(self, name: str, model: Model, version: int) -> ServedVersion | None:
        """Return a version when it is loaded, or None where a change has come between.

        Raises:
            Refusal: Too many wait for it or it cannot be loaded (503), it takes too long (504), or it can never fit into the
                memory (507).
        """
        settings = model.hosting.settings
        waiting = model.waiting.get(version, 0)
        if waiting >= settings.queue:
            raise Refusal(
                503, f"{waiting} requests wait for model {name!r} to be loaded, which is the bound", retry_after=1
            )
        task = self._tasks.get((name, version))
        if task is None:
            task = self._tasks[name, version] = asyncio.create_task(self._load(name, model, version))
            task.add_done_callback(lambda done: self._ended(name, version, done))
        model.waiting[version] = waiting + 1
        try:
            async with asyncio.timeout(settings.timeout):
                served = await asyncio.shield(task)
        except TimeoutError:
            raise Refusal(504, f"model {name!r} was not loaded within {settings.timeout:g} s") from None
        except MemoryBudgetError as error:
            raise change_refusal(error) from error
        except NarrowcastError as error:
            raise Refusal(
                503, f"model {name!r} version {version} cannot be loaded: {error.what}", retry_after=1
            ) from error
        finally:
            model.waiting[version] -= 1
        return served if model.loaded.get(version) is served else None

    async def _load(self, name: str, model: Model, version: int) -> ServedVersion | None:
        async with model.lock:
            if version in model.loaded or version not in model.sources:
                return model.loaded.get(version)
            model.check_backoff(version)
            try:
                started = await self._starter.start(name, model, {version: model.sources[version]}, model.hosting)
            except MemoryBudgetError:
                raise
            except NarrowcastError as error:
                model.failed(version, error)
                raise
            model.loaded.update(started)
            return started[version]

    def _ended(self, name: str, version: int, task: asyncio.Task[ServedVersion | None]) -> None:
        del self._tasks[name, version]
        if not task.cancelled():
            task.exception()  # whoever still waits is told; if nobody does, that is no mistake

    async def close(self) -> None:
        """Break off what is being loaded."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
