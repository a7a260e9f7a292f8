"""One replica of a model version: a server without listeners, asked by the ingress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, Self

import grpc

from narrowcast.serving.asgi import EMBEDDED
from narrowcast.serving.http.message import Request, Response, refused
from narrowcast.serving.ray.plan import PlannedVersion
from narrowcast.serving.ray.wire import Call, CallAnswer
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.repository import Repository
from narrowcast.serving.rpc.service import SERVICE
from narrowcast.serving.server import InferenceServer
from narrowcast.serving.workers.sources import ArtifactSource

__all__ = ["ModelReplica"]


class ModelReplica:
    """Answers requests for one model version.

    Args:
        planned: What to run.
    """

    def __init__(self, planned: PlannedVersion) -> None:
        sources = {planned.name: {planned.version: ArtifactSource(Path(planned.folder))}}
        options = replace(EMBEDDED, limits=planned.limits, grace=planned.grace)
        self._server = InferenceServer(Repository(sources=sources), planned.hosting, options)

    @classmethod
    async def started(cls, planned: PlannedVersion) -> Self:
        """Return a replica whose model is loaded.

        Raises:
            NarrowcastError: The model cannot be loaded.
        """
        replica = cls(planned)
        await replica._server.start()
        return replica

    @property
    def ready(self) -> bool:
        """Whether the model can run requests."""
        return self._server.catalogue.ready

    async def ask(self, request: Request) -> Response:
        """Answer a request of the REST protocol; cancelling takes it out of the queue."""
        try:
            outcome = self._server.handler(request)
            response = outcome if isinstance(outcome, Response) else await outcome
        except Refusal as refusal:
            response = refused(refusal)
        response.body = (b"".join(response.body),)
        return response

    async def call(self, call: Call) -> CallAnswer:
        """Answer a call of the gRPC protocol; cancelling takes it out of the queue."""
        details: Any = SimpleNamespace(method=f"/{SERVICE}/{call.method}", invocation_metadata=call.metadata)
        method: Any = self._server.calls.service(details)
        try:
            answer = await method.unary_unary(method.request_deserializer(call.message), _Context(call.metadata))
        except _AbortedError as aborted:
            return aborted.answer
        return CallAnswer(method.response_serializer(answer))

    async def stop(self) -> None:
        """Finish what runs within the grace, and unload the model."""
        await self._server.stop()


class _AbortedError(Exception):
    """The end of a call with a status."""

    def __init__(self, answer: CallAnswer) -> None:
        super().__init__(answer.details)
        self.answer = answer


class _Context:
    """As much of a call's context as the service asks for; deadlines of calls do not come through Ray."""

    def __init__(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self._metadata = metadata

    def time_remaining(self) -> None:
        return None

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Sequence[tuple[str, str]] = ()
    ) -> NoReturn:
        raise _AbortedError(CallAnswer(b"", code.name, details, tuple(trailing_metadata)))
