"""A process that runs a model, as its server sees it: its socket and its shared memory.

Tensors go through shared memory; a socket carries one short message per batch each way, which is the doorbell too. The
process may have two batches: the one that it runs, and the next, each with its own memory, so that it goes on at once where
it otherwise waited for the server. What a batch may still be taken back for is said in memory too, see :class:`Marks`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narrowcast import errors
from narrowcast.errors import NarrowcastError, RuntimeFailedError
from narrowcast.serving.refusals import WorkerLostError
from narrowcast.serving.signature import Signature
from narrowcast.serving.workers.arena import Arena, anonymous_file
from narrowcast.serving.workers.base import Batch, Done, Result
from narrowcast.serving.workers.frames import Frames, pack, read_signature
from narrowcast.serving.workers.marks import SLOTS, Marks

__all__ = ["Link"]

_CLOSE_SECONDS = 5.0
#: What a refusal to load may be; anything else a process names is a failure of its runtime.
_LOAD_ERRORS: dict[str, type[NarrowcastError]] = {
    kind.__name__: kind for kind in (errors.ArtifactError, errors.RuntimeMissingError, errors.RuntimeFailedError)
}
_RUN_ERRORS: dict[str, type[NarrowcastError]] = {"DataError": errors.DataError}


@dataclass(slots=True)
class _Call:
    """A batch that the process has.

    Attributes:
        number: Its number; batches are answered in this order.
        done: Whom to tell; None once it was taken back.
        input_ns: What moving its inputs took.
    """

    number: int
    done: Done | None
    input_ns: int


class Link(asyncio.Protocol):
    """The server's end of a worker process.

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
        self._calls: deque[_Call] = deque()
        self._number = 0
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
                self._marks = Marks.create()
                undo.callback(self._marks.close)
                self._inputs, self._outputs = ([self._arena(undo) for _ in range(SLOTS)] for _ in range(2))
                arenas = (arena.descriptor for arena in (*self._inputs, *self._outputs))
                passed = (theirs.fileno(), self._marks.descriptor, *arenas)
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

    @property
    def has_room(self) -> bool:
        """Whether it can have another batch now: beside the one that it runs, and what was taken back."""
        wanted = sum(call.done is not None for call in self._calls)
        return len(self._calls) < SLOTS and wanted < SLOTS - 1

    def submit(self, batch: Batch, done: Done) -> None:
        """Put a batch into the shared memory and ring; only while there is room."""
        begun = time.monotonic_ns()
        tensors = [
            (spec.name, spec.datatype, [part[spec.name] for part in batch.parts]) for spec in self.signature.inputs
        ]
        number = self._number + 1
        placed = self._inputs[number % SLOTS].write(tensors)
        message = pack({"number": number, "inputs": placed, "before": batch.before})
        self._number = number
        self._calls.append(_Call(number, done, time.monotonic_ns() - begun))
        self._transport.write(message)

    def recall(self) -> bool:
        """Take the last batch back; return whether it has not begun, so that nobody hears of it any more."""
        last = self._calls[-1] if self._calls else None
        if last is None or last.done is None or not self._marks.recall(last.number):
            return False
        last.done = None
        return True

    def _answer(self, document: dict[str, Any]) -> None:
        call = self._calls.popleft()
        if call.done is None:
            return
        self.answered = True
        try:
            result = self._result(document, call)
        except Exception as error:  # such as no memory left for the copy: whatever it is, who waits must hear of it
            result = Result(error=error)
        call.done(result)

    def _result(self, document: dict[str, Any], call: _Call) -> Result:
        """Return what the process says has become of a batch."""
        if "left_out" in document:
            return Result(began=False)
        if "failed" in document:
            kind = _RUN_ERRORS.get(document["type"], RuntimeFailedError)
            return Result(error=kind(document["failed"]))
        begun = time.monotonic_ns()
        # Copied, because a later batch is written to the same place while answers to this one are still being sent.
        views = self._outputs[call.number % SLOTS].read(document["outputs"])
        outputs = {name: array.copy() for name, array in views.items()}
        moved = document["output_ns"] + time.monotonic_ns() - begun
        return Result(outputs, None, call.input_ns, document["infer_ns"], moved)

    def connection_lost(self, exc: Exception | None) -> None:
        for arena in (*self._inputs, *self._outputs):
            arena.close()
        begun = self._marks.begun
        self._marks.close()
        self._ended.set()
        if not self._loaded.done():
            self._loaded.set_exception(RuntimeFailedError("the worker process ended while it loaded the model"))
            return
        calls = list(self._calls)
        self._calls.clear()
        self._lost()
        lost = WorkerLostError("the worker process of the model has ended; the request may be sent again")
        for index, call in enumerate(calls):
            # A process that was ended before it looked had the first one all the same: whoever sent it waits for it.
            if call.done is not None:
                ran = not index or call.number <= begun
                call.done(Result(error=lost) if ran else Result(began=False))

    def kill(self) -> None:
        """End the process now, whatever it does; it is lost at once, even if the system takes its time to end it."""
        self._kill_process()
        self._transport.abort()

    def _kill_process(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def close(self) -> None:
        """Close the socket, at which the process ends, and return when it has; one that runs a batch is killed."""
        if all(call.done is None for call in self._calls):
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
