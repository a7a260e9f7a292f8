"""The server inside another program's: an ASGI application with the same routes, limits, refusals and encodings.

Mounted under a prefix of a Starlette or FastAPI application, or run by any ASGI server::

    inference = Application(Repository([Path("models")]))

    @asynccontextmanager
    async def lifespan(outer):
        async with inference:
            yield

    outer = Starlette(routes=[Mount("/inference", inference)], lifespan=lifespan)

An outer application keeps its lifespan to itself, so it enters this one; an ASGI server that runs the application alone
starts and ends it through the lifespan protocol. Connections, headers that come slowly and connections that stand idle are
the ASGI server's to bound; everything from the request target on is bounded here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from narrowcast.errors import ConfigError, NarrowcastError
from narrowcast.serving.catalogue import Catalogue, Hosting
from narrowcast.serving.http.connection import Handler
from narrowcast.serving.http.encoding import compress, decompress
from narrowcast.serving.http.message import Request, Response, refused
from narrowcast.serving.limits import HEADER_OVERHEAD, Limits
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.repository import Repository
from narrowcast.serving.server import InferenceServer, ServerOptions

__all__ = ["EMBEDDED", "Application", "HandlerApplication"]

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

#: No listeners at all: requests come through the outer server.
EMBEDDED = ServerOptions(port=None, grpc_port=None, metrics_port=None)

_log = logging.getLogger(__name__)


class HandlerApplication:
    """An ASGI application without a lifespan that lets one of our handlers answer.

    Args:
        find: Returns the handler; called for each request.
        limits: Bounds on requests.
    """

    def __init__(self, find: Callable[[], Handler], limits: Limits) -> None:
        self._find = find
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; other scopes than ``http`` are ended at once."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
            return
        request, response = await self._answer(scope, receive)
        if response is None:
            return
        if request is not None and b"accept-encoding" in request.headers:
            response = compress(request, response)
        body = b"".join(response.body)
        headers = [(b"content-type", response.content_type), (b"content-length", b"%d" % len(body))]
        headers += [(name.lower(), value) for name, value in response.headers]
        if response.close and scope.get("http_version", "1.1").startswith("1"):
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _answer(self, scope: Scope, receive: Receive) -> tuple[Request | None, Response | None]:
        """Return a request as far as it could be read, and its answer; no answer where the client has gone away."""
        request: Request | None = None
        try:
            request = await _read(scope, receive, self._limits)
            if request is None:
                return None, None
            encoding = request.headers.get(b"content-encoding")
            if encoding is not None:
                request.body = decompress(encoding, request.body, self._limits.decompressed_bytes)
            outcome = self._find()(request)
            return request, outcome if isinstance(outcome, Response) else await _unless_gone(outcome, receive)
        except Refusal as refusal:
            return request, refused(refusal)
        except Exception:
            _log.exception("a request failed")
            return request, refused(Refusal(500, "the server made a mistake; its log says more"))


class Application(HandlerApplication):
    """The Open Inference Protocol over REST as an ASGI application.

    It is started and ended by the lifespan protocol, by ``async with``, or by :meth:`start` and :meth:`stop`; before and
    after, it answers 503.

    Args:
        repository: The models.
        hosting: How they are run.
        options: What is allowed, and which listeners there are beside the outer server; none by default.

    Attributes:
        metrics: Another ASGI application, which answers ``/metrics`` under wherever it is mounted.
    """

    def __init__(
        self, repository: Repository, hosting: Hosting | None = None, options: ServerOptions = EMBEDDED
    ) -> None:
        super().__init__(lambda: self._running().handler, options.limits)
        self.metrics = HandlerApplication(lambda: self._running().metrics_handler, options.limits)
        self._make = lambda: InferenceServer(repository, hosting or Hosting(), options)
        self._server: InferenceServer | None = None

    @property
    def catalogue(self) -> Catalogue:
        """The models, for programs that change what is served; there while the application runs.

        Raises:
            Refusal: It does not (503).
        """
        return self._running().catalogue

    async def start(self) -> None:
        """Load all models.

        Raises:
            ConfigError: The application runs already.
            NarrowcastError: A model cannot be loaded, or an address of the options cannot be had.
        """
        if self._server is not None:
            raise ConfigError("the application runs already", allowed="one lifespan at a time")
        server = self._make()
        await server.start()
        self._server = server

    async def stop(self) -> bool:
        """Let what runs finish within the grace, and unload all models; return whether all was finished."""
        if self._server is None:
            return True
        try:
            return await self._server.stop()
        finally:
            self._server = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or follow the outer server's lifespan."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await super().__call__(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self.start()
        except NarrowcastError as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.stop()
        await send({"type": "lifespan.shutdown.complete"})

    def _running(self) -> InferenceServer:
        if self._server is None:
            raise Refusal(
                503, "the models are not loaded: the outer application has not entered the lifespan of this one"
            )
        return self._server


async def _read(scope: Scope, receive: Receive, limits: Limits) -> Request | None:
    """Return a request whose body was read to its end, or None where the client has gone away before that.

    Raises:
        Refusal: It is larger than allowed (413, 414, 431), or its body takes too long (408).
    """
    target = _target(scope)
    if len(target) > limits.target_bytes:
        raise Refusal(414, f"the request target is longer than {limits.target_bytes} bytes", close=True)
    headers: dict[bytes, bytes] = {}
    size = 0
    for name, value in scope["headers"]:
        size += len(name) + len(value) + HEADER_OVERHEAD
        known = headers.get(name)
        headers[name] = value if known is None else known + b"," + value
    if size > limits.header_bytes:
        raise Refusal(431, f"the headers take more than {limits.header_bytes} bytes", close=True)
    try:
        async with asyncio.timeout(limits.body_seconds):
            body = await _read_body(headers, receive, limits.body_bytes)
    except TimeoutError:
        raise Refusal(408, "the request took too long to arrive", close=True) from None
    return None if body is None else Request(scope["method"].encode(), target, headers, body)


async def _read_body(headers: dict[bytes, bytes], receive: Receive, limit: int) -> bytes | None:
    length = headers.get(b"content-length", b"0")
    too_large = Refusal(413, f"the body is larger than {limit} bytes", close=True)
    if length.isdigit() and int(length) > limit:
        raise too_large
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
        more = message.get("more_body", False)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _target(scope: Scope) -> bytes:
    """Return what is asked for under the place where the application is mounted."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and (path == root or path.startswith(root.rstrip("/") + "/")):
        path = path[len(root.rstrip("/")) :]
    query: bytes = scope.get("query_string", b"")
    target = quote(path or "/").encode()
    return target + b"?" + query if query else target


async def _unless_gone(future: asyncio.Future[Response], receive: Receive) -> Response | None:
    """Return what a future gives; where the client goes away first, it is cancelled and None is returned."""
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((future, gone), return_when=asyncio.FIRST_COMPLETED)
        if future.cancelled():
            raise Refusal(503, "the request was cancelled")
        return future.result() if future.done() else None
    finally:
        future.cancel()
        gone.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gone


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
