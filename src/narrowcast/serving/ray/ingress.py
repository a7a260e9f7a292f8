"""The deployment that clients reach: it reads which model a request is for, and passes it on as it came.

What no model is asked (health, the index, statistics of several) it answers itself, in the words of the same handlers.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

import grpc
import orjson
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError

from narrowcast.oip.messages import INFERENCE
from narrowcast.serving.catalogue import Catalogue, IndexEntry
from narrowcast.serving.hosting import Hosting
from narrowcast.serving.http.message import Request, Response, json_response
from narrowcast.serving.limits import Limits
from narrowcast.serving.protocol import documents
from narrowcast.serving.ray.merging import merged_statistics
from narrowcast.serving.ray.wire import Call, CallAnswer, Remote
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.repository import Repository
from narrowcast.serving.rest import RestApi
from narrowcast.serving.rpc.service import CODES
from narrowcast.serving.shared_memory import SharedMemory
from narrowcast.serving.traffic import Traffic

__all__ = ["Ingress", "RoutedModel"]

_MODEL = re.compile(rb"/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?(?P<rest>/[a-z]+)?")
_OK = 200


@dataclass(frozen=True)
class RoutedModel:
    """A model as the ingress knows it."""

    traffic: Traffic
    versions: Mapping[int, Remote]


class Ingress:
    """Routes requests to the replicas of model versions.

    Args:
        models: All models by name.
        limits: Bounds on requests.
        draw: Gives numbers in [0, 1), by which requests are split among versions.
    """

    def __init__(
        self, models: Mapping[str, RoutedModel], limits: Limits, draw: Callable[[], float] = random.random
    ) -> None:
        self._models = models
        self._draw = draw
        # It answers what needs no model, and refuses what is no target, is not allowed, or cannot be done here.
        self._own = RestApi(Catalogue(Repository(), Hosting()), limits, SharedMemory(allowed=False))

    # REST -------------------------------------------------------------------------------------------------------------

    def handle(self, request: Request) -> Response | asyncio.Future[Response]:
        """Answer a request of the REST protocol, at once or later.

        Raises:
            Refusal: It gets no result.
        """
        path = request.target.partition(b"?")[0]
        asked = (b"GET" if request.method == b"HEAD" else request.method, path)
        match = _MODEL.fullmatch(path)
        if asked == (b"GET", b"/v2/models/stats"):
            return asyncio.ensure_future(self._statistics())
        if asked == (b"GET", b"/v2/health/ready"):
            return asyncio.ensure_future(self._ready())
        if asked == (b"POST", b"/v2/repository/index"):
            return asyncio.ensure_future(self._index(request))
        if match is None:
            return self._own.handle(request)
        name, version = (_text(match[key]) for key in ("name", "version"))
        if asked[0] == b"GET" and match["rest"] == b"/stats":
            return asyncio.ensure_future(self._statistics(name, version))
        remote = self._find(name, version)
        if asked[0] == b"GET" and match["rest"] is None:
            return asyncio.ensure_future(self._metadata(name, remote, request))
        return asyncio.ensure_future(remote.ask(request))

    def _find(self, name: str, version: str) -> Remote:
        """Return the replicas that answer a request.

        Raises:
            Refusal: There is no such model or version (404).
        """
        model = self._models.get(name)
        if model is None:
            raise Refusal(404, f"model {name!r} is not found: unknown")
        if not version:
            return model.versions[model.traffic.pick(self._draw)]
        remote = model.versions.get(int(version)) if version.isascii() and version.isdecimal() else None
        if remote is None:
            loaded = ", ".join(map(str, sorted(model.versions)))
            raise Refusal(404, f"model {name!r} has no version {version!r} loaded; allowed: {loaded}")
        return remote

    async def _metadata(self, name: str, remote: Remote, request: Request) -> Response:
        """Return what a replica says of its version, with all versions that are there."""
        response = await remote.ask(request)
        if response.status != _OK:
            return response
        document = orjson.loads(b"".join(response.body))
        return json_response(document | {"versions": self._versions(name)})

    def _versions(self, name: str) -> list[str]:
        return [str(version) for version in sorted(self._models[name].versions)]

    async def _ready(self) -> Response:
        if not all(entry.state == "READY" for entry in await self._entries()):
            raise Refusal(503, "a model has no replica that is alive", retry_after=1)
        return json_response({"ready": True})

    async def _index(self, request: Request) -> Response:
        self._own.handle(request)  # refuses a body that is no JSON object; of an empty repository it has nothing to say
        wanted = orjson.loads(request.body) if request.body.strip() else {}
        return json_response(documents.index(await self._entries(), ready=bool(wanted.get("ready", False))))

    async def _entries(self) -> list[IndexEntry]:
        """Return all versions, and whether a replica of each can run requests."""
        versions = [
            (name, version, remote)
            for name, model in sorted(self._models.items())
            for version, remote in sorted(model.versions.items())
        ]
        answers = await asyncio.gather(
            *(remote.ask_all(_get(f"/v2/models/{name}/ready")) for name, _, remote in versions)
        )
        return [
            IndexEntry(name, str(version), "READY")
            if any(answer.status == _OK for answer in found)
            else IndexEntry(name, str(version), "UNAVAILABLE", "no replica is alive")
            for (name, version, _), found in zip(versions, answers, strict=True)
        ]

    async def _statistics(self, name: str = "", version: str = "") -> Response:
        return json_response(await self._counted(name, version))

    async def _counted(self, name: str, version: str) -> dict[str, Any]:
        """Return the statistics of model versions, those of all their replicas added up.

        Raises:
            Refusal: There is no such model or version (404).
        """
        if version:
            chosen = [(name, self._find(name, version))]
        else:
            if name:
                self._find(name, "")
            names = [name] if name else sorted(self._models)
            chosen = [(key, remote) for key in names for _, remote in sorted(self._models[key].versions.items())]
        answers = await asyncio.gather(*(remote.ask_all(_get(f"/v2/models/{key}/stats")) for key, remote in chosen))
        counted = [
            [orjson.loads(b"".join(answer.body))["model_stats"][0] for answer in found if answer.status == _OK]
            for found in answers
        ]
        return {"model_stats": [merged_statistics(found) for found in counted if found]}

    # gRPC -------------------------------------------------------------------------------------------------------------

    async def call(self, call: Call) -> CallAnswer:
        """Answer a call of the gRPC protocol; refusals are statuses."""
        try:
            return await self._answer(call)
        except Refusal as refusal:
            code = CODES.get(refusal.status, grpc.StatusCode.INTERNAL)
            return CallAnswer(b"", code.name, refusal.message)

    async def _answer(self, call: Call) -> CallAnswer:
        try:
            request = INFERENCE[f"{call.method}Request"].FromString(call.message)
        except DecodeError as error:
            raise Refusal(400, f"the message cannot be read: {error}") from None
        fields = request.DESCRIPTOR.fields_by_name
        name, version = (
            (request.model_name, request.model_version)
            if call.method == "ModelInfer"
            else (request.name, request.version)
            if "version" in fields
            else ("", "")
        )
        if call.method == "ModelStatistics":
            return _message_of(call, await self._counted(name, version))
        if call.method == "ModelMetadata":
            answer = await self._find(name, version).call(call)
            return answer if answer.code else self._with_versions(name, answer)
        if call.method in ("ModelInfer", "ModelReady", "ModelConfig"):
            return await self._find(name, version).call(call)
        if call.method == "RepositoryIndex":
            return _message_of(call, {"models": documents.index(await self._entries(), ready=request.ready)})
        if call.method == "ServerReady":
            return _message_of(call, {"ready": all(entry.state == "READY" for entry in await self._entries())})
        if call.method == "ServerLive":
            return _message_of(call, {"live": True})
        if call.method == "ServerMetadata":
            return _message_of(call, documents.server_metadata())
        raise Refusal(501, f"{call.method} is not there on Ray: models are changed by serving again")

    def _with_versions(self, name: str, answer: CallAnswer) -> CallAnswer:
        message = INFERENCE["ModelMetadataResponse"].FromString(answer.message)
        del message.versions[:]
        message.versions.extend(self._versions(name))
        return CallAnswer(message.SerializeToString())


def _message_of(call: Call, document: dict[str, Any]) -> CallAnswer:
    return CallAnswer(ParseDict(document, INFERENCE[f"{call.method}Response"]()).SerializeToString())


def _get(target: str) -> Request:
    return Request(b"GET", target.encode(), {}, b"")


def _text(name: bytes | None) -> str:
    return unquote_to_bytes(name or b"").decode("utf-8", "replace")
