"""How the keeper and the replicas are reached through Ray."""

from __future__ import annotations

import asyncio
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from narrowcast.serving.http.message import Request, Response
from narrowcast.serving.ray.wire import Call, CallAnswer, Keeping, Refused, Remote, Report, Table
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.signature import Signature

__all__ = ["ActorKeeping", "HandleRemote"]

#: How long replicas have to answer a question that goes to all of them.
_ALL_SECONDS = 5.0


class HandleRemote(Remote):
    """The replicas of a deployment, reached by Ray's handle; it may be sent to other processes.

    Args:
        key: Name of the application that the deployment is.
        handle: Ray's handle.
    """

    def __init__(self, key: str, handle: DeploymentHandle[Any]) -> None:
        self._key = key
        self._handle = handle

    @property
    def key(self) -> str:
        return self._key

    async def ask(self, request: Request) -> Response:
        return await _reached(self._handle.ask.remote(request))

    async def call(self, call: Call) -> CallAnswer:
        return await _reached(self._handle.call.remote(call))

    async def signature(self) -> Signature:
        return await _reached(self._handle.signature.remote())

    async def reports(self) -> list[Report]:
        try:
            asked = self._handle.broadcast("report")
            found = await asked.results_async(timeout_s=_ALL_SECONDS, return_exceptions=True)
        except (TimeoutError, RayError):
            return []
        return [answer for answer in found if isinstance(answer, Report)]

    async def close(self) -> None:
        await self._handle.shutdown_async()


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


class ActorKeeping(Keeping):
    """The keeper, reached as an actor.

    Args:
        actor: Ray's handle of it.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def ask(self, request: Request) -> Response:
        return await _kept(self._actor.ask.remote(request))

    async def call(self, call: Call) -> CallAnswer:
        return await _kept(self._actor.call.remote(call))

    async def wake(self, name: str, version: str) -> Table | Refused:
        return await _kept(self._actor.wake.remote(name, version))

    async def follow(self, who: str, applied: int, settled: int) -> Table | None:
        return await _kept(self._actor.follow.remote(who, applied, settled))


async def _kept(reference: Any) -> Any:
    """Return what the keeper answers.

    Raises:
        Refusal: It cannot be reached (503).
    """
    try:
        return await reference
    except RayActorError as error:
        raise Refusal(
            503, "the keeper of the repository cannot be reached; loaded models are served on", retry_after=1
        ) from error
