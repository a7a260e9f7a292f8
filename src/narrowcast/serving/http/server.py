"""A listening socket and its connections."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from narrowcast.serving.http.connection import Connection, Handler
from narrowcast.serving.limits import Limits
from narrowcast.serving.refusals import Refusal

__all__ = ["HttpServer"]

_log = logging.getLogger(__name__)
_SWEEP_SECONDS = 0.25
_BACKLOG = 1024


class HttpServer:
    """Serves one handler on one address.

    Args:
        handler: Answers requests.
        limits: What clients may ask.
        on_refused: Called with what is refused before the handler sees it, or by the handler.
    """

    def __init__(self, handler: Handler, limits: Limits, on_refused: Callable[[Refusal], None] | None = None) -> None:
        self.handler = handler
        self.limits = limits
        self._on_refused = on_refused
        self.loop = asyncio.get_running_loop()
        self._connections: set[Connection] = set()
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    async def listen(self, host: str, port: int) -> int:
        """Begin to accept connections, and return the port (that the system chose, where 0 was asked for).

        Raises:
            OSError: The address cannot be had.
        """
        self._server = await self.loop.create_server(
            lambda: Connection(self), host, port, backlog=_BACKLOG, reuse_address=True
        )
        self._sweep()
        bound: socket.socket = self._server.sockets[0]
        return int(bound.getsockname()[1])

    def opened(self, connection: Connection) -> bool:
        self._connections.add(connection)
        return len(self._connections) <= self.limits.connections

    def closed(self, connection: Connection) -> None:
        self._connections.discard(connection)

    def refused(self, refusal: Refusal) -> None:
        if self._on_refused is not None:
            self._on_refused(refusal)

    def failed(self, error: BaseException) -> None:
        _log.error("a request failed", exc_info=error)

    @property
    def busy(self) -> bool:
        """Whether an answer is due on any connection."""
        return any(connection.busy for connection in self._connections)

    def _sweep(self) -> None:
        """End the connections whose time is over: one timer for all is cheaper than one for each request."""
        now = self.loop.time()
        for connection in list(self._connections):
            if connection.deadline is not None and connection.deadline <= now:
                connection.expire()
        self._sweeper = self.loop.call_later(_SWEEP_SECONDS, self._sweep)

    def stop_listening(self) -> None:
        """Accept no more connections; those that are there go on."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def close(self) -> None:
        """Accept no more connections, and close those on which nothing is due."""
        self.stop_listening()
        for connection in list(self._connections):
            connection.retire()
        end = self.loop.time() + 1.0
        while self._connections and self.loop.time() < end:
            await asyncio.sleep(0.01)
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self._connections):
            connection.abort()
