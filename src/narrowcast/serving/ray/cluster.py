"""A connection to a Ray cluster with Ray Serve on it."""

from __future__ import annotations

import logging
import os
import re
import socket

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions

from narrowcast.errors import ConfigError, OutputError, RuntimeFailedError
from narrowcast.serving.server import ServerOptions

__all__ = ["Cluster", "brief"]

#: How long a cluster has to take a connection.
_REACH_SECONDS = 5.0
#: What Ray's proxy for gRPC learns of the service by.
_SERVICE = "narrowcast.serving.ray.rpc.add_service"
#: The line of a traceback that says what was raised.
_RAISED = re.compile(r"(?:\w+\.)*[A-Z]\w*(?:Error|Exception)\b.*: ")
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
                    port=options.grpc_port or 0, grpc_servicer_functions=[_SERVICE] if options.grpc_port else []
                ),
            )
        except Exception as error:  # what comes from the proxies has many types
            self.__exit__()
            raise OutputError(
                f"Ray cannot listen on {options.host}:{options.port}: {brief(error)}", next_step="name another port"
            ) from error
        try:
            self._check_listening()
        except OutputError:
            self.__exit__()
            raise

    def _check_listening(self) -> None:
        """Make sure that clients are listened to where they are told to be; what runs already goes on as it was started.

        Raises:
            OutputError: They are listened to elsewhere.
        """
        controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        http, grpc = ray.get([controller.get_http_config.remote(), controller.get_grpc_config.remote()])
        options = self._options
        runs = {
            "HTTP": (http.host, http.port),
            "gRPC": (options.host, grpc.port * (_SERVICE in grpc.grpc_servicer_functions)),
        }
        for name, port in (("HTTP", options.port), ("gRPC", options.grpc_port)):
            host, other = runs[name]
            if port is not None and (host, other) != (options.host, port):
                raise OutputError(
                    f"Ray Serve runs on the cluster already and listens for {name} "
                    + (f"on {host}:{other}" if other else "to nobody"),
                    next_step="name the same addresses, or end it first (serve shutdown)",
                )

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
    """Return the first line of the error that Ray tells of last, which stands below the tracebacks of other processes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines if _RAISED.match(line)]
    found = (raised or lines or [type(error).__name__])[-1]
    return found.removeprefix("narrowcast.errors.")[:300]
