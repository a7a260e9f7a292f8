"""``narrowcast serve --engine ray``: what runs on the cluster, and the program that puts it there and takes it down."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
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

from narrowcast.errors import NarrowcastError, OutputError, RuntimeFailedError
from narrowcast.serving.asgi import HandlerApplication
from narrowcast.serving.hosting import Hosting
from narrowcast.serving.http.message import Request, Response
from narrowcast.serving.http.server import HttpServer
from narrowcast.serving.limits import Limits
from narrowcast.serving.ray.cluster import Cluster, brief
from narrowcast.serving.ray.fleet import FINISH_SECONDS, RayFleet
from narrowcast.serving.ray.handles import APPLICATION, KEEPER, ActorKeeping
from narrowcast.serving.ray.ingress import Ingress
from narrowcast.serving.ray.keeper import Keeper
from narrowcast.serving.ray.metrics import ClusterMetrics
from narrowcast.serving.ray.plan import Scale
from narrowcast.serving.ray.rpc import CHECK, METHODS, STREAM, RawMessage, split_deadline
from narrowcast.serving.ray.wire import Call, CallAnswer, Refused, Report, Table
from narrowcast.serving.server import ServerOptions

__all__ = ["run"]

_STEP_SECONDS = 0.2


# the repository -------------------------------------------------------------------------------------------------------


class _Keeper:
    """What Ray runs on the machine of the program: the only one that changes what is served."""

    def __init__(self, places: Sequence[Path], hosting: Hosting, options: ServerOptions, scale: Scale) -> None:
        self._given = (places, hosting, options, scale)
        self._options = options
        self._made: Keeper | None = None
        self._starting: asyncio.Task[Any] | None = None

    def _here(self) -> Keeper:
        """Return the keeper, made in the loop that answers."""
        if self._made is None:
            places, hosting, options, scale = self._given
            self._made = Keeper(places, hosting, options, RayFleet(scale, options.load_timeout))
        return self._made

    async def listen(self) -> None:
        options = self._options
        if options.metrics_port is None:
            return
        self._metrics = HttpServer(ClusterMetrics(self._here()).handle, options.limits)
        try:
            await self._metrics.listen(options.host, options.metrics_port)
        except OSError as error:
            raise OutputError(
                f"{options.host}:{options.metrics_port} cannot be listened on: {error.strerror or error}",
                next_step="name another port with --metrics-port",
            ) from error

    async def start(self) -> dict[str, str]:
        self._starting = asyncio.current_task()
        return await self._here().start()

    async def sweep(self) -> None:
        await self._here().sweep()

    async def stop(self) -> None:
        if self._starting is not None:
            self._starting.cancel()  # which does nothing where it has started
            await asyncio.wait([self._starting])
        await self._here().stop()

    async def ask(self, request: Request) -> Response | Refused:
        return await self._here().ask(request)

    async def call(self, call: Call) -> CallAnswer | Refused:
        return await self._here().call(call)

    async def wake(self, name: str, version: str) -> Table | Refused:
        return await self._here().wake(name, version)

    async def follow(self, who: str, applied: int, settled: int) -> Table | None:
        return await self._here().follow(who, applied, settled)

    async def farewell(self, name: str, version: int, report: Report) -> None:
        self._here().farewell(name, version, report)


# clients --------------------------------------------------------------------------------------------------------------


class _Ingress:
    """What Ray runs behind its proxies: REST comes as ASGI, calls come to methods of their names."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._ingress: Ingress | None = None

    def __serve_build_asgi_app__(self) -> HandlerApplication:
        return HandlerApplication(lambda: self._here().handle, self._limits)

    def _here(self) -> Ingress:
        """Return the ingress, made in the loop that answers requests."""
        if self._ingress is None:
            self._ingress = Ingress(ActorKeeping(), self._limits)
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


for _name in (*METHODS, CHECK):
    setattr(_Ingress, _name, _method(_name))
setattr(_Ingress, STREAM, _stream)


# the program ----------------------------------------------------------------------------------------------------------


def run(
    places: Sequence[Path],
    hosting: Hosting,
    scale: Scale,
    options: ServerOptions,
    listening: Callable[[dict[str, int], dict[str, str]], None],
) -> None:
    """Serve on a cluster until SIGTERM or SIGINT, then take everything down that was put there.

    Args:
        places: Artifacts and folders of models, at the same path on every machine.
        hosting: How models are run where their own files say nothing.
        scale: How many replicas there are, and on which cluster.
        options: Where to listen, and what is allowed.
        listening: Is told the ports when all models are loaded, and of those that cannot be loaded why.

    Raises:
        OutputError: A port cannot be had.
        RuntimeFailedError: There is no such cluster, or no model can be loaded there.
    """
    ports = {"http": options.port, "grpc": options.grpc_port, "metrics": options.metrics_port}
    with Cluster(scale.address, options), _signals() as ended, contextlib.suppress(_EndedError):
        keeper = _placed([place.absolute() for place in places], hosting, options, scale)
        try:
            _result(keeper.listen.remote(), ended)  # before anything of what a killed program left is touched
            try:
                failed = _result(keeper.start.remote(), ended)
                _open(options)
                _result(keeper.sweep.remote(), ended)
                listening({name: port for name, port in ports.items() if port is not None}, failed)
                ended.wait()
            finally:
                _take_down(keeper)
        finally:
            ray.kill(keeper)


def _placed(places: list[Path], hosting: Hosting, options: ServerOptions, scale: Scale) -> Any:
    """Return the keeper, on this machine: what it remembers is written beside the models that were named here."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(_Keeper).options(
        name=KEEPER,
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


def _take_down(keeper: Any) -> None:
    """Let clients reach nothing any more, then end the models: those of the keeper, and what a killed program left."""
    if APPLICATION in serve.status().applications:
        serve.delete(APPLICATION)
    with contextlib.suppress(RayError):
        ray.get(keeper.stop.remote())
    for key in serve.status().applications:
        if key.startswith(f"{APPLICATION}-"):
            serve.delete(key)


class _EndedError(Exception):
    """The program is to end before something was done."""


def _result(reference: Any, ended: threading.Event) -> Any:
    """Return what comes of something.

    Raises:
        NarrowcastError: It failed.
        RuntimeFailedError: Ray failed.
        _EndedError: The program is to end.
    """
    while not ended.is_set():
        ready, _ = ray.wait([reference], timeout=_STEP_SECONDS)
        if not ready:
            continue
        try:
            return ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, NarrowcastError):
                raise error.cause from None
            raise _undeployed(error) from error
        except RayError as error:
            raise _undeployed(error) from error
    raise _EndedError


def _open(options: ServerOptions) -> None:
    """Deploy what clients reach, a replica for each machine; those of a killed program are replaced one by one."""
    ingress: Any = serve.deployment(serve.ingress()(_Ingress))
    settings = ingress.options(
        name="ingress",
        num_replicas=sum(node["Alive"] for node in ray.nodes()),
        max_ongoing_requests=options.limits.connections,
        max_queued_requests=options.limits.connections,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=options.grace,
        graceful_shutdown_wait_loop_s=FINISH_SECONDS,
        max_surge_percent=100,
    )
    try:
        serve.run(settings.bind(options.limits), name=APPLICATION, route_prefix="/")
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
