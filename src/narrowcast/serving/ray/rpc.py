"""How Ray's gRPC proxy learns of the service; it is imported there by name.

Messages stay bytes on their way through Ray: the messages here are of a pool of their own, whose classes nobody else can
import, and reading them twice would cost time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc

from narrowcast.serving.rpc.service import SERVICE

__all__ = ["METHODS", "RawMessage", "add_service"]

#: Calls with one request and one answer.
METHODS = (
    *("ServerLive", "ServerReady", "ServerMetadata"),
    *("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics", "ModelInfer"),
    *("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"),
    *("SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister"),
)


@dataclass(frozen=True, slots=True)
class RawMessage:
    """A message that was serialised before, as Ray takes it."""

    data: bytes

    def SerializeToString(self) -> bytes:  # noqa: N802  the name that messages have
        """Return it."""
        return self.data


def add_service(servicer: Any, server: Any) -> None:
    """Register the service's methods; Ray puts its own in their place, which call the ingress by the same names."""
    handlers = {name: grpc.unary_unary_rpc_method_handler(_nobody) for name in METHODS}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def _nobody(request: bytes, context: Any) -> bytes:
    raise NotImplementedError("Ray answers in its place")
