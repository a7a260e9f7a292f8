"""How Ray's gRPC proxy learns of the service; it is imported there by name.

Messages stay bytes on their way through Ray: the messages here are of a pool of their own, whose classes nobody else can
import, and reading them twice would cost time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from narrowcast.serving.rpc.service import SERVICE

__all__ = ["CHECK", "METHODS", "STREAM", "RawMessage", "add_service"]

#: Calls of the service with one request and one answer.
METHODS = (
    *("ServerLive", "ServerReady", "ServerMetadata"),
    *("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics", "ModelInfer"),
    *("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"),
    *("SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister"),
)
#: The call with streams both ways.
STREAM = "ModelStreamInfer"
#: The call of the health checking protocol; watching takes a stream for each client, which replicas may not outlive.
CHECK = "Check"
#: Metadata with the seconds until a call's deadline, between Ray's proxy and the ingress.
_REMAINING = "narrowcast-remaining-seconds"


@dataclass(frozen=True, slots=True)
class RawMessage:
    """A message that was serialised before, as Ray takes it."""

    data: bytes

    def SerializeToString(self) -> bytes:  # noqa: N802  the name that messages have
        """Return it."""
        return self.data


def add_service(servicer: Any, server: Any) -> None:
    """Register the service's methods; Ray puts its own in their place, which call the ingress by the same names."""
    server.add_generic_rpc_handlers((_Handlers(SERVICE, METHODS, STREAM),))
    server.add_generic_rpc_handlers((_Handlers("grpc.health.v1.Health", (CHECK,)),))


def split_deadline(metadata: tuple[tuple[str, str], ...]) -> tuple[tuple[tuple[str, str], ...], float | None]:
    """Return the metadata that the client sent, and how many seconds were left when the call came to the proxy."""
    return _theirs(metadata), next((float(value) for key, value in metadata if key == _REMAINING), None)


def _theirs(metadata: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((key, value) for key, value in metadata if key != _REMAINING)


class _Handlers(grpc.ServiceRpcHandler):
    """A service's methods as Ray makes them, which are told of the deadline by one more entry of the metadata.

    Ray reads and replaces the handlers in the attribute that the handlers of generated code have.

    Args:
        service: The service's full name.
        methods: Those with one request and one answer.
        streams: Those with streams both ways.
    """

    def __init__(self, service: str, methods: Sequence[str], *streams: str) -> None:
        self._service = service
        handlers: dict[str, Any] = {name: grpc.unary_unary_rpc_method_handler(_nobody) for name in methods}
        handlers |= {name: grpc.stream_stream_rpc_method_handler(_nobody) for name in streams}
        self._method_handlers = {f"/{service}/{name}": handler for name, handler in handlers.items()}

    def service_name(self) -> str:
        return self._service

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = self._method_handlers.get(handler_call_details.method)
        if handler is None or handler.request_streaming:
            return handler
        answer = handler.unary_unary

        async def timed(request: Any, context: Any) -> Any:
            return await answer(request, _TimedContext(context))

        return handler._replace(unary_unary=timed)


class _TimedContext:
    """A call's context, whose deadline is among the metadata: all that Ray sends on of it."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        sent = _theirs(self._context.invocation_metadata())
        remaining = self._context.time_remaining()
        return sent if remaining is None else (*sent, (_REMAINING, str(remaining)))


def _nobody(request: Any, context: Any) -> Any:
    raise NotImplementedError("Ray answers in its place")
