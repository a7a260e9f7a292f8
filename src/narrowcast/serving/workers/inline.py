"""Models in the server's own process: in the event loop itself, or in a thread each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from narrowcast.serving.workers.base import Batch, Done, LoadedModel, Result, Worker, joined

__all__ = ["InlineWorker", "ThreadWorker"]

Loader = Callable[[], LoadedModel]


def run_batch(model: LoadedModel, batch: Batch) -> Result:
    """Run a batch here and now."""
    begun = time.monotonic_ns()
    try:
        inputs = joined(batch)
        gathered = time.monotonic_ns()
        outputs = model.run(inputs)
    except Exception as error:  # whatever a model raises is the answer to its requests, never the end of the server
        return Result(error=error)
    return Result(outputs, None, gathered - begun, time.monotonic_ns() - gathered)


class InlineWorker(Worker):
    """Runs a model in the event loop: the quickest way for models that take less time than a change of threads.

    Nothing else is served while it runs.
    """

    def __init__(self, load: Loader) -> None:
        self._load = load
        self._model: LoadedModel | None = None

    async def start(self) -> None:
        model = await asyncio.get_running_loop().run_in_executor(None, self._load)
        self._model, self.signature = model, model.signature

    def submit(self, batch: Batch, done: Done) -> None:
        assert self._model is not None
        done(run_batch(self._model, batch))

    async def close(self) -> None:
        if self._model is not None:
            self._model.close()
            self._model = None


class ThreadWorker(Worker):
    """Runs a model of its own in a thread of its own."""

    def __init__(self, load: Loader) -> None:
        self._load = load
        self._model: LoadedModel | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="narrowcast-model")

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        model = await self._loop.run_in_executor(self._thread, self._load)
        self._model, self.signature = model, model.signature

    def submit(self, batch: Batch, done: Done) -> None:
        self._thread.submit(self._run, batch, done)

    def _run(self, batch: Batch, done: Done) -> None:
        assert self._model is not None
        result = run_batch(self._model, batch)
        self._loop.call_soon_threadsafe(done, result)

    async def close(self) -> None:
        if self._model is not None:
            self._thread.submit(self._model.close)  # behind the batch that may still run
        self._thread.shutdown(wait=False)
