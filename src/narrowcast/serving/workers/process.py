"""A model in a process of its own, so that nothing that a model does can end the server.

A process that dies is started again, later each time it dies young.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

import psutil

from narrowcast.errors import NarrowcastError, RuntimeFailedError
from narrowcast.serving.refusals import WorkerLostError
from narrowcast.serving.watching.events import fields
from narrowcast.serving.workers.base import Batch, Done, Result, Worker
from narrowcast.serving.workers.link import Link

__all__ = ["ProcessWorker"]

_log = logging.getLogger(__name__)

#: Waits before a dead process is started again: doubled each time, up to the longest.
_FIRST_BACKOFF = 0.1
_LONGEST_BACKOFF = 30.0
#: A process that lived so long, and ran a batch, died neither of being started nor of every batch.
_GROWN_UP_SECONDS = 10.0


class ProcessWorker(Worker):
    """Runs the artifact in a folder in a process.

    Args:
        folder: The artifact; the process checks its hashes before it loads it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._link: Link | None = None
        self._closing = False
        self._deaths = 0
        self._respawn: asyncio.Task[None] | None = None
        self._reaping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        link = Link(self._lost)
        await link.open(self._folder)
        if link.ended:
            await link.reap()
            raise RuntimeFailedError("the worker process ended as soon as it had loaded the model")
        self._link = link
        self.signature = link.signature

    @property
    def pid(self) -> int | None:
        """The process, or None while there is none."""
        return self._link.pid if self._link is not None else None

    @property
    def up(self) -> bool:
        """Whether it can run a batch now."""
        return self._link is not None

    @property
    def takes_ahead(self) -> bool:
        return self._link is not None and self._link.has_room

    def memory(self) -> int | None:
        pid = self.pid
        try:
            return None if pid is None else psutil.Process(pid).memory_full_info().uss
        except psutil.Error:  # it has ended meanwhile
            return None

    def submit(self, batch: Batch, done: Done) -> None:
        if self._link is None:
            done(Result(error=WorkerLostError("the worker process of the model has ended")))
            return
        self._link.submit(batch, done)

    def recall(self) -> bool:
        return self._link is not None and self._link.recall()

    def abort(self) -> None:
        if self._link is not None:
            _log.error(
                "worker process %d of %s runs a batch for too long and is ended",
                *(self._link.pid, self._folder),
                extra=fields("worker_hung", pid=self._link.pid, artifact=str(self._folder)),
            )
            self._link.kill()

    def _lost(self) -> None:
        """Take note of the end of the process, and start another unless this is the end of the worker."""
        link, self._link = self._link, None
        if self._closing or link is None:
            return
        grown_up = link.answered and time.monotonic() - link.born > _GROWN_UP_SECONDS
        self._deaths = 0 if grown_up else self._deaths + 1
        _log.error(
            "worker process %d of %s has ended",
            *(link.pid, self._folder),
            extra=fields("worker_died", pid=link.pid, artifact=str(self._folder)),
        )
        self.on_down(self)
        self._reaping = asyncio.create_task(link.reap())
        self._respawn = asyncio.create_task(self._start_again(self._reaping))

    async def _start_again(self, before: asyncio.Task[None]) -> None:
        """Start a process when the one before has ended and given its memory back."""
        await asyncio.shield(before)
        while not self._closing:
            await asyncio.sleep(min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2 ** min(self._deaths, 16)))
            try:
                await self.start()
            except NarrowcastError as error:
                self._deaths += 1
                _log.error(
                    "worker of %s cannot be started again: %s",
                    *(self._folder, error.what),
                    extra=fields("worker_failed", artifact=str(self._folder)),
                )
            else:
                _log.info(
                    "worker process %d of %s took its place",
                    *(self.pid, self._folder),
                    extra=fields("worker_ready", pid=self.pid or 0, artifact=str(self._folder)),
                )
                self.on_up(self)
                return

    async def close(self) -> None:
        self._closing = True
        if self._respawn is not None:
            self._respawn.cancel()
            await asyncio.gather(self._respawn, return_exceptions=True)
        if self._reaping is not None:
            await self._reaping
        if self._link is not None:
            await self._link.close()
            self._link = None
