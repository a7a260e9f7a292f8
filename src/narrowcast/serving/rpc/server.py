"""The gRPC listener."""

from __future__ import annotations

import grpc.aio

from narrowcast.errors import OutputError
from narrowcast.serving.limits import Limits
from narrowcast.serving.rpc.health import HealthService, Probe
from narrowcast.serving.rpc.service import InferenceService

__all__ = ["GrpcServer"]


class GrpcServer:
    """Serves inference and health on one address.

    Args:
        service: Answers inference calls.
        probe: Knows what can answer.
        limits: Bounds; a message may be as large as a decompressed HTTP body.
    """

    def __init__(self, service: InferenceService, probe: Probe, limits: Limits) -> None:
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", limits.decompressed_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
                ("grpc.max_concurrent_streams", limits.connections),
            ]
        )
        self._server.add_generic_rpc_handlers((service.handler(), HealthService(probe).handler()))

    async def listen(self, host: str, port: int) -> int:
        """Begin to accept calls, and return the port.

        Raises:
            OutputError: The address cannot be had.
        """
        try:
            bound = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise OutputError(
                f"{host}:{port} cannot be listened on: it is taken, or no address of this machine",
                next_step="name another port for gRPC",
            ) from error
        await self._server.start()
        return bound

    async def close(self) -> None:
        """Take no more calls, and cancel those that nobody answered."""
        await self._server.stop(grace=0.5)
