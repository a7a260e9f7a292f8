"""One replica of a model version: a server without listeners, asked by the ingress."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Self

from narrowcast.serving.asgi import EMBEDDED
from narrowcast.serving.http.message import Request, Response
from narrowcast.serving.ray.answering import answer_call, answer_request
from narrowcast.serving.ray.plan import PlannedVersion
from narrowcast.serving.ray.wire import Call, CallAnswer, Report
from narrowcast.serving.repository import Repository
from narrowcast.serving.server import InferenceServer
from narrowcast.serving.signature import Signature
from narrowcast.serving.workers.sources import ArtifactSource

__all__ = ["ModelReplica"]


class ModelReplica:
    """Answers requests for one model version; made by :meth:`started`.

    Args:
        server: Serves the version and nothing else.
        name: What Ray calls the replica.
    """

    def __init__(self, server: InferenceServer, name: str) -> None:
        (served,) = server.catalogue.served()
        self._server = server
        self._scheduler = served.scheduler
        self._name = name

    @classmethod
    async def started(cls, planned: PlannedVersion, name: str) -> Self:
        """Return a replica whose model is loaded.

        Args:
            planned: What to run.
            name: What Ray calls the replica.

        Raises:
            NarrowcastError: The model cannot be loaded.
        """
        sources = {planned.name: {planned.version: ArtifactSource(Path(planned.folder))}}
        options = replace(EMBEDDED, limits=planned.limits, grace=planned.grace, load_timeout=None)
        server = InferenceServer(Repository(sources=sources), planned.hosting, options)
        await server.start()
        return cls(server, name)

    @property
    def ready(self) -> bool:
        """Whether the model can run requests."""
        return self._scheduler.workers_alive > 0

    def signature(self) -> Signature:
        """Return what the model takes and gives."""
        return self._scheduler.signature

    def report(self) -> Report:
        """Return how the replica is."""
        scheduler = self._scheduler
        return Report(self._name, scheduler.statistics, scheduler.pending, scheduler.running)

    async def ask(self, request: Request) -> Response:
        """Answer a request of the REST protocol; cancelling takes it out of the queue."""
        return await answer_request(self._server, request)

    async def call(self, call: Call) -> CallAnswer:
        """Answer a call of the gRPC protocol; cancelling takes it out of the queue."""
        return await answer_call(self._server, call)

    async def stop(self) -> None:
        """Finish what runs within the grace, and unload the model."""
        await self._server.stop()
