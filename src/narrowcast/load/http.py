"""Requests over HTTP/1.1: connections that are kept, one request at a time on each."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import Any, cast

import httptools

from narrowcast.load.client import Client
from narrowcast.load.target import Target
from narrowcast.measure.load.records import Outcome, outcome_of

__all__ = ["HttpClient"]

_NONE = -1


class HttpClient(Client):
    """A pool of connections; the one that was used last is used first, so that as few as possible are.

    A request that finds no idle connection gets a new one; its connecting counts in the latency, not as the client's delay.
    Where no more may be opened, it waits for one, which is the client's delay.

    Args:
        target: The server.
        payloads: Whole requests, by kind.
        connections: The most that may be open together.
        timeout: Seconds after which a request is given up.
    """

    def __init__(self, target: Target, payloads: Sequence[bytes], connections: int, timeout: float) -> None:
        super().__init__(payloads, connections, timeout)
        self._target = target
        self._tls = target.access.context() if target.secured else None
        self._idle: list[_Connection] = []
        self._open = 0
        self._waiting: deque[int] = deque()
        self._flying: dict[int, _Connection | None] = {}  # in the order of being due; None while it connects
        self._opening: set[asyncio.Task[None]] = set()

    async def open(self, count: int) -> None:
        missing = min(count, self.connections) - self._open
        if missing > 0:
            opening = asyncio.gather(*(self._connect_ahead() for _ in range(missing)))
            try:
                await asyncio.wait_for(opening, self.timeout)
            except TimeoutError as error:
                raise ConnectionRefusedError(f"no connection within {self.timeout:g} s") from error

    def start(self, number: int) -> None:
        if self._idle:
            self._send(self._idle.pop(), number)
        elif self._open < self.connections:
            self.log.sent[number] = monotonic()
            self._flying[number] = None
            task = asyncio.get_running_loop().create_task(self._connect_for(number))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)
        else:
            self.waited += 1
            self._waiting.append(number)

    def give_up(self, now: float) -> None:
        intended, late = self.log.intended, now - self.timeout
        while self._waiting and intended[self._waiting[0]] <= late:
            self.log.end(self._waiting.popleft(), Outcome.TIMEOUT)
        overdue: list[int] = []
        for number in self._flying:
            if intended[number] > late:
                break
            overdue.append(number)
        for number in overdue:
            connection = self._flying.pop(number)
            if connection is not None:
                connection.number = _NONE
                connection.transport.abort()
            self.log.end(number, Outcome.TIMEOUT)

    def drop(self) -> None:
        self._waiting.clear()
        under_way = list(self._flying.values())
        self._flying.clear()
        for connection in under_way:
            if connection is not None:
                connection.number = _NONE
                connection.transport.abort()

    async def close(self) -> None:
        self.drop()
        for task in self._opening:
            task.cancel()
        for connection in self._idle:
            connection.transport.abort()
        await asyncio.sleep(0)

    def _send(self, connection: _Connection, number: int) -> None:
        self._flying[number] = connection
        connection.number = number
        if self.log.sent[number] != self.log.sent[number]:  # NaN: a connection was there at once
            self.log.sent[number] = monotonic()
        connection.transport.write(self.payloads[self.log.kind[number]])

    async def _connect(self) -> _Connection:
        self._open += 1
        self.peak = max(self.peak, self._open)
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self),
                self._target.host,
                self._target.port,
                ssl=self._tls,
                ssl_handshake_timeout=self.timeout if self._tls else None,
            )
        except (OSError, asyncio.CancelledError):
            self._open -= 1
            raise
        return connection

    async def _connect_ahead(self) -> None:
        self._idle.append(await self._connect())

    async def _connect_for(self, number: int) -> None:
        log = self.log
        try:
            connection = await self._connect()
        except OSError:
            if self.log is log and self._flying.pop(number, _MISSING) is not _MISSING:
                log.end(number, Outcome.BROKEN)
            self._serve_waiting()
            return
        if self.log is log and number in self._flying:
            self._send(connection, number)
        else:  # given up meanwhile, or of an earlier run
            self.free(connection)

    def _serve_waiting(self) -> None:
        """Connect for the request that has waited longest, now that a connection fewer is open."""
        if self._waiting and not self._idle and self._open < self.connections:
            self.start(self._waiting.popleft())

    def free(self, connection: _Connection) -> None:
        """Take back a connection whose request has ended."""
        if self._waiting:
            self._send(connection, self._waiting.popleft())
        else:
            self._idle.append(connection)

    def ended(self, number: int, connection: _Connection, *, keep: bool) -> None:
        """Take note of a whole answer."""
        del self._flying[number]
        status = connection.parser.get_status_code()
        if keep:
            self.free(connection)
        else:
            connection.transport.close()
        self.log.end(number, outcome_of(status), status)

    def lost(self, connection: _Connection) -> None:
        """Take note of the end of a connection."""
        self._open -= 1
        number = connection.number
        if number != _NONE:
            connection.number = _NONE
            del self._flying[number]
            self.log.end(number, Outcome.BROKEN)
        elif connection in self._idle:
            self._idle.remove(connection)
        self._serve_waiting()


#: Stands for a request that has ended already.
_MISSING: Any = object()


class _Connection(asyncio.Protocol):
    """One connection; ``number`` is the request that is under way on it."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self.number = _NONE
        self.transport: asyncio.Transport
        self.parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        number = self.number
        if number != _NONE:
            log = self._client.log
            if not log.received[number]:
                log.first[number] = monotonic()
            log.received[number] += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.abort()

    def on_message_complete(self) -> None:
        """Take note of a whole answer; the parser calls this."""
        number, self.number = self.number, _NONE
        if number != _NONE:
            self._client.ended(number, self, keep=self.parser.should_keep_alive())

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.lost(self)
