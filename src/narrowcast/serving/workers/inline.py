"""Models in the server's own process: in the event loop itself, or in a thread each."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue

from narrowcast.serving.workers.base import Batch, Done, LoadedModel, Result, Worker, joined
from narrowcast.serving.workers.heap import give_back

__all__ = ["InlineWorker", "ThreadWorker"]

_log = logging.getLogger(__name__)
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


class _LocalWorker(Worker):
    """Has a model in this process."""

    def __init__(self, load: Loader) -> None:
        self._load = load
        self._model: LoadedModel | None = None
        self._closed = False

    def _open(self, loaded: Future[LoadedModel]) -> None:
        """Load the model, in a thread that is no reason for the process to stay."""
        if not loaded.set_running_or_notify_cancel():
            return
        try:
            model = self._load()
        except Exception as error:
            loaded.set_exception(error)
            return
        if self._closed:  # it took longer than anybody waited
            model.close()
        self._model = None if self._closed else model
        loaded.set_result(model)

    def memory(self) -> int | None:
        return None if self._model is None else self._model.size


class InlineWorker(_LocalWorker):
    """Runs a model in the event loop: the quickest way for models that take less time than a change of threads.

    Nothing else is served while it runs.
    """

    async def start(self) -> None:
        loaded: Future[LoadedModel] = Future()
        threading.Thread(target=self._open, args=(loaded,), name="narrowcast-load", daemon=True).start()
        self.signature = (await asyncio.wrap_future(loaded)).signature

    def submit(self, batch: Batch, done: Done) -> None:
        assert self._model is not None
        done(run_batch(self._model, batch))

    async def close(self) -> None:
        self._closed = True
        if self._model is not None:
            self._model.close()
            self._model = None
            await asyncio.get_running_loop().run_in_executor(None, give_back)


class ThreadWorker(_LocalWorker):
    """Runs a model of its own in a thread of its own.

    A thread cannot be ended: while a batch runs too long, the worker is down. The process does not wait for it at its end.
    """

    def __init__(self, load: Loader) -> None:
        super().__init__(load)
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._overrun = False

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        loaded: Future[LoadedModel] = Future()
        threading.Thread(target=self._work, name="narrowcast-model", daemon=True).start()
        self._tasks.put(partial(self._open, loaded))
        self.signature = (await asyncio.wrap_future(loaded)).signature

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()

    def submit(self, batch: Batch, done: Done) -> None:
        self._tasks.put(partial(self._run, batch, done))

    def _run(self, batch: Batch, done: Done) -> None:
        assert self._model is not None
        result = run_batch(self._model, batch)
        with contextlib.suppress(RuntimeError):  # the event loop has ended before the model came back
            self._loop.call_soon_threadsafe(self._came, done, result)

    def _came(self, done: Done, result: Result) -> None:
        done(result)
        if self._overrun:
            self._overrun = False
            self.on_up(self)

    def abort(self) -> None:
        self._overrun = True
        self.on_down(self)

    async def close(self) -> None:
        self._tasks.put(self._shut)  # behind the batch that may still run
        self._tasks.put(None)

    def _shut(self) -> None:
        try:
            if self._model is not None:
                self._model.close()
        except Exception as error:
            _log.error("a model failed to close", exc_info=error)
        self._model = None
        give_back()
