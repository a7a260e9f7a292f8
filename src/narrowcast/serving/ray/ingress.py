"""The deployment that clients reach: it sends inference to the replicas of the version that answers, as it came.

What is no inference goes to the keeper of the repository, so that it is answered the same on all machines.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import unquote_to_bytes

import grpc
from google.protobuf.message import DecodeError

from narrowcast.oip.messages import HEALTH, INFERENCE
from narrowcast.serving.catalogue import Catalogue
from narrowcast.serving.hosting import Hosting
from narrowcast.serving.http.message import Request, Response, json_response
from narrowcast.serving.limits import Limits
from narrowcast.serving.protocol import documents
from narrowcast.serving.ray.rpc import CHECK
from narrowcast.serving.ray.wire import Call, CallAnswer, Keeping, Remote, Table
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.repository import Repository
from narrowcast.serving.rest import RestApi
from narrowcast.serving.rpc.service import CODES, SERVICE, retry_metadata
from narrowcast.serving.rpc.streams import answered_in_order
from narrowcast.serving.shared_memory import SharedMemory

__all__ = ["Ingress"]

_log = logging.getLogger(__name__)
_INFER = re.compile(rb"/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?/infer")
#: What the keeper answers; the rest needs no model.
_KEPT = re.compile(rb"/v2/(?:models|repository)/.*")
_READY = b"/v2/health/ready"
#: How long until a keeper that could not be reached is asked again.
_AGAIN_SECONDS = 1.0


class Ingress:
    """Routes requests.

    It is made in the event loop that it runs in.

    Args:
        keeper: Knows what is served.
        limits: Bounds on requests.
        draw: Gives numbers in [0, 1), by which requests are split among versions.
    """

    def __init__(self, keeper: Keeping, limits: Limits, draw: Callable[[], float] = random.random) -> None:
        self._keeper = keeper
        self._limits = limits
        self._draw = draw
        self._name = uuid.uuid4().hex
        self._table = Table()
        self._remotes: dict[str, Remote] = {}
        self._heard = asyncio.Event()
        #: Requests under way, by the revision of the table that they went by.
        self._under_way: Counter[int] = Counter()
        # It answers what needs no model, and refuses what is no target or cannot be done here.
        self._own = RestApi(Catalogue(Repository(), Hosting()), limits, SharedMemory(allowed=False))
        self._following = asyncio.ensure_future(self._follow())
        self._leaving: set[asyncio.Task[None]] = set()

    async def informed(self) -> None:
        """Return when the keeper was heard once: loaded models are served from then on, whatever becomes of it."""
        await self._heard.wait()

    async def stop(self) -> None:
        """Follow the keeper no longer."""
        ending = [self._following, *self._leaving]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    # the table --------------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        while True:
            try:
                settled = min(self._under_way, default=self._table.revision)
                table = await self._keeper.follow(self._name, self._table.revision, settled)
            except Refusal as refusal:
                _log.warning("%s", refusal.message)
                await asyncio.sleep(_AGAIN_SECONDS)
            else:
                if table is not None:
                    self._go_by(table)
                    self._heard.set()

    def _go_by(self, table: Table) -> None:
        """Go by a table if it is newer, and let go of what is in none any more."""
        if table.revision <= self._table.revision:
            return
        self._table = table
        remotes = [remote for model in table.models.values() for remote in model.versions.values()]
        known = {remote.key: self._remotes.get(remote.key, remote) for remote in remotes}
        gone = [remote for key, remote in self._remotes.items() if key not in known]
        self._remotes = known
        if gone:
            leaving = asyncio.create_task(self._let_go(gone, table.revision))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)

    async def _let_go(self, gone: list[Remote], revision: int) -> None:
        """Close what replicas are reached by, when nothing is under way any more that went by an older table."""
        while any(older < revision for older in self._under_way):
            await asyncio.sleep(_AGAIN_SECONDS)
        for remote in gone:
            await remote.close()

    @contextmanager
    def _going(self) -> Generator[None]:
        """Count a request that goes by the table as it is now."""
        revision = self._table.revision
        self._under_way[revision] += 1
        try:
            yield
        finally:
            self._under_way[revision] -= 1
            if not self._under_way[revision]:
                del self._under_way[revision]

    def _routed(self, name: str, version: str) -> tuple[str, Remote | None]:
        """Return the version that answers a request, and its replicas if the table has them."""
        model = self._table.models.get(name)
        if model is None:
            return version, None
        if not version:
            number = model.traffic.pick(self._draw)
        elif version.isascii() and version.isdecimal() and len(version) < 19:
            number = int(version)
        else:
            return version, None
        remote = model.versions.get(number)
        return str(number), None if remote is None else self._remotes[remote.key]

    async def _loaded(self, name: str, version: str) -> None:
        """Have a version loaded that the table has not, or hear why it cannot be.

        Raises:
            Refusal: There is no such model or version (404), or it cannot be loaded (503, 504, 507).
        """
        self._go_by(await self._keeper.wake(name, version))

    async def _can_answer(self) -> bool:
        """Return whether all versions of the table can answer, by their own word."""
        reports = await asyncio.gather(*(remote.reports() for remote in self._remotes.values()))
        return self._heard.is_set() and all(reports)

    # REST -------------------------------------------------------------------------------------------------------------

    def handle(self, request: Request) -> Response | asyncio.Future[Response]:
        """Answer a request of the REST protocol, at once or later.

        Raises:
            Refusal: It gets no result.
        """
        path = request.target.partition(b"?")[0]
        match = _INFER.fullmatch(path) if request.method == b"POST" else None
        if match is not None:
            return asyncio.ensure_future(self._infer(_text(match["name"]), _text(match["version"]), request))
        if path == _READY:
            return asyncio.ensure_future(self._ready(request))
        if _KEPT.fullmatch(path):
            return asyncio.ensure_future(self._keeper.ask(request))
        return self._own.handle(request)

    async def _ready(self, request: Request) -> Response:
        """Say what the keeper says; without one, models are served on, and whoever splits the load must know."""
        try:
            return await self._keeper.ask(request)
        except Refusal:
            if request.method not in (b"GET", b"HEAD") or not await self._can_answer():
                raise
        return json_response({"ready": True})

    async def _infer(self, name: str, version: str, request: Request) -> Response:
        for _ in range(2):
            with self._going():
                number, remote = self._routed(name, version)
                if remote is not None:
                    return await remote.ask(request)
            await self._loaded(name, number)
        raise _between_changes(name)

    # gRPC -------------------------------------------------------------------------------------------------------------

    async def call(self, call: Call) -> CallAnswer:
        """Answer a call of the gRPC protocol; refusals are statuses."""
        try:
            if call.method == "ModelInfer":
                return await self._infer_call(call)
            if call.method == "ServerLive":
                return CallAnswer(INFERENCE["ServerLiveResponse"](live=True).SerializeToString())
            if call.method == "ServerMetadata":
                message = INFERENCE["ServerMetadataResponse"](**documents.server_metadata())
                return CallAnswer(message.SerializeToString())
            if call.method == CHECK:
                return await self._check(call)
            self._read(call)  # the keeper would take a message for granted
            if call.method == "ServerReady":
                return await self._ready_call(call)
            return await self._keeper.call(call)
        except Refusal as refusal:
            code = CODES.get(refusal.status, grpc.StatusCode.INTERNAL)
            return CallAnswer(b"", code.name, refusal.message, retry_metadata(refusal))

    async def _ready_call(self, call: Call) -> CallAnswer:
        try:
            return await self._keeper.call(call)
        except Refusal:
            message = INFERENCE["ServerReadyResponse"](ready=await self._can_answer())
            return CallAnswer(message.SerializeToString())

    async def _check(self, call: Call) -> CallAnswer:
        """Answer a health check of the server, or of the model that it names."""
        name = self._read(call, HEALTH["HealthCheckRequest"]).service
        if name in ("", SERVICE):
            answer = await self._ready_call(Call("ServerReady", b""))
        elif name not in self._table.models:
            raise Refusal(404, f"service {name!r} is unknown")
        else:
            asked = INFERENCE["ModelReadyRequest"](name=name)
            answer = await self._keeper.call(Call("ModelReady", asked.SerializeToString()))
        if answer.code:
            return answer
        ready = INFERENCE["ModelReadyResponse"].FromString(answer.message).ready  # that of the server has the same form
        message = HEALTH["HealthCheckResponse"](status="SERVING" if ready else "NOT_SERVING")
        return CallAnswer(message.SerializeToString())

    async def _infer_call(self, call: Call) -> CallAnswer:
        came = time.monotonic()
        request = self._read(call)
        name, version = request.model_name, request.model_version
        for _ in range(2):
            with self._going():
                number, remote = self._routed(name, version)
                if remote is not None:
                    return await remote.call(_sent_on(call, came))
            await self._loaded(name, number)
        raise _between_changes(name)

    def _read(self, call: Call, kind: Any = None) -> Any:
        """Return the message of a call.

        Raises:
            Refusal: It is larger than allowed (413) or cannot be read (400).
        """
        if len(call.message) > self._limits.decompressed_bytes:
            raise Refusal(413, f"the message is larger than {self._limits.decompressed_bytes} bytes")
        try:
            return (kind or INFERENCE[f"{call.method}Request"]).FromString(call.message)
        except DecodeError as error:
            raise Refusal(400, f"the message cannot be read: {error}") from None

    async def stream(
        self, messages: AsyncIterator[bytes], metadata: tuple[tuple[str, str], ...] = ()
    ) -> AsyncIterator[bytes]:
        """Yield a ``ModelStreamInferResponse`` for each request of a stream, in order; one that fails does not end it.

        Each is routed by itself, as if it had come alone.
        """
        answers = answered_in_order(messages, lambda message: self._stream_one(Call("ModelInfer", message, metadata)))
        async with aclosing(answers):
            async for response in answers:
                yield response

    async def _stream_one(self, call: Call) -> bytes:
        answer = await self.call(call)
        response = INFERENCE["ModelStreamInferResponse"](error_message=answer.details)
        if answer.code:
            try:
                response.infer_response.id = self._read(call).id
            except Refusal:
                response.infer_response.SetInParent()
        else:
            response.infer_response.ParseFromString(answer.message)
        return response.SerializeToString()


def _sent_on(call: Call, came: float) -> Call:
    """Return a call as it goes on now: what it has waited since it came, for a model to be loaded, is gone."""
    if call.remaining is None:
        return call
    return replace(call, remaining=call.remaining - (time.monotonic() - came))


def _between_changes(name: str) -> Refusal:
    return Refusal(503, f"model {name!r} is being changed; the request may be sent again", retry_after=1)


def _text(name: bytes | None) -> str:
    return unquote_to_bytes(name or b"").decode("utf-8", "replace")
