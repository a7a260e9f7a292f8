"""Model versions on a Ray cluster: what each replica runs, and how they are put there, taken over and taken off."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
import uuid
from typing import Any

from ray import serve
from ray.exceptions import RayError

from narrowcast._version import __version__
from narrowcast.errors import ConfigError, RuntimeFailedError
from narrowcast.serving.http.message import Request, Response
from narrowcast.serving.ray.cluster import brief
from narrowcast.serving.ray.handles import APPLICATION, HandleRemote, find_keeper
from narrowcast.serving.ray.plan import PlannedVersion, Scale
from narrowcast.serving.ray.replica import ModelReplica
from narrowcast.serving.ray.wire import Call, CallAnswer, Remote, Report
from narrowcast.serving.refusals import LoadTimeoutError, Refusal
from narrowcast.serving.signature import Signature

__all__ = ["FINISH_SECONDS", "RayFleet"]

_log = logging.getLogger(__name__)
#: How often Ray asks a replica that ends whether it has finished.
FINISH_SECONDS = 0.2
_STEP_SECONDS = 0.2
#: Versions that are started side by side; those of a larger repository wait their turn.
_AT_ONCE = 16
#: A version that has not started by then may lack the room that is taken up by what a killed program left.
_ROOM_SECONDS = 20.0


class _Replica:
    """What Ray runs in each process of a model version."""

    async def __init__(self, planned: PlannedVersion) -> None:  # Ray awaits it: the model loads in its loop
        self._planned = planned
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
        with contextlib.suppress(RayError, ValueError):  # at the end of all, nobody wants to know any more
            keeper = await asyncio.to_thread(find_keeper)
            await keeper.farewell.remote(self._planned.name, self._planned.version, self._replica.report())


class RayFleet:
    """Puts model versions on the cluster, each as an application of Ray Serve, and takes them off it.

    The name of an application says what runs there, so that a program that is given again knows it.

    Args:
        scale: How many replicas a version has.
        load_timeout: Seconds that the cluster has to start the replicas of a version, among them those that it takes to
            get another machine; None for ever.
    """

    def __init__(self, scale: Scale, load_timeout: float | None) -> None:
        self._scale = scale
        self._load_timeout = load_timeout
        self._turn = asyncio.Semaphore(_AT_ONCE)
        self._placing = asyncio.Lock()  # Ray cannot take two applications in two threads
        #: What a killed program left, and whether it runs.
        self._left: dict[str, bool] = {}

    async def inherit(self) -> None:
        found = (await asyncio.to_thread(serve.status)).applications
        self._left = {
            key: application.status == "RUNNING"
            for key, application in found.items()
            if key.startswith(f"{APPLICATION}-")
        }

    async def sweep(self) -> None:
        left, self._left = self._left, {}
        await asyncio.gather(*map(self._delete, left))

    async def deploy(self, planned: PlannedVersion) -> Remote:
        identity = _identity(planned, self._scale)
        for key in [key for key, runs in self._left.items() if runs and key.split("-")[-2] == identity]:
            taken = await self._taken_over(key)
            if taken is not None:
                return taken
        async with self._turn:
            key = f"{APPLICATION}-{planned.name}-{planned.version}-{identity}-{uuid.uuid4().hex[:8]}"
            return await self._started(key, planned)

    async def _taken_over(self, key: str) -> Remote | None:
        """Return the replicas of an application that was left, or None where they do not answer."""
        del self._left[key]
        remote = HandleRemote(key, await asyncio.to_thread(serve.get_app_handle, key))
        try:
            await remote.signature()
        except Refusal:
            self._left[key] = False
            return None
        _log.info("%s is taken over", key)
        return remote

    async def _started(self, key: str, planned: PlannedVersion) -> Remote:
        patience = asyncio.timeout(self._load_timeout)
        beginning = asyncio.ensure_future(self._begin(key, planned))
        try:
            handle = await asyncio.shield(beginning)
            async with patience:
                await self._running(key)
        except BaseException as error:
            await asyncio.wait([beginning])  # what is on its way there cannot be taken off yet
            await asyncio.shield(self._delete(key))
            if patience.expired():
                raise LoadTimeoutError(
                    f"the cluster has not started model {planned.name!r} version {planned.version} within "
                    f"{self._load_timeout:g} s",
                    next_step=f"see whether {planned.fewest} times {planned.threads} processors are free, or start the "
                    "server with a longer --load-timeout",
                ) from error
            raise
        return HandleRemote(key, handle)

    async def _begin(self, key: str, planned: PlannedVersion) -> Any:
        target = serve.RunTarget(self._bound(planned), name=key, route_prefix=None)
        async with self._placing:
            return (await asyncio.to_thread(serve.run_many, [target], wait_for_applications_running=False))[0]

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
            # As many may wait in one ingress replica while no replica runs.
            max_queued_requests=planned.ongoing * (scale.most or planned.fewest),
            ray_actor_options={"num_cpus": planned.threads},
            graceful_shutdown_timeout_s=planned.grace,
            graceful_shutdown_wait_loop_s=FINISH_SECONDS,
            **replicas,
        )
        return settings.bind(planned)

    async def _running(self, key: str) -> None:
        """Return when all replicas of an application run.

        Raises:
            RuntimeFailedError: They cannot be started.
        """
        began = time.monotonic()
        while True:
            status = await asyncio.to_thread(serve.status)
            found = status.applications.get(key)
            if found is not None and found.status == "RUNNING":
                return
            if found is not None and found.status == "DEPLOY_FAILED":
                said = [item.message for item in found.deployments.values() if item.message] or [found.message]
                raise RuntimeFailedError(f"Ray cannot deploy the model: {brief(said[0])}")
            if self._left and time.monotonic() - began > _ROOM_SECONDS:
                _log.warning("%s waits for room: what a killed program left is ended", key)
                await self.sweep()
            await asyncio.sleep(_STEP_SECONDS)

    async def remove(self, remote: Remote) -> None:
        await self._delete(remote.key)

    async def _delete(self, key: str) -> None:
        try:
            await asyncio.to_thread(serve.delete, key)
        except (RayError, TimeoutError) as error:
            _log.warning("%s does not end: %s", key, error)


def _identity(planned: PlannedVersion, scale: Scale) -> str:
    """Return what two versions share that are run alike, by the same release."""
    described = repr((__version__, planned, scale.most, scale.up_seconds, scale.down_seconds))
    return hashlib.sha256(described.encode()).hexdigest()[:12]
