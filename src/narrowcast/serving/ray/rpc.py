"""How Ray's gRPC proxy learns of the service; it is imported there by name.

Messages stay bytes on their way through Ray: the messages here are of a pool of their own, whose classes nobody else can
import, and reading them twice would cost time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc

from narrowcast.serving.rpc.service import SERVICE

__all__ = ["METHODS", "STREAM", "RawMessage", "add_service"]

#: Calls with one request and one answer.
METHODS = (
    *("ServerLive", "ServerReady", "ServerMetadata"),
    *("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics", "ModelInfer"),
    *("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"),
    *("SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister"),
)
#: The call with streams both ways.
STREAM = "ModelStreamInfer"
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
    server.add_generic_rpc_handlers((_Handlers(),))


def split_deadline(metadata: tuple[tuple[str, str], ...]) -> tuple[tuple[tuple[str, str], ...], float | None]:
    """Return the metadata that the client sent, and how many seconds were left when the call came to the proxy."""
    return _theirs(metadata), next((float(value) for key, value in metadata if key == _REMAINING), None)


def _theirs(metadata: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((key, value) for key, value in metadata if key != _REMAINING)


class _Handlers(grpc.ServiceRpcHandler):
    """The service's methods as Ray makes them, which are told of the deadline by one more entry of the metadata.

    Ray reads and replaces the handlers in the attribute that the handlers of generated code have.
    """

    def __init__(self) -> None:
        handlers: dict[str, Any] = {name: grpc.unary_unary_rpc_method_handler(_nobody) for name in METHODS}
        handlers[STREAM] = grpc.stream_stream_rpc_method_handler(_nobody)
        self._method_handlers = {f"/{SERVICE}/{name}": handler for name, handler in handlers.items()}

    def service_name(self) -> str:
        return SERVICE

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
