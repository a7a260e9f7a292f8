"""How Ray's gRPC proxy learns of the service; it is imported there by name.

Messages stay bytes on their way through Ray: the messages here are of a pool of their own, whose classes nobody else can
import, and reading them twice would cost time.
"""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class RawMessage:
    """A message that was serialised before, as Ray takes it."""

    data: bytes

    def SerializeToString(self) -> bytes:  # noqa: N802  the name that messages have
        """Return it."""
        return self.data


def add_service(servicer: Any, server: Any) -> None:
    """Register the service's methods; Ray puts its own in their place, which call the ingress by the same names."""
    handlers: dict[str, Any] = {name: grpc.unary_unary_rpc_method_handler(_nobody) for name in METHODS}
    handlers[STREAM] = grpc.stream_stream_rpc_method_handler(_nobody)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def _nobody(request: Any, context: Any) -> Any:
    raise NotImplementedError("Ray answers in its place")
