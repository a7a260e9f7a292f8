"""Calls of gRPC as observers see them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from narrowcast.serving.refusals import Refusal
from narrowcast.serving.watching.records import CLIENT_CLOSED, Observer, RequestRecord

__all__ = ["WatchedCalls"]


class WatchedCalls:
    """Tells observers how calls ended, and names them in the trailing metadata ``x-request-id``.

    Args:
        observers: Are told, in this order.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    async def run(
        self, target: str, request: Any, context: Any, answer: Callable[[RequestRecord], Awaitable[Any]]
    ) -> Any:
        """Return the answer to a request.

        Args:
            target: Full name of the call, ``SERVICE/METHOD``.
            request: The ``ModelInferRequest``.
            context: The call, or the stream that the request came on.
            answer: Answers it, and notes what it learns of it.

        Raises:
            Refusal: It gets no result.
        """
        headers = {str(name): str(value) for name, value in context.invocation_metadata() or ()}
        record = RequestRecord("grpc", target.rpartition("/")[2], target, headers)
        record.model, record.version = request.model_name, request.model_version
        record.read(request.id, 0)
        try:
            response = await answer(record)
        except Refusal as refusal:
            self._end(record, context, refusal.status, refusal.message)
            raise
        except asyncio.CancelledError:
            self._end(record, context, CLIENT_CLOSED, "the client went away")
            raise
        except Exception as error:
            self._end(record, context, 500, f"{type(error).__name__}: {error}")
            raise
        self._end(record, context, 200)
        return response

    def _end(self, record: RequestRecord, context: Any, status: int, reason: str = "") -> None:
        record.end(status, reason)
        context.set_trailing_metadata((("x-request-id", record.request_id),))
        for observer in self._observers:
            observer.ended(record)
