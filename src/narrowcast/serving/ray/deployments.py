"""Model versions that run on a cluster, as the catalogue knows them: sources whose workers are replicas elsewhere.

Everything that the catalogue does to versions (load, replace, retire, remember) holds for them; only requests never come
to these workers, because the ingress sends them to the replicas directly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

from narrowcast.serving.hosting import Hosting
from narrowcast.serving.limits import Limits
from narrowcast.serving.ray.plan import PlannedVersion, planned_version
from narrowcast.serving.ray.wire import Remote, Report
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.repository import Repository
from narrowcast.serving.settings import read_model_options
from narrowcast.serving.signature import Signature
from narrowcast.serving.workers.base import Batch, Done, Worker
from narrowcast.serving.workers.sources import ArtifactSource, Placement, Source

__all__ = ["DeployedRepository", "Deployment", "Fleet"]


class Fleet(Protocol):
    """The cluster, as far as versions are put on it and taken off it."""

    async def inherit(self) -> None:
        """Look at what runs there already; versions that are deployed later may turn out to be among it."""
        ...

    async def sweep(self) -> None:
        """End what ran there already and was not deployed again."""
        ...

    async def deploy(self, planned: PlannedVersion) -> Remote:
        """Return the replicas of a version when they run; they may have run already.

        Raises:
            NarrowcastError: They cannot be started; then none is left.
        """
        ...

    async def remove(self, remote: Remote) -> None:
        """End the replicas of a version; they finish what they began."""
        ...


#: Called before the replicas of a deployment end that requests must not reach any more.
Withdraw = Callable[[], Awaitable[None]]


class Deployment:
    """The replicas of one version, from their start to their end; a version that is loaded again has another one.

    Args:
        fleet: Runs them.
        describe: Returns what they run; it reads and checks the artifact.
        withdraw: Is called before they end.
        ended: Is called when they have ended.

    Attributes:
        slots: A worker for each replica that there is at least.
        pending: Requests that wait in the replicas.
        running: Batches that they run.
        alive: Replicas that can be reached.
    """

    def __init__(
        self,
        fleet: Fleet,
        describe: Callable[[], PlannedVersion],
        withdraw: Withdraw,
        ended: Callable[[Deployment], None],
    ) -> None:
        self.slots: list[_Slot] = []
        self.pending = self.running = self.alive = 0
        self.signature: Signature | None = None
        self.planned: PlannedVersion | None = None
        self.remote: Remote | None = None
        self._fleet = fleet
        self._describe = describe
        self._withdraw = withdraw
        self._ended = ended
        self._starting: asyncio.Task[Signature] | None = None
        self._ending: asyncio.Task[None] | None = None

    def slot(self) -> Worker:
        """Return a worker that stands for one more replica."""
        self.slots.append(_Slot(self, len(self.slots)))
        return self.slots[-1]

    @property
    def sealed(self) -> bool:
        """Whether it has begun, and takes no more slots."""
        return self._starting is not None or self._ending is not None

    async def start(self) -> Signature:
        """Return the signature of the model when the replicas run; however many slots ask, they start once."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        return await asyncio.shield(self._starting)

    async def _start(self) -> Signature:
        self.planned = await asyncio.to_thread(self._describe)
        self.remote = await self._fleet.deploy(self.planned)
        self.signature = await self.remote.signature()
        self.alive = len(self.slots)
        return self.signature

    def heard(self, reports: Sequence[Report]) -> None:
        """Note how the replicas are, and tell the scheduler whose slots they fill."""
        before, self.alive = self.alive, len(reports)
        self.pending = sum(report.pending for report in reports)
        self.running = sum(report.running for report in reports)
        for slot in self.slots[before : self.alive]:
            slot.on_up(slot)
        for slot in self.slots[self.alive : before]:
            slot.on_down(slot)

    async def close(self) -> None:
        """End the replicas when nobody asks them any more; however many slots ask, they end once."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())
        await asyncio.shield(self._ending)

    async def _end(self) -> None:
        if self._starting is not None:
            self._starting.cancel()  # which does nothing where it has started
            await asyncio.gather(self._starting, return_exceptions=True)
        try:
            if self.remote is not None:
                await self._withdraw()
                await self._fleet.remove(self.remote)
                await self.remote.close()
        finally:
            self._ended(self)


class _Slot(Worker):
    """One of the replicas that a version has at least."""

    def __init__(self, deployment: Deployment, index: int) -> None:
        self._deployment = deployment
        self._index = index

    @property
    def up(self) -> bool:
        return self._deployment.alive > self._index

    async def start(self) -> None:
        self.signature = await self._deployment.start()

    def submit(self, batch: Batch, done: Done) -> None:
        raise Refusal(503, "replicas are asked by the ingress")

    async def close(self) -> None:
        await self._deployment.close()


class _DeployedSource(Source):
    """A version in a folder, whose workers are replicas of deployments."""

    def __init__(self, make: Callable[[], Deployment]) -> None:
        self._make = make
        self._forming: Deployment | None = None

    def size(self) -> int:
        """Return 0: the memory of replicas is Ray's to give."""
        return 0

    def worker(self, placement: Placement) -> Worker:
        """Return a slot of the deployment that is being put together; what has begun gets no more of them."""
        if self._forming is None or self._forming.sealed:
            self._forming = self._make()
        return self._forming.slot()


class DeployedRepository(Repository):
    """The models of places, whose versions run on a cluster.

    Args:
        places: Artifacts and folders of models.
        hosting: How models are run where their own files say nothing.
        limits: Bounds on requests.
        grace: Seconds that requests have to finish when a replica ends.
        fleet: Runs the versions.
        withdraw: Is called before the replicas of a deployment end, and returns when no request reaches them any more.
    """

    def __init__(
        self,
        places: Sequence[Path],
        hosting: Hosting,
        limits: Limits,
        grace: float,
        fleet: Fleet,
        withdraw: Withdraw,
    ) -> None:
        super().__init__(places)
        self._hosting, self._limits, self._grace = hosting, limits, grace
        self._fleet = fleet
        self._withdraw = withdraw
        #: Deployments that have not ended, the oldest first.
        self.deployments: list[Deployment] = []

    def versions(self, name: str) -> dict[int, Source]:
        """Return the versions of a model that are there now; none where there is no such model."""
        found = super().versions(name)
        return {version: self._deployed(name, version, source) for version, source in found.items()}

    def _deployed(self, name: str, version: int, source: Source) -> Source:
        assert isinstance(source, ArtifactSource)
        folder = source.folder

        def describe() -> PlannedVersion:
            root = self.root(name)
            own = self._hosting if root is None else read_model_options(root / name, self._hosting)
            return planned_version(name, version, folder, own, self._limits, self._grace)

        def make() -> Deployment:
            deployment = Deployment(self._fleet, describe, self._withdraw, self.deployments.remove)
            self.deployments.append(deployment)
            return deployment

        return _DeployedSource(make)
