"""A server in a thread, and what asks it."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from narrowcast.serving.catalogue import Hosting
from narrowcast.serving.repository import Repository
from narrowcast.serving.server import InferenceServer, ServerOptions
from narrowcast.serving.watching.records import Observer
from narrowcast.serving.workers.sources import Placement, Source

TOKEN = "s3cret"


class Answer:
    """An answer to an HTTP request."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        document = self.json
        assert document.keys() == {"error"}
        return document["error"]


class Running:
    """A server whose event loop runs in a thread."""

    def __init__(
        self, repository: Repository, hosting: Hosting, options: ServerOptions, observers: Sequence[Observer] = ()
    ) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.server = self.call(self._start(repository, hosting, options, observers))

    async def _start(
        self, repository: Repository, hosting: Hosting, options: ServerOptions, observers: Sequence[Observer]
    ) -> InferenceServer:
        server = InferenceServer(repository, hosting, options, observers)
        await server.start()
        return server

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.ports['http']}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.server.ports['grpc']}"

    def ask(self, method: str, target: str, body: bytes = b"", port: str = "http", **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.ports[port], timeout=30)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, target, body or None, named)
        answer = Answer(connection.getresponse())
        connection.close()
        return answer

    def infer(self, model: str, body: bytes, **headers: str) -> Answer:
        return self.ask("POST", f"/v2/models/{model}/infer", body, **headers)

    def admin(self, target: str) -> Answer:
        return self.ask("POST", f"/v2/repository/models/{target}", Authorization=f"Bearer {TOKEN}")

    def stop(self) -> None:
        self.call(self.server.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(30)
        self.loop.close()


Serve = Callable[..., Running]


@contextmanager
def _servers() -> Generator[Serve]:
    running: list[Running] = []

    def start(
        sources: dict[str, Source] | None = None,
        places: tuple[Path, ...] = (),
        hosting: Hosting = Hosting(Placement.THREAD),  # noqa: B008  frozen
        observers: Sequence[Observer] = (),
        **options: Any,
    ) -> Running:
        wanted = replace(ServerOptions(port=0, grpc_port=None, metrics_port=None, token=TOKEN, grace=10.0), **options)
        running.append(Running(Repository(list(places), sources), hosting, wanted, observers))
        return running[-1]

    try:
        yield start
    finally:
        for item in running:
            if item.loop.is_running():
                item.stop()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """From models by name, or places, to a running server."""
    with _servers() as start:
        yield start


@pytest.fixture(scope="module")
def serve_once() -> Iterator[Serve]:
    """The same, for servers that all tests of a module share."""
    with _servers() as start:
        yield start
