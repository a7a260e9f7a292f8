"""``grpc.health.v1.Health``: whether the server, or one model, can answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from narrowcast.oip.messages import HEALTH

__all__ = ["HealthService", "Probe"]

#: From the name of a service (empty for the server, else a model's) to whether it can answer; None where it is unknown.
Probe = Callable[[str], bool | None]

_WATCH_SECONDS = 0.5
_STATUS = {True: "SERVING", False: "NOT_SERVING", None: "SERVICE_UNKNOWN"}


class HealthService:
    """Answers health checks.

    Args:
        probe: Knows.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = probe

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the service as a server takes it."""
        request, response = HEALTH["HealthCheckRequest"], HEALTH["HealthCheckResponse"]
        return grpc.method_handlers_generic_handler(
            "grpc.health.v1.Health",
            {
                "Check": grpc.unary_unary_rpc_method_handler(
                    self._check, request.FromString, response.SerializeToString
                ),
                "Watch": grpc.unary_stream_rpc_method_handler(
                    self._watch, request.FromString, response.SerializeToString
                ),
            },
        )

    async def _check(self, request: Any, context: Any) -> Any:
        known = self._probe(request.service)
        if known is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"service {request.service!r} is unknown")
        return HEALTH["HealthCheckResponse"](status=_STATUS[known])

    async def _watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        last = ""
        while True:
            status = _STATUS[self._probe(request.service)]
            if status != last:
                last = status
                yield HEALTH["HealthCheckResponse"](status=status)
            await asyncio.sleep(_WATCH_SECONDS)
