"""A server of the Open Inference Protocol that answers after times that a test plants.

It runs one queue, first come, first served: a request that arrives at ``t`` begins at the later of ``t`` and the end of the
one before, and is answered when it ends. The times are computed and not slept, so that a busy machine delays an answer but
never the queue behind it.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic, sleep
from types import TracebackType
from typing import Any, Self

import httptools

from narrowcast.load.sender import new_loop

__all__ = ["FakeServer", "Plan"]

METADATA: dict[str, Any] = {
    "name": "fake",
    "versions": ["1"],
    "platform": "none",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
}
ANSWER = b'{"model_name":"fake","outputs":[{"name":"y","datatype":"FP32","shape":[1,4],"data":[0,0,0,0]}]}'


@dataclass
class Plan:
    """How the server behaves.

    Attributes:
        service: From the number of a request to the seconds that it takes.
        places: Requests that may wait; more are answered 503 at once.
        stall: Seconds after the second request, and how long the queue then stands still.
        status: From the number of a request to the status of its answer.
        answers: Whether it answers at all, by number.
        on_request: Told the number of each request to the model.
        token: What the header Authorization has to hold; empty: nothing.
        metadata: Of the model.
        config: Of the model; None: there is no such path.
    """

    service: Callable[[int], float] = lambda number: 0.0
    places: int = 1 << 30
    stall: tuple[float, float] | None = None
    status: Callable[[int], int] = lambda number: 200
    answers: Callable[[int], bool] = lambda number: True
    token: str = ""
    on_request: Callable[[int], object] = lambda number: None
    metadata: dict[str, Any] = field(default_factory=lambda: METADATA)
    config: dict[str, Any] | None = field(default_factory=lambda: {"max_batch_size": 8})


class FakeServer:
    """Serves the model ``fake`` on a free port of this machine until its block ends.

    Attributes:
        bodies: Of the requests to the model, in the order of their arrival.
        heads: Headers of all requests, names in lower case.
        requests: How many there were.
        largest_queue: Most requests that waited together.
    """

    def __init__(self, plan: Plan | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.plan = plan or Plan()
        self._tls = tls
        self.heads: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self.requests = 0
        self.largest_queue = 0
        self.connections: set[_Connection] = set()
        self._waiting = 0
        self._free = 0.0
        self._first: float | None = None
        self._loop = new_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        return f"{'http' if self._tls is None else 'https'}://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        listening = self._loop.create_server(lambda: _Connection(self), "127.0.0.1", 0, ssl=self._tls)
        server = self._server = self._loop.run_until_complete(listening)
        self.port: int = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        for connection in list(self.connections):
            connection.transport.abort()
        self._loop.run_until_complete(asyncio.sleep(0.01))
        self._loop.close()
        asyncio.set_event_loop(None)

    def call(self, action: Callable[[], object]) -> None:
        """Do something in the server's thread."""
        self._loop.call_soon_threadsafe(action)

    def wait_for(self, requests: int) -> None:
        """Wait until so many requests have come."""
        end = monotonic() + 60
        while self.requests < requests:
            assert monotonic() < end, "they never came"
            sleep(0.02)

    def die(self) -> None:
        """Listen no more and break all connections, from within the server's thread."""
        self._server.close()
        for connection in list(self.connections):
            connection.transport.abort()

    def forget(self) -> None:
        """Empty the queue."""
        self._free = 0.0

    def answer(self, connection: _Connection, path: str, body: bytes) -> None:
        """Answer a request, now or when it has been served."""
        documents: dict[str, Any] = {
            "/v2": {"name": "fake server", "version": "1", "extensions": ["binary_tensor_data"]},
            "/v2/models/fake": self.plan.metadata,
            "/v2/models/fake/config": self.plan.config,
            "/v2/repository/index": [{"name": "fake", "version": "1", "state": "READY", "reason": ""}],
        }
        if self.plan.token and self.heads[-1].get("authorization") != self.plan.token:
            connection.send(401, b'{"error":"who are you?"}')
        elif path == "/v2/models/fake/infer":
            self._infer(connection, body)
        elif documents.get(path) is not None:
            connection.send(200, json.dumps(documents[path]).encode())
        else:
            connection.send(404, b'{"error":"not here"}')

    def _infer(self, connection: _Connection, body: bytes) -> None:
        now, number = monotonic(), self.requests
        self.requests += 1
        self.bodies.append(body)
        self.plan.on_request(number)
        plan = self.plan
        if number == 1:  # the one before only asks whether all is well
            self._first = now
        if self._waiting >= plan.places:
            connection.send(503, b'{"error":"full"}')
            return
        start = max(now, self._free)
        if plan.stall is not None and self._first is not None and start >= self._first + plan.stall[0]:
            start = max(start, self._first + sum(plan.stall))
        self._free = start + plan.service(number)
        self._waiting += 1
        self.largest_queue = max(self.largest_queue, self._waiting)
        self._loop.call_at(self._free, self._served, connection, number)

    def _served(self, connection: _Connection, number: int) -> None:
        self._waiting -= 1
        if self.plan.answers(number):
            status = self.plan.status(number)
            connection.send(status, ANSWER if status == 200 else b'{"error":"planted"}')


class _Connection(asyncio.Protocol):
    def __init__(self, server: FakeServer) -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._path = ""
        self._body = b""
        self._head: dict[str, str] = {}

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.abort()

    def on_url(self, url: bytes) -> None:
        self._path = url.decode()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        body, self._body = self._body, b""
        self._server.heads.append(self._head)
        self._head = {}
        self._server.answer(self, self._path, body)

    def send(self, status: int, body: bytes) -> None:
        self.transport.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))
