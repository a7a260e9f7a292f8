"""The protocol over HTTP: which target is what, and who may ask for it."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast
from urllib.parse import unquote_to_bytes

import orjson

from narrowcast.errors import NarrowcastError
from narrowcast.serving.administration import check_administrator, check_load_parameters
from narrowcast.serving.catalogue import Catalogue, Change, ServedVersion
from narrowcast.serving.hosting import ColdError
from narrowcast.serving.http.message import Request, Response, json_response
from narrowcast.serving.limits import Limits
from narrowcast.serving.protocol import documents
from narrowcast.serving.protocol.openapi import openapi
from narrowcast.serving.protocol.requests import InferRequest, read_infer
from narrowcast.serving.protocol.responses import infer_response
from narrowcast.serving.refusals import Refusal, change_refusal, model_refusal
from narrowcast.serving.scheduling.queue import Job
from narrowcast.serving.shared_memory import SharedMemory

__all__ = ["RestApi"]

#: Says where the JSON of a request ends and its binary data begin.
_HEADER_LENGTH = b"inference-header-content-length"
_MODEL = r"/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?"
_REPOSITORY = r"/v2/repository/models/(?P<name>[^/]+)"
_REGION = r"/v2/systemsharedmemory(?:/region/(?P<region>[^/]+))?"
#: Method, pattern and the handler's name, in the order in which they are tried.
_ROUTES: tuple[tuple[str, re.Pattern[str], str], ...] = tuple(
    (method, re.compile(pattern), endpoint)
    for method, pattern, endpoint in (
        ("POST", _MODEL + "/infer", "infer"),
        ("GET", "/v2/?", "server"),
        ("GET", "/v2/health/live", "live"),
        ("GET", "/v2/health/ready", "ready"),
        ("GET", "/v2/models/stats", "statistics"),
        ("GET", _MODEL, "metadata"),
        ("GET", _MODEL + "/ready", "model_ready"),
        ("GET", _MODEL + "/config", "config"),
        ("GET", _MODEL + "/stats", "statistics"),
        ("POST", "/v2/repository/index", "index"),
        ("POST", _REPOSITORY + "/load", "load"),
        ("POST", _REPOSITORY + "/unload", "unload"),
        ("POST", _REPOSITORY + "/versions/(?P<version>[^/]+)/promote", "promote"),
        ("POST", _REPOSITORY + "/rollback", "rollback"),
        ("GET", _REPOSITORY + "/traffic", "traffic"),
        ("POST", _REPOSITORY + "/traffic", "split"),
        ("GET", "/openapi.json", "openapi"),
        ("GET", _REGION + "/status", "shared_status"),
        ("POST", _REGION + "/register", "shared_register"),
        ("POST", _REGION + "/unregister", "shared_unregister"),
    )
)


@dataclass(frozen=True)
class _Route:
    """What a target means: handler by method, and the names in it; and when the request came, if that is a while ago."""

    endpoints: dict[bytes, str]
    name: str
    version: str
    arrived: int | None = None


_Endpoint = Callable[[Request, _Route], Response | asyncio.Future[Response]]


@lru_cache(4096)
def _route(target: bytes) -> _Route | None:
    """Return what a target means, or None where it means nothing."""
    path = target.partition(b"?")[0].decode("latin-1")
    endpoints: dict[bytes, str] = {}
    names: dict[str, str] = {}
    for method, pattern, endpoint in _ROUTES:
        match = pattern.fullmatch(path)
        if match and method.encode() not in endpoints:
            endpoints[method.encode()] = endpoint
            names |= {key: _unquoted(value) for key, value in match.groupdict(default="").items()}
    if not endpoints:
        return None
    if b"GET" in endpoints:
        endpoints[b"HEAD"] = endpoints[b"GET"]
    return _Route(endpoints, names.get("name", "") or names.get("region", ""), names.get("version", ""))


def _unquoted(text: str) -> str:
    return unquote_to_bytes(text).decode("utf-8", "replace")


class RestApi:
    """Answers requests from the models of a catalogue.

    Args:
        catalogue: The models.
        limits: Bounds on tensors.
        shared: Regions of shared memory.
        token: What an administrator must send as ``Authorization: Bearer TOKEN``; None turns administration off.
    """

    def __init__(self, catalogue: Catalogue, limits: Limits, shared: SharedMemory, token: str | None = None) -> None:
        self.draining = False
        self._catalogue = catalogue
        self._limits = limits
        self._shared = shared
        self._token = token
        self._loop = asyncio.get_running_loop()
        self._endpoints: dict[str, _Endpoint] = {
            "infer": self._infer,
            "server": lambda request, route: json_response(documents.server_metadata()),
            "live": lambda request, route: json_response({"live": True}),
            "ready": self._ready,
            "metadata": self._metadata,
            "model_ready": self._model_ready,
            "config": self._config,
            "statistics": self._statistics,
            "index": self._index,
            "load": self._load,
            "unload": self._unload,
            "promote": self._promote,
            "rollback": self._rollback,
            "traffic": self._traffic,
            "split": self._split,
            "openapi": lambda request, route: json_response(openapi()),
            "shared_status": self._shared_status,
            "shared_register": self._shared_register,
            "shared_unregister": self._shared_unregister,
        }

    def handle(self, request: Request) -> Response | asyncio.Future[Response]:
        """Answer a request, at once or later.

        Raises:
            Refusal: It gets no result.
        """
        route = _route(request.target)
        if route is None:
            shown = request.target[:200].decode("latin-1")
            raise Refusal(404, f"{shown} is no target of the Open Inference Protocol")
        endpoint = route.endpoints.get(request.method)
        if endpoint is None:
            allowed = ", ".join(method.decode() for method in route.endpoints)
            response = json_response({"error": f"method {request.method.decode()} is not allowed; {allowed} is"}, 405)
            response.headers = ((b"Allow", allowed.encode()),)
            return response
        try:
            return self._endpoints[endpoint](request, route)
        except ColdError as cold:
            return asyncio.ensure_future(self._when_loaded(self._endpoints[endpoint], request, route, cold))

    async def _when_loaded(self, endpoint: _Endpoint, request: Request, route: _Route, cold: ColdError) -> Response:
        """Answer a request of a version that has to be loaded first; the wait counts as time in the queue."""
        arrived = time.monotonic_ns()
        served = await self._catalogue.get(route.name, str(cold.version))
        answer = endpoint(request, replace(route, version=served.version, arrived=arrived))
        return answer if isinstance(answer, Response) else await answer

    # inference --------------------------------------------------------------------------------------------------------

    def _infer(self, request: Request, route: _Route) -> Response | asyncio.Future[Response]:
        if self.draining and route.arrived is None:  # what came before the end, and waited for its model, is answered
            raise Refusal(503, "the server is ending; send the request to another", retry_after=1, close=True)
        served = self._catalogue.find(route.name, route.version)
        scheduler = served.scheduler
        record = request.record
        if record is not None:
            record.found(served)
        header_length = _header_length(request) if _HEADER_LENGTH in request.headers else None
        infer = read_infer(request.body, header_length, scheduler.signature, self._limits, self._shared)
        if record is not None:
            record.read(infer.id, infer.rows)
        job = scheduler.submit(
            infer.inputs, infer.rows, priority=infer.priority, timeout=infer.timeout, arrived=route.arrived
        )
        if record is not None:
            record.job = job
        return self._answer(served, infer, job) if job.finished else self._awaited(served, infer, job)

    def _awaited(self, served: ServedVersion, infer: InferRequest, job: Job) -> asyncio.Future[Response]:
        """Return the answer to come; who cancels it takes the job out of the queue."""
        future: asyncio.Future[Response] = self._loop.create_future()

        def settle(job: Job) -> None:
            if not future.done():
                try:
                    future.set_result(self._answer(served, infer, job))
                except Exception as error:  # whatever it is: nobody else would tell the client
                    future.set_exception(error)

        def cancelled(future: asyncio.Future[Response]) -> None:
            if future.cancelled():
                served.scheduler.cancel(job)

        job.done = settle
        future.add_done_callback(cancelled)
        return future

    def _answer(self, served: ServedVersion, infer: InferRequest, job: Job) -> Response:
        if job.outputs is None:
            raise model_refusal(job.error or RuntimeError("the job ended without an answer"))
        return infer_response(served.name, served.version, infer, job.outputs, self._shared)

    # reading ----------------------------------------------------------------------------------------------------------

    def _ready(self, request: Request, route: _Route) -> Response:
        if self.draining:
            raise Refusal(503, "the server is ending")
        if not self._catalogue.ready:
            raise Refusal(503, "a model has no worker that is alive", retry_after=1)
        return json_response({"ready": True})

    def _metadata(self, request: Request, route: _Route) -> Response:
        served = self._catalogue.find(route.name, route.version)
        return json_response(documents.model_metadata(served, self._catalogue.versions(served.name)))

    def _model_ready(self, request: Request, route: _Route) -> Response:
        if self.draining or not self._catalogue.can_answer(route.name, route.version):
            raise Refusal(503, f"model {route.name!r} cannot run requests now", retry_after=1)
        return json_response({"name": route.name, "ready": True})

    def _config(self, request: Request, route: _Route) -> Response:
        served = self._catalogue.find(route.name, route.version)
        return json_response(documents.model_config(served))

    def _statistics(self, request: Request, route: _Route) -> Response:
        return json_response(documents.model_statistics(self._catalogue.served(route.name, route.version)))

    def _index(self, request: Request, route: _Route) -> Response:
        ready = _json_object(request).get("ready", False)
        if not isinstance(ready, bool):
            raise Refusal(400, "'ready' is neither true nor false")
        return json_response(documents.index(self._catalogue.index(), ready=ready))

    # administration ---------------------------------------------------------------------------------------------------

    def _administer(
        self, request: Request, change: Callable[[], Coroutine[Any, Any, Change]]
    ) -> asyncio.Future[Response]:
        check_administrator(self._token, request.headers.get(b"authorization", b""))
        return asyncio.ensure_future(_changed(change()))

    def _load(self, request: Request, route: _Route) -> asyncio.Future[Response]:
        def change() -> Coroutine[Any, Any, Change]:
            check_load_parameters(_json_object(request).get("parameters"))
            return self._catalogue.load(route.name)

        return self._administer(request, change)

    def _unload(self, request: Request, route: _Route) -> asyncio.Future[Response]:
        return self._administer(request, lambda: self._catalogue.unload(route.name))

    def _promote(self, request: Request, route: _Route) -> asyncio.Future[Response]:
        return self._administer(request, lambda: self._catalogue.promote(route.name, _version(route.version)))

    def _rollback(self, request: Request, route: _Route) -> asyncio.Future[Response]:
        return self._administer(request, lambda: self._catalogue.rollback(route.name))

    def _traffic(self, request: Request, route: _Route) -> Response:
        return json_response({"traffic": self._catalogue.traffic(route.name)})

    def _split(self, request: Request, route: _Route) -> asyncio.Future[Response]:
        return self._administer(request, lambda: self._catalogue.split(route.name, _weights(_json_object(request))))

    # shared memory ----------------------------------------------------------------------------------------------------

    def _shared_status(self, request: Request, route: _Route) -> Response:
        return json_response(self._shared.status(route.name))

    def _shared_register(self, request: Request, route: _Route) -> Response:
        document = _json_object(request)
        self._shared.register(route.name, document.get("key"), document.get("offset", 0), document.get("byte_size"))
        return json_response({})

    def _shared_unregister(self, request: Request, route: _Route) -> Response:
        self._shared.unregister(route.name)
        return json_response({})


def _header_length(request: Request) -> int:
    """Return the length of the JSON before binary data."""
    text = request.headers[_HEADER_LENGTH]
    if not text.isdigit() or len(text) > 12:
        raise Refusal(400, "Inference-Header-Content-Length is no length")
    return int(text)


def _json_object(request: Request) -> dict[str, Any]:
    """Return the JSON object of a body; an empty body is an empty object."""
    if not request.body.strip():
        return {}
    try:
        document = orjson.loads(request.body)
    except orjson.JSONDecodeError as error:
        raise Refusal(400, f"the request is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise Refusal(400, "the request is no JSON object")
    return cast(dict[str, Any], document)


def _weights(document: dict[str, Any]) -> dict[int, float]:
    """Return the weights by version of a split.

    Raises:
        Refusal: The document is of another form (400).
    """
    weights = document.get("weights")
    form = 'the request is no split; allowed: {"weights": {"VERSION": NUMBER, ...}}, or without versions to end one'
    if document.keys() != {"weights"} or not isinstance(weights, dict):
        raise Refusal(400, form)
    found: dict[int, float] = {}
    for version, weight in cast(dict[str, Any], weights).items():
        if type(weight) not in (int, float):
            raise Refusal(400, form)
        found[_version(version)] = weight
    return found


async def _changed(change: Awaitable[Change]) -> Response:
    """Return the answer to a change of what is served."""
    try:
        done = await change
    except NarrowcastError as error:
        raise change_refusal(error) from error
    document: dict[str, Any] = {"traffic": done.traffic, "kept": not done.forgotten}
    return json_response(document | {"reason": done.forgotten} if done.forgotten else document)


def _version(text: str) -> int:
    """Return the number of a version.

    Raises:
        Refusal: The text is none (400).
    """
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise Refusal(400, f"version {text[:40]!r} is no positive integer")
    return int(text)
