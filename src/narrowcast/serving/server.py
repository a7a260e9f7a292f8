"""The server: its listeners, its models, and how it begins and ends."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from narrowcast.errors import OutputError
from narrowcast.serving.catalogue import LOAD_TIMEOUT, Catalogue, Hosting
from narrowcast.serving.http.connection import Handler
from narrowcast.serving.http.server import HttpServer
from narrowcast.serving.limits import Limits
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.repository import Repository
from narrowcast.serving.rest import RestApi
from narrowcast.serving.rpc.server import GrpcServer
from narrowcast.serving.rpc.service import SERVICE, InferenceService
from narrowcast.serving.shared_memory import SharedMemory
from narrowcast.serving.watching.api import MetricsApi, ServerState
from narrowcast.serving.watching.events import fields
from narrowcast.serving.watching.records import Observer, Watched

__all__ = ["InferenceServer", "ServerOptions"]

_log = logging.getLogger(__name__)
#: How long the server still answers "ending" after its last request, so that clients see an answer and no reset.
_LINGER_SECONDS = 0.15


@dataclass(frozen=True)
class ServerOptions:
    """Where a server listens and what it allows.

    Attributes:
        host: Address of all listeners.
        port: Port of the REST protocol; 0 lets the system choose, None is for no such listener.
        grpc_port: Port of the gRPC protocol; 0 lets the system choose, None is for no such listener.
        metrics_port: Port of the metrics, or None for no such listener.
        limits: Bounds on requests.
        token: The administrators' token, or None for no administration.
        shared_memory: Whether clients may register shared memory.
        grace: Seconds that requests have to finish when the server ends.
        memory_budget: Bytes of host memory that loaded models may take together, or None for no bound.
        load_timeout: Seconds that a model version may take to load before that is broken off, or None for ever.
    """

    host: str = "127.0.0.1"
    port: int | None = 8000
    grpc_port: int | None = 8001
    metrics_port: int | None = 8002
    limits: Limits = field(default_factory=Limits)
    token: str | None = None
    shared_memory: bool = False
    grace: float = 30.0
    memory_budget: int | None = None
    load_timeout: float | None = LOAD_TIMEOUT


class InferenceServer:
    """Serves the models of a repository.

    Args:
        repository: The models.
        hosting: How they are run.
        options: Where and for whom.
        observers: Are told, in the event loop, how each request ended.
    """

    def __init__(
        self, repository: Repository, hosting: Hosting, options: ServerOptions, observers: Sequence[Observer] = ()
    ) -> None:
        self.options = options
        self.catalogue = Catalogue(
            repository, hosting, memory_budget=options.memory_budget, load_timeout=options.load_timeout
        )
        self.ports: dict[str, int] = {}
        shared = SharedMemory(allowed=options.shared_memory)
        self._api = RestApi(self.catalogue, options.limits, shared, token=options.token)
        self._service = InferenceService(self.catalogue, options.limits, shared, options.token, observers)
        watched = Watched(self._api.handle, observers) if observers else None
        self._handler: Handler = watched or self._api.handle
        self._grpc = GrpcServer(self._service, self._probe, options.limits)
        self._http = HttpServer(self._handler, options.limits, watched.refused if watched else None)
        self._watch = MetricsApi(self.catalogue, lambda: self.state)
        self._metrics = HttpServer(self._watch.handle, options.limits)

    @property
    def handler(self) -> Handler:
        """What answers the requests of the REST protocol, for those who read them from elsewhere."""
        return self._handler

    @property
    def calls(self) -> grpc.GenericRpcHandler:
        """What answers the calls of the gRPC protocol, for those who read them from elsewhere."""
        return self._service.handler()

    @property
    def state(self) -> ServerState:
        """Whether the server can answer all that it should."""
        if self._service.draining:
            return "ending"
        return "ready" if self.catalogue.ready else "not ready"

    @property
    def metrics_handler(self) -> Handler:
        """What answers requests for the metrics."""
        return self._metrics.handler

    async def start(self) -> None:
        """Load all models, then listen.

        Raises:
            NarrowcastError: A model cannot be loaded, or an address cannot be had.
        """
        options = self.options
        try:
            await self.catalogue.load_all()
            if options.port is not None:
                self.ports["http"] = await _listen(self._http, options.host, options.port)
            if options.grpc_port is not None:
                self.ports["grpc"] = await self._grpc.listen(options.host, options.grpc_port)
            if options.metrics_port is not None:
                self.ports["metrics"] = await _listen(self._metrics, options.host, options.metrics_port)
        except BaseException:
            await self._close()
            raise

    async def run_until_signal(self) -> bool:
        """Serve until SIGTERM or SIGINT, then end; return whether all requests were finished within the grace."""
        asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, asked.set)
        try:
            await asked.wait()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
        return await self.stop()

    async def stop(self) -> bool:
        """Take no more requests, let those that run finish within the grace, and close; return whether they did.

        While they finish, the server still listens and says that it is not ready.
        """
        self._api.draining = self._service.draining = True
        _log.info(
            "the server is ending: %.0f seconds for what runs",
            self.options.grace,
            extra=fields("draining", grace_seconds=self.options.grace),
        )
        finished = True
        try:
            async with asyncio.timeout(self.options.grace):
                while self.catalogue.busy or self._http.busy:
                    await asyncio.sleep(0.005)
                if self.options.port is not None:
                    await asyncio.sleep(_LINGER_SECONDS)
                    self._http.stop_listening()
                    await asyncio.sleep(_LINGER_SECONDS)  # for what the last connections were about to ask
        except TimeoutError:
            finished = not (self.catalogue.busy or self._http.busy)
        await self._close()
        words = "all that it began was finished" if finished else "what it had not finished was refused"
        _log.log(
            logging.INFO if finished else logging.WARNING,
            "the server has ended: %s",
            words,
            extra=fields("ended", finished=finished),
        )
        return finished

    def _probe(self, name: str) -> bool | None:
        """Return whether the server (an empty name, or the service's) or a model can answer."""
        if name in ("", SERVICE):
            return self.catalogue.ready and not self._service.draining
        try:
            return self.catalogue.can_answer(name) and not self._service.draining
        except Refusal:
            return None

    async def _close(self) -> None:
        """Refuse what still waits, answer it, and close everything."""
        await self.catalogue.close()
        await asyncio.gather(self._http.close(), self._grpc.close(), self._metrics.close())
        self._watch.close()


async def _listen(server: HttpServer, host: str, port: int) -> int:
    try:
        return await server.listen(host, port)
    except OSError as error:
        raise OutputError(
            f"{host}:{port} cannot be listened on: {os.strerror(error.errno) if error.errno else error}",
            next_step="name another port",
        ) from error
