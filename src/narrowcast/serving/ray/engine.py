"""``narrowcast serve --engine ray``: what runs on the cluster, and the program that puts it there and takes it down."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.grpc_util import RayServegRPCContext, gRPCInputStream
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from narrowcast.errors import ConfigError, NarrowcastError, OutputError, RuntimeFailedError
from narrowcast.serving.asgi import HandlerApplication
from narrowcast.serving.hosting import Hosting
from narrowcast.serving.http.message import Request, Response
from narrowcast.serving.http.server import HttpServer
from narrowcast.serving.limits import Limits
from narrowcast.serving.ray.cluster import Cluster, brief
from narrowcast.serving.ray.handles import ActorKeeping, HandleRemote
from narrowcast.serving.ray.ingress import Ingress
from narrowcast.serving.ray.keeper import Keeper
from narrowcast.serving.ray.metrics import ClusterMetrics
from narrowcast.serving.ray.plan import PlannedVersion, Scale
from narrowcast.serving.ray.replica import ModelReplica
from narrowcast.serving.ray.rpc import METHODS, STREAM, RawMessage, split_deadline
from narrowcast.serving.ray.wire import Call, CallAnswer, Refused, Remote, Report, Table
from narrowcast.serving.server import ServerOptions
from narrowcast.serving.signature import Signature

__all__ = ["APPLICATION", "run"]

_log = logging.getLogger(__name__)
#: What the application that clients reach is called in the cluster; those of model versions begin with it.
APPLICATION = "narrowcast"
_KEEPER = "keeper"
_STEP_SECONDS = 0.2
#: How often Ray asks a replica that ends whether it has finished.
_FINISH_SECONDS = 0.2


# model versions -------------------------------------------------------------------------------------------------------


class _Replica:
    """What Ray runs in each process of a model version."""

    async def __init__(
        self, planned: PlannedVersion, keeper: Any
    ) -> None:  # Ray awaits it: the model loads in its loop
        self._planned = planned
        self._keeper = keeper
        name = serve.get_replica_context().replica_id.unique_id
        self._replica = await ModelReplica.started(planned, name)

    async def ask(self, request: Request) -> Response:
        return await self._replica.ask(request)

    async def call(self, call: Call) -> CallAnswer:
        return await self._replica.call(call)

    async def signature(self) -> Signature:
        return self._replica.signature()

    async def report(self) -> Report:
        return self._replica.report()

    def check_health(self) -> None:
        if not self._replica.ready:
            raise RuntimeError("the model cannot run requests")

    async def __del__(self) -> None:
        await self._replica.stop()
        with contextlib.suppress(RayError):  # at the end of all, nobody wants to know any more
            await self._keeper.farewell.remote(self._planned.name, self._planned.version, self._replica.report())


class _RayFleet:
    """Puts model versions on the cluster, each as an application of Ray Serve, and takes them off it.

    Args:
        scale: How many replicas a version has.
        keeper: Is told what replicas have counted when they end.
    """

    def __init__(self, scale: Scale, keeper: Any) -> None:
        self._scale = scale
        self._keeper = keeper

    async def deploy(self, planned: PlannedVersion) -> Remote:
        key = f"{APPLICATION}-{planned.name}-{planned.version}-{uuid.uuid4().hex[:8]}"
        beginning = asyncio.ensure_future(asyncio.to_thread(self._begin, key, planned))
        try:
            handle = await asyncio.shield(beginning)
            async with asyncio.timeout(self._scale.patience):
                await self._running(key)
        except BaseException as error:
            await asyncio.wait([beginning])  # what is on its way there cannot be taken off yet
            await asyncio.shield(self._delete(key))
            if isinstance(error, TimeoutError):
                raise RuntimeFailedError(
                    f"the cluster has not started model {planned.name!r} version {planned.version} within "
                    f"{self._scale.patience:g} s",
                    next_step=f"see whether {planned.fewest} times {planned.threads} processors are free",
                ) from error
            raise
        return HandleRemote(key, handle)

    def _begin(self, key: str, planned: PlannedVersion) -> Any:
        target = serve.RunTarget(self._bound(planned), name=key, route_prefix=None)
        return serve.run_many([target], wait_for_applications_running=False)[0]

    def _bound(self, planned: PlannedVersion) -> Any:
        scale = self._scale
        replicas: dict[str, Any] = {"num_replicas": planned.fewest}
        if scale.most is not None:
            if scale.most < planned.fewest:
                raise ConfigError(
                    f"model {planned.name!r} has {planned.fewest} workers at least and {scale.most} at most",
                    next_step="raise --max-workers",
                )
            replicas = {
                "autoscaling_config": {
                    "min_replicas": planned.fewest,
                    "max_replicas": scale.most,
                    # On average one batch runs and one is ready to follow it.
                    "target_ongoing_requests": 2 * planned.hosting.settings.batching.largest,
                    "upscale_delay_s": scale.up_seconds,
                    "downscale_delay_s": scale.down_seconds,
                }
            }
        deployment: Any = serve.deployment(_Replica)
        settings = deployment.options(
            name=f"{planned.name}-{planned.version}",
            max_ongoing_requests=planned.ongoing,
            ray_actor_options={"num_cpus": planned.threads},
            graceful_shutdown_timeout_s=planned.grace,
            graceful_shutdown_wait_loop_s=_FINISH_SECONDS,
            **replicas,
        )
        return settings.bind(planned, self._keeper)

    async def _running(self, key: str) -> None:
        """Return when all replicas of an application run.

        Raises:
            RuntimeFailedError: They cannot be started.
        """
        while True:
            status = await asyncio.to_thread(serve.status)
            found = status.applications.get(key)
            if found is not None and found.status == "RUNNING":
                return
            if found is not None and found.status == "DEPLOY_FAILED":
                said = [item.message for item in found.deployments.values() if item.message] or [found.message]
                raise RuntimeFailedError(f"Ray cannot deploy the model: {brief(said[0])}")
            await asyncio.sleep(_STEP_SECONDS)

    async def remove(self, remote: Remote) -> None:
        await self._delete(remote.key)

    async def _delete(self, key: str) -> None:
        try:
            await asyncio.to_thread(serve.delete, key)
        except (RayError, TimeoutError) as error:
            _log.warning("%s does not end: %s", key, error)


# the repository -------------------------------------------------------------------------------------------------------


class _Keeper:
    """What Ray runs on the machine of the program: the only one that changes what is served."""

    def __init__(self, places: Sequence[Path], hosting: Hosting, options: ServerOptions, scale: Scale) -> None:
        self._given = (places, hosting, options, _RayFleet(scale, ray.get_runtime_context().current_actor))
        self._options = options
        self._starting: asyncio.Task[Any] | None = None

    async def start(self) -> None:
        self._starting = asyncio.current_task()
        self._keeper = Keeper(*self._given)
        await self._keeper.start()
        options = self._options
        if options.metrics_port is not None:
            self._metrics = HttpServer(ClusterMetrics(self._keeper).handle, options.limits)
            try:
                await self._metrics.listen(options.host, options.metrics_port)
            except OSError as error:
                raise OutputError(
                    f"{options.host}:{options.metrics_port} cannot be listened on: {error.strerror or error}",
                    next_step="name another port with --metrics-port",
                ) from error

    async def stop(self) -> None:
        if self._starting is not None:
            self._starting.cancel()  # which does nothing where it has started
            await asyncio.wait([self._starting])
        await self._keeper.stop()

    async def ask(self, request: Request) -> Response:
        return await self._keeper.ask(request)

    async def call(self, call: Call) -> CallAnswer:
        return await self._keeper.call(call)

    async def wake(self, name: str, version: str) -> Table | Refused:
        return await self._keeper.wake(name, version)

    async def follow(self, who: str, applied: int, settled: int) -> Table | None:
        return await self._keeper.follow(who, applied, settled)

    async def farewell(self, name: str, version: int, report: Report) -> None:
        self._keeper.farewell(name, version, report)


# clients --------------------------------------------------------------------------------------------------------------


class _Ingress:
    """What Ray runs behind its proxies: REST comes as ASGI, calls come to methods of their names."""

    def __init__(self, keeper: Any, limits: Limits) -> None:
        self._keeper = ActorKeeping(keeper)
        self._limits = limits
        self._ingress: Ingress | None = None

    def __serve_build_asgi_app__(self) -> HandlerApplication:
        return HandlerApplication(lambda: self._here().handle, self._limits)

    def _here(self) -> Ingress:
        """Return the ingress, made in the loop that answers requests."""
        if self._ingress is None:
            self._ingress = Ingress(self._keeper, self._limits)
        return self._ingress

    async def check_health(self) -> None:
        """Return when it knows what is served; Ray sends requests to a replica that was found healthy once."""
        await self._here().informed()

    async def answer(self, method: str, message: bytes, context: RayServegRPCContext) -> RawMessage:
        metadata, remaining = split_deadline(_metadata(context))
        answer = await self._here().call(Call(method, message, metadata, remaining))
        if answer.code:
            context.set_code(grpc.StatusCode[answer.code])
            context.set_details(answer.details)
            context.set_trailing_metadata(list(answer.trailing))
            raise RuntimeError(answer.details)  # Ray sends the status of the context
        return RawMessage(answer.message)

    async def answers(self, messages: AsyncIterator[bytes], context: RayServegRPCContext) -> AsyncIterator[RawMessage]:
        async for message in self._here().stream(messages, _metadata(context)):
            yield RawMessage(message)


def _metadata(context: RayServegRPCContext) -> tuple[tuple[str, str], ...]:
    return tuple((key, value) for key, value in context.invocation_metadata() if not key.endswith("-bin"))


def _method(name: str) -> Callable[..., Awaitable[RawMessage]]:
    async def method(self: _Ingress, request: bytes, grpc_context: RayServegRPCContext) -> RawMessage:
        return await self.answer(name, request, grpc_context)

    method.__name__ = name
    return method


async def _stream(
    self: _Ingress, messages: gRPCInputStream[bytes], grpc_context: RayServegRPCContext
) -> AsyncIterator[RawMessage]:
    async for answer in self.answers(messages, grpc_context):
        yield answer


for _name in METHODS:
    setattr(_Ingress, _name, _method(_name))
setattr(_Ingress, STREAM, _stream)


# the program ----------------------------------------------------------------------------------------------------------


def run(
    places: Sequence[Path],
    hosting: Hosting,
    scale: Scale,
    options: ServerOptions,
    listening: Callable[[dict[str, int]], None],
) -> None:
    """Serve on a cluster until SIGTERM or SIGINT, then take everything down that was put there.

    Args:
        places: Artifacts and folders of models, at the same path on every machine.
        hosting: How models are run where their own files say nothing.
        scale: How many replicas there are, and on which cluster.
        options: Where to listen, and what is allowed.
        listening: Is told the ports when all models are loaded.

    Raises:
        OutputError: A port cannot be had.
        RuntimeFailedError: There is no such cluster, or a model cannot be loaded there.
    """
    with Cluster(scale.address, options), _signals() as ended:
        keeper = _placed([place.absolute() for place in places], hosting, options, scale)
        if not _swept(ended):
            return
        try:
            if not _done(keeper.start.remote(), ended):
                return
            _open(keeper, options)
            ports = {"http": options.port, "grpc": options.grpc_port, "metrics": options.metrics_port}
            listening({name: port for name, port in ports.items() if port is not None})
            ended.wait()
            serve.delete(APPLICATION)
        finally:
            with contextlib.suppress(RayError):
                ray.get(keeper.stop.remote())
            ray.kill(keeper)


def _placed(places: list[Path], hosting: Hosting, options: ServerOptions, scale: Scale) -> Any:
    """Return the keeper, on this machine: what it remembers is written beside the models that were named here."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(_Keeper).options(
        name=_KEEPER,
        namespace=APPLICATION,
        num_cpus=0,
        max_concurrency=options.limits.connections,
        scheduling_strategy=here,
    )
    try:
        return actor.remote(places, hosting, options, scale)
    except ValueError as error:
        raise RuntimeFailedError(
            "the cluster serves a repository already", next_step="end the other narrowcast serve first"
        ) from error


def _swept(ended: threading.Event) -> bool:
    """Take down what a program left on the cluster that was killed; nobody changes it any more, and it takes up room.

    Returns:
        Whether that was done before the program is to end.
    """
    while not ended.is_set():
        left = [key for key in serve.status().applications if key == APPLICATION or key.startswith(f"{APPLICATION}-")]
        if not left:
            return True
        for key in left:
            serve.delete(key, _blocking=False)
        ended.wait(_STEP_SECONDS)
    return False


def _done(reference: Any, ended: threading.Event) -> bool:
    """Return whether something was done before the program is to end.

    Raises:
        NarrowcastError: It failed.
        RuntimeFailedError: Ray failed.
    """
    while not ended.is_set():
        ready, _ = ray.wait([reference], timeout=_STEP_SECONDS)
        if not ready:
            continue
        try:
            ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, NarrowcastError):
                raise error.cause from None
            raise _undeployed(error) from error
        except RayError as error:
            raise _undeployed(error) from error
        return True
    return False


def _open(keeper: Any, options: ServerOptions) -> None:
    """Deploy what clients reach, a replica for each machine."""
    ingress: Any = serve.deployment(serve.ingress()(_Ingress))
    settings = ingress.options(
        name="ingress",
        num_replicas=sum(node["Alive"] for node in ray.nodes()),
        max_ongoing_requests=options.limits.connections,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=options.grace,
        graceful_shutdown_wait_loop_s=_FINISH_SECONDS,
    )
    try:
        serve.run(settings.bind(keeper, options.limits), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise _undeployed(error) from error


def _undeployed(error: Exception) -> RuntimeFailedError:
    return RuntimeFailedError(f"Ray cannot deploy the models: {brief(error)}", next_step="the logs of Ray say more")


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
