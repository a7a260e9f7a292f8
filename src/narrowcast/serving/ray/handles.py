"""How the keeper and the replicas are reached through Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from narrowcast.serving.http.message import Request, Response
from narrowcast.serving.ray.wire import Call, CallAnswer, Keeping, Refused, Remote, Report, Table
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.signature import Signature

__all__ = ["APPLICATION", "KEEPER", "ActorKeeping", "HandleRemote", "find_keeper"]

#: What the application that clients reach is called in the cluster; those of model versions begin with it.
APPLICATION = "narrowcast"
#: What the keeper is called there, in a namespace of the application's name.
KEEPER = "keeper"
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
        except (TimeoutError, RayError, RayServeException):  # the last of a deployment that has ended
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


def find_keeper() -> Any:
    """Return Ray's handle of the keeper that there is now.

    Raises:
        ValueError: There is none.
    """
    return ray.get_actor(KEEPER, APPLICATION)


class ActorKeeping(Keeping):
    """The keeper, reached as the actor of its name: when one has ended, the next is found."""

    def __init__(self) -> None:
        self._actor: Any = None

    async def ask(self, request: Request) -> Response:
        return await self._kept(lambda keeper: keeper.ask.remote(request))

    async def call(self, call: Call) -> CallAnswer:
        return await self._kept(lambda keeper: keeper.call.remote(call))

    async def wake(self, name: str, version: str) -> Table:
        return await self._kept(lambda keeper: keeper.wake.remote(name, version))

    async def follow(self, who: str, applied: int, settled: int) -> Table | None:
        return await self._kept(lambda keeper: keeper.follow.remote(who, applied, settled))

    async def _kept(self, ask: Callable[[Any], Any]) -> Any:
        """Return what the keeper answers.

        Raises:
            Refusal: It refuses, or there is none (503).
        """
        if self._actor is None:
            try:
                self._actor = await asyncio.to_thread(find_keeper)
            except ValueError as error:
                raise _unkept() from error
        actor = self._actor
        try:
            answer = await ask(actor)
        except RayActorError as error:
            if self._actor is actor:
                self._actor = None
            raise _unkept() from error
        if isinstance(answer, Refused):
            raise answer.refusal()
        return answer


def _unkept() -> Refusal:
    return Refusal(503, "the keeper of the repository cannot be reached; loaded models are served on", retry_after=1)
