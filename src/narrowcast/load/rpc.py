"""Requests over gRPC: one channel for each sender, as many calls on it as are under way."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import Any

import grpc
import grpc.aio

from narrowcast.load.channels import grpc_channel
from narrowcast.load.client import Client
from narrowcast.load.encoding import INFER
from narrowcast.load.target import Target
from narrowcast.measure.load.records import Outcome, outcome_of

__all__ = ["GrpcClient", "outcome_of_error"]

#: What the library says where it made the status itself, because the connection could not be made or ended.
_TRANSPORT = re.compile(r"connect|socket|reset|stream|goaway|\bpipe\b")


def outcome_of_error(status: int, details: str) -> Outcome:
    """Return what an error means; UNAVAILABLE is said by servers that shed, and by the library about connections."""
    if status == grpc.StatusCode.UNAVAILABLE.value[0] and _TRANSPORT.search(details.lower()):
        return Outcome.BROKEN
    return outcome_of(status, grpc=True)


class GrpcClient(Client):
    """Calls that are multiplexed on one HTTP/2 connection; the library does not tell when an answer begins.

    Args:
        target: The server.
        payloads: Serialised messages, by kind.
        connections: Calls that may be under way together; more wait, which is the client's delay.
        timeout: Seconds after which a call is given up.
    """

    def __init__(self, target: Target, payloads: Sequence[bytes], connections: int, timeout: float) -> None:
        super().__init__(payloads, connections, timeout)
        self._target = target
        self._metadata = target.metadata
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: deque[int] = deque()
        self._call: Any = None
        self._channel: Any = None

    async def open(self, count: int) -> None:
        if self._channel is None:
            self._channel = grpc_channel(self._target, asynchronous=True)
            self._call = self._channel.unary_unary(INFER)  # without serialisers: bytes in, bytes out
            try:
                await asyncio.wait_for(self._channel.channel_ready(), self.timeout)
            except TimeoutError as error:
                raise ConnectionRefusedError(f"no gRPC connection within {self.timeout:g} s") from error
        self.peak = 1

    def start(self, number: int) -> None:
        if len(self._tasks) >= self.connections:
            self.waited += 1
            self._waiting.append(number)
        else:
            self._launch(number)

    def _launch(self, number: int) -> None:
        task = asyncio.get_running_loop().create_task(self._one(number))
        self._tasks.add(task)
        task.add_done_callback(self._next)

    def _next(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._waiting and not task.cancelled():
            self._launch(self._waiting.popleft())

    async def _one(self, number: int) -> None:
        log = self.log
        log.sent[number] = now = monotonic()
        left = log.intended[number] + self.timeout - now
        if left <= 0:
            log.end(number, Outcome.TIMEOUT)
            return
        try:
            answer: bytes = await self._call(self.payloads[log.kind[number]], timeout=left, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            status = error.code().value[0]
            log.end(number, outcome_of_error(status, error.details() or ""), status)
        else:
            log.received[number] = len(answer)
            log.end(number, Outcome.OK, 0)

    def give_up(self, now: float) -> None:
        """Do nothing: calls carry their deadline, and end by themselves."""

    def drop(self) -> None:
        self._waiting.clear()
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        self.drop()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()
