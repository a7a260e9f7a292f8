"""``narrowcast serve --engine ray``: the deployments, and the program that puts them on a cluster and takes them down."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc

from narrowcast.errors import ConfigError, OutputError, RuntimeFailedError, RuntimeMissingError
from narrowcast.serving.asgi import HandlerApplication
from narrowcast.serving.http.message import Request, Response
from narrowcast.serving.limits import Limits
from narrowcast.serving.ray.ingress import Ingress, RoutedModel
from narrowcast.serving.ray.plan import PlannedModel, PlannedVersion, Scale
from narrowcast.serving.ray.replica import ModelReplica
from narrowcast.serving.ray.rpc import METHODS, RawMessage
from narrowcast.serving.ray.wire import Call, CallAnswer, Remote
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.server import ServerOptions

try:
    import ray
    from ray import serve
    from ray.exceptions import RayActorError, RayError
    from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
    from ray.serve.grpc_util import RayServegRPCContext
    from ray.serve.handle import DeploymentHandle
except ImportError as error:
    raise RuntimeMissingError(
        f"the engine ray needs {error.name}, which is not installed", next_step="pip install 'narrowcast[ray]'"
    ) from error

__all__ = ["APPLICATION", "application", "run"]

_log = logging.getLogger(__name__)
#: What the application is called in the cluster.
APPLICATION = "narrowcast"
#: How long replicas have to answer a question that goes to all of them.
_ALL_SECONDS = 5.0
#: How long a cluster has to take a connection.
_REACH_SECONDS = 5.0
_START = "start one with ray start --head, or leave --ray-address out"


class _Replica:
    """What Ray runs in each process of a model version."""

    async def __init__(self, planned: PlannedVersion) -> None:  # Ray awaits it, so that the model loads in its loop
        self._replica = await ModelReplica.started(planned)

    async def ask(self, request: Request) -> Response:
        return await self._replica.ask(request)

    async def call(self, call: Call) -> CallAnswer:
        return await self._replica.call(call)

    def check_health(self) -> None:
        if not self._replica.ready:
            raise RuntimeError("the model cannot run requests")

    async def __del__(self) -> None:
        await self._replica.stop()


class _HandleRemote(Remote):
    """The replicas of a model version, reached by Ray's handle."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def ask(self, request: Request) -> Response:
        return await _reached(self._handle.ask.remote(request))

    async def call(self, call: Call) -> CallAnswer:
        return await _reached(self._handle.call.remote(call))

    async def ask_all(self, request: Request) -> list[Response]:
        try:
            asked = self._handle.broadcast("ask", request)
            found = await asked.results_async(timeout_s=_ALL_SECONDS, return_exceptions=True)
        except (TimeoutError, RayError):
            return []
        return [answer for answer in found if isinstance(answer, Response)]


async def _reached(response: Any) -> Any:
    """Return what a replica answers; cancelling goes on to it.

    Raises:
        Refusal: No replica can be reached, or it died (503).
    """
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except RayActorError as error:
        raise Refusal(503, "the replica that ran the request has died; it may be sent again", retry_after=1) from error
    except (BackPressureError, DeploymentUnavailableError) as error:
        raise Refusal(503, "no replica of the model can take the request", retry_after=1) from error


class _Ingress:
    """What Ray runs behind its proxies: REST comes as ASGI, calls come to methods of their names."""

    def __init__(
        self, models: Sequence[PlannedModel], handles: dict[str, DeploymentHandle[Any]], limits: Limits
    ) -> None:
        self._limits = limits
        self._routes = {
            model.name: RoutedModel(
                model.traffic,
                {version.version: _HandleRemote(handles[version.deployment]) for version in model.versions},
            )
            for model in models
        }
        self._ingress: Ingress | None = None

    def __serve_build_asgi_app__(self) -> HandlerApplication:
        return HandlerApplication(lambda: self._here().handle, self._limits)

    def _here(self) -> Ingress:
        """Return the ingress, made in the loop that answers requests."""
        if self._ingress is None:
            self._ingress = Ingress(self._routes, self._limits)
        return self._ingress

    async def answer(self, method: str, message: bytes, context: RayServegRPCContext) -> RawMessage:
        answer = await self._here().call(Call(method, message))
        if answer.code:
            context.set_code(grpc.StatusCode[answer.code])
            context.set_details(answer.details)
            context.set_trailing_metadata(list(answer.trailing))
            raise RuntimeError(answer.details)  # Ray sends the status of the context
        return RawMessage(answer.message)


def _method(name: str) -> Callable[..., Awaitable[RawMessage]]:
    async def method(self: _Ingress, request: bytes, grpc_context: RayServegRPCContext) -> RawMessage:
        return await self.answer(name, request, grpc_context)

    method.__name__ = name
    return method


for _name in METHODS:
    setattr(_Ingress, _name, _method(_name))


def application(models: Sequence[PlannedModel], scale: Scale, options: ServerOptions) -> Any:
    """Return the application that Ray Serve runs: a deployment for each model version, and the ingress."""
    handles = {version.deployment: _bound(version, scale) for model in models for version in model.versions}
    ingress: Any = serve.deployment(serve.ingress()(_Ingress))
    nodes = sum(node["Alive"] for node in ray.nodes())
    settings = ingress.options(
        name="ingress",
        num_replicas=nodes,
        max_ongoing_requests=options.limits.connections,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=options.grace,
    )
    return settings.bind(tuple(models), handles, options.limits)


def _bound(version: PlannedVersion, scale: Scale) -> Any:
    replicas: dict[str, Any] = {"num_replicas": version.fewest}
    if scale.most is not None:
        if scale.most < version.fewest:
            raise ConfigError(
                f"model {version.name!r} has {version.fewest} workers at least and {scale.most} at most",
                next_step="raise --max-workers",
            )
        replicas = {
            "autoscaling_config": {
                "min_replicas": version.fewest,
                "max_replicas": scale.most,
                # On average one batch runs and one is ready to follow it.
                "target_ongoing_requests": 2 * version.hosting.settings.batching.largest,
            }
        }
    deployment: Any = serve.deployment(_Replica)
    settings = deployment.options(
        name=version.deployment,
        max_ongoing_requests=version.ongoing,
        ray_actor_options={"num_cpus": version.threads},
        graceful_shutdown_timeout_s=version.grace,
        **replicas,
    )
    return settings.bind(version)


def run(
    models: Sequence[PlannedModel],
    scale: Scale,
    options: ServerOptions,
    listening: Callable[[dict[str, int]], None],
) -> None:
    """Serve on a cluster until SIGTERM or SIGINT, then take the application down.

    Args:
        models: What to serve.
        scale: How many replicas there are, and on which cluster.
        options: Where to listen, and what is allowed.
        listening: Is told the ports when all models are loaded.

    Raises:
        OutputError: A port cannot be had.
        RuntimeFailedError: There is no such cluster, or a model cannot be loaded there.
    """
    with _Cluster(scale, options), _signals() as ended:
        try:
            serve.run(application(models, scale, options), name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            raise RuntimeFailedError(
                f"Ray cannot deploy the models: {_brief(error)}", next_step="the logs of Ray say more"
            ) from error
        ports = {"http": options.port, "grpc": options.grpc_port}
        listening({name: port for name, port in ports.items() if port is not None})
        ended.wait()
        serve.delete(APPLICATION)


@contextmanager
def _signals() -> Generator[threading.Event]:
    """Yield an event that SIGTERM and SIGINT set instead of ending the program."""
    ended = threading.Event()
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Cluster:
    """A connection to a cluster with Ray Serve on it; a cluster that was started here ends here."""

    def __init__(self, scale: Scale, options: ServerOptions) -> None:
        self._address = scale.address
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
                f"no Ray cluster can be had at {self._address or 'this machine'}: {_brief(error)}", next_step=_START
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
                f"Ray cannot listen on {options.host}:{options.port}: {_brief(error)}", next_step="name another port"
            ) from error

    def _check_reachable(self) -> None:
        """Find out at once what Ray would find out after minutes: nobody at the address, or somebody on a port.

        Raises:
            RuntimeFailedError: Nobody answers at the address.
            OutputError: A port is taken.
        """
        if self._address is None:
            for port in (self._options.port, self._options.grpc_port):
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


def _brief(error: Exception) -> str:
    """Return the last line of what Ray says, which stands below the tracebacks of other processes."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else type(error).__name__
