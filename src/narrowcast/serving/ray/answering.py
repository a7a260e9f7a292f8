"""Requests and calls that come through Ray, answered by the handlers of a server without listeners."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import grpc

from narrowcast.serving.http.message import Request, Response, refused
from narrowcast.serving.ray.wire import Call, CallAnswer
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.rpc.service import SERVICE
from narrowcast.serving.server import InferenceServer

__all__ = ["answer_call", "answer_request"]


async def answer_request(server: InferenceServer, request: Request) -> Response:
    """Return the answer to a request of the REST protocol; cancelling takes it out of the queue."""
    try:
        outcome = server.handler(request)
        response = outcome if isinstance(outcome, Response) else await outcome
    except Refusal as refusal:
        response = refused(refusal)
    response.body = (b"".join(response.body),)
    return response


async def answer_call(server: InferenceServer, call: Call) -> CallAnswer:
    """Return the answer to a call of the gRPC protocol; cancelling takes it out of the queue."""
    details: Any = SimpleNamespace(method=f"/{SERVICE}/{call.method}", invocation_metadata=call.metadata)
    method: Any = server.calls.service(details)
    read, write = method.request_deserializer, method.response_serializer
    try:
        answer = await method.unary_unary(call.message if read is None else read(call.message), _Context(call))
    except _AbortedError as aborted:
        return aborted.answer
    return CallAnswer(answer if write is None else write(answer))


class _AbortedError(Exception):
    """The end of a call with a status."""

    def __init__(self, answer: CallAnswer) -> None:
        super().__init__(answer.details)
        self.answer = answer


class _Context:
    """As much of a call's context as the service asks for."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def time_remaining(self) -> float | None:
        return self._call.remaining

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._call.metadata

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Sequence[tuple[str, str]] = ()
    ) -> NoReturn:
        raise _AbortedError(CallAnswer(b"", code.name, details, tuple(trailing_metadata)))
