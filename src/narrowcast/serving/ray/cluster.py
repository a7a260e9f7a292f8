"""A connection to a Ray cluster with Ray Serve on it."""

from __future__ import annotations

import logging
import os
import socket

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions

from narrowcast.errors import ConfigError, OutputError, RuntimeFailedError
from narrowcast.serving.server import ServerOptions

__all__ = ["Cluster", "brief"]

#: How long a cluster has to take a connection.
_REACH_SECONDS = 5.0
_START = "start one with ray start --head, or leave --ray-address out"


class Cluster:
    """A connection to a cluster, for a ``with`` statement; a cluster that is started here ends here.

    Args:
        address: Where it is, or None to start one on this machine.
        options: Where its proxies listen.
    """

    def __init__(self, address: str | None, options: ServerOptions) -> None:
        self._address = address
        self._options = options

    def __enter__(self) -> None:
        options = self._options
        self._check_reachable()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody without being asked for
        try:
            ray.init(
                address=self._address,
                log_to_driver=False,
                logging_level=logging.WARNING,
                include_dashboard=None if self._address else False,
            )
        except Exception as error:  # what Ray raises when a cluster cannot be started or joined has many types
            ray.shutdown()
            raise RuntimeFailedError(
                f"no Ray cluster can be had at {self._address or 'this machine'}: {brief(error)}", next_step=_START
            ) from error
        try:
            serve.start(
                proxy_location=ProxyLocation.EveryNode,
                http_options=HTTPOptions(host=options.host, port=options.port or 0),
                grpc_options=gRPCOptions(
                    port=options.grpc_port or 0,
                    grpc_servicer_functions=["narrowcast.serving.ray.rpc.add_service"] if options.grpc_port else [],
                ),
            )
        except Exception as error:  # what comes from the proxies has many types
            self.__exit__()
            raise OutputError(
                f"Ray cannot listen on {options.host}:{options.port}: {brief(error)}", next_step="name another port"
            ) from error

    def _check_reachable(self) -> None:
        """Find out at once what Ray would find out after minutes: nobody at the address, or somebody on a port.

        Raises:
            RuntimeFailedError: Nobody answers at the address.
            OutputError: A port is taken.
        """
        if self._address is None:
            for port in (self._options.port, self._options.grpc_port, self._options.metrics_port):
                _check_free(self._options.host, port)
            return
        host, separator, port = self._address.removeprefix("ray://").rpartition(":")
        if not separator:
            return  # auto, which Ray looks up
        if not port.isdecimal():
            raise ConfigError(f"Ray address {self._address!r} is none", allowed="HOST:PORT, or auto")
        try:
            socket.create_connection((host, int(port)), _REACH_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise RuntimeFailedError(f"no Ray cluster answers at {self._address}: {error}", next_step=_START) from error

    def __exit__(self, *_: object) -> None:
        if self._address is None:
            serve.shutdown()
        ray.shutdown()


def _check_free(host: str, port: int | None) -> None:
    if port is None:
        return
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise OutputError(
            f"{host}:{port} cannot be listened on: {error.strerror or error}", next_step="name another port"
        ) from error


def brief(error: Exception | str) -> str:
    """Return the last line of what Ray says, which stands below the tracebacks of other processes."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else type(error).__name__
