"""A model in a process of its own, so that nothing that a model does can end the server.

Tensors go through shared memory; a socket carries one short message per batch each way, which is the doorbell too. A
process that dies is started again, later each time it dies young.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from narrowcast import errors
from narrowcast.errors import NarrowcastError, RuntimeFailedError
from narrowcast.serving.refusals import WorkerLostError
from narrowcast.serving.signature import Signature
from narrowcast.serving.watching.events import fields
from narrowcast.serving.workers.arena import Arena, anonymous_file
from narrowcast.serving.workers.base import Batch, Done, Result, Worker
from narrowcast.serving.workers.frames import Frames, pack, read_signature

__all__ = ["ProcessWorker"]

_log = logging.getLogger(__name__)

#: Waits before a dead process is started again: doubled each time, up to the longest.
_FIRST_BACKOFF = 0.1
_LONGEST_BACKOFF = 30.0
#: A process that lived so long, and ran a batch, died neither of being started nor of every batch.
_GROWN_UP_SECONDS = 10.0
_CLOSE_SECONDS = 5.0
#: What a refusal to load may be; anything else a process names is a failure of its runtime.
_LOAD_ERRORS: dict[str, type[NarrowcastError]] = {
    kind.__name__: kind for kind in (errors.ArtifactError, errors.RuntimeMissingError, errors.RuntimeFailedError)
}
_RUN_ERRORS: dict[str, type[NarrowcastError]] = {"DataError": errors.DataError}


class ProcessWorker(Worker):
    """Runs the artifact in a folder in a process.

    Args:
        folder: The artifact; the process checks its hashes before it loads it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._link: _Link | None = None
        self._closing = False
        self._deaths = 0
        self._respawn: asyncio.Task[None] | None = None
        self._reaping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        link = _Link(self._lost)
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


class _Link(asyncio.Protocol):
    """A process that runs a model: its socket and its shared memory.

    Args:
        lost: Called when a process that had loaded its model has ended.
    """

    signature: Signature
    pid: int

    def __init__(self, lost: Callable[[], None]) -> None:
        self._lost = lost
        self._frames = Frames()
        self._loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._ended = asyncio.Event()
        self._done: Done | None = None
        self._input_ns = 0
        self.born = time.monotonic()
        self.answered = False

    async def open(self, folder: Path) -> None:
        """Start the process and return when it has loaded the artifact.

        Raises:
            NarrowcastError: It could not.
        """
        try:
            await self._spawn(folder)
        except OSError as error:
            raise RuntimeFailedError(f"a worker process cannot be started: {error.strerror or error}") from error
        try:
            self.signature = read_signature(await self._loaded)
        except BaseException:
            self.kill()
            await self.close()
            raise

    async def _spawn(self, folder: Path) -> None:
        """Start the process, or leave nothing behind.

        Raises:
            OSError: The system has no process or descriptor left.
        """
        with ExitStack() as undo:
            ours, theirs = socket.socketpair()
            undo.callback(ours.close)
            with theirs:
                inputs = self._arena(undo)
                outputs = self._arena(undo)
                self._inputs, self._outputs = inputs, outputs
                passed = (theirs.fileno(), inputs.descriptor, outputs.descriptor)
                command = [sys.executable, "-m", "narrowcast.serving.workers.child", *map(str, passed), str(folder)]
                self._process = await asyncio.create_subprocess_exec(
                    *command, pass_fds=passed, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
                )
            undo.callback(self._kill_process)
            self.pid = self._process.pid
            self._transport, _ = await self._loop.create_connection(lambda: self, sock=ours)
            undo.pop_all()

    @staticmethod
    def _arena(undo: ExitStack) -> Arena:
        arena = Arena(anonymous_file())
        undo.callback(arena.close)
        return arena

    @property
    def ended(self) -> bool:
        """Whether the process has closed its socket."""
        return self._ended.is_set()

    def data_received(self, data: bytes) -> None:
        for document in self._frames.feed(data):
            if not self._loaded.done():
                self._answer_load(document)
            else:
                self._answer(document)

    def _answer_load(self, document: dict[str, Any]) -> None:
        refused = document.get("refused")
        if refused is None:
            self._loaded.set_result(document["signature"])
            return
        kind = _LOAD_ERRORS.get(refused["type"], RuntimeFailedError)
        self._loaded.set_exception(kind(refused["what"], allowed=refused["allowed"], next_step=refused["next"]))

    def submit(self, batch: Batch, done: Done) -> None:
        """Put a batch into the shared memory and ring."""
        begun = time.monotonic_ns()
        tensors = [
            (spec.name, spec.datatype, [part[spec.name] for part in batch.parts]) for spec in self.signature.inputs
        ]
        placed = self._inputs.write(tensors)
        self._done = done
        self._input_ns = time.monotonic_ns() - begun
        self._transport.write(pack({"inputs": placed}))

    def _answer(self, document: dict[str, Any]) -> None:
        done, self._done = self._done, None
        if done is None:
            return
        self.answered = True
        try:
            result = self._result(document)
        except Exception as error:  # such as no memory left for the copy: whatever it is, who waits must hear of it
            result = Result(error=error)
        done(result)

    def _result(self, document: dict[str, Any]) -> Result:
        """Return what the process says has become of its batch."""
        if "failed" in document:
            kind = _RUN_ERRORS.get(document["type"], RuntimeFailedError)
            return Result(error=kind(document["failed"]))
        begun = time.monotonic_ns()
        # Copied, because the next batch is written to the same place while answers to this one are still being sent.
        outputs = {name: array.copy() for name, array in self._outputs.read(document["outputs"]).items()}
        moved = document["output_ns"] + time.monotonic_ns() - begun
        return Result(outputs, None, self._input_ns, document["infer_ns"], moved)

    def connection_lost(self, exc: Exception | None) -> None:
        self._inputs.close()
        self._outputs.close()
        self._ended.set()
        lost = WorkerLostError("the worker process of the model has ended; the request may be sent again")
        if not self._loaded.done():
            self._loaded.set_exception(RuntimeFailedError("the worker process ended while it loaded the model"))
            return
        done, self._done = self._done, None
        self._lost()
        if done is not None:
            done(Result(error=lost))

    def kill(self) -> None:
        """End the process now, whatever it does; it is lost at once, even if the system takes its time to end it."""
        self._kill_process()
        self._transport.abort()

    def _kill_process(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def close(self) -> None:
        """Close the socket, at which the process ends, and return when it has; one that runs a batch is killed."""
        if self._done is None:
            self._transport.close()
        else:
            self.kill()
        await self._ended.wait()
        await self.reap()

    async def reap(self) -> None:
        """Return when the process has ended, now that its socket is closed; one that does not end is killed."""
        try:
            await asyncio.wait_for(self._process.wait(), _CLOSE_SECONDS)
        except TimeoutError:
            self._kill_process()
            await self._process.wait()
