"""Keeps the repository for a cluster: one catalogue for all machines, and a table that all ingress replicas go by.

It is a server without listeners whose models run elsewhere. What is no inference it answers itself, in the words of the
same handlers; of each change it tells the ingress replicas, which say when they go by it, and when nothing is under way
any more that went by what was before. Only then is a change answered, and only then do replaced replicas end.

A keeper that begins where another one was lost takes over the replicas that run what it would start, so that they answer
all the while; what it does not take over ends when the ingress replicas go by the new table.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from narrowcast.errors import NarrowcastError
from narrowcast.serving.asgi import EMBEDDED
from narrowcast.serving.catalogue import Catalogue, ServedVersion
from narrowcast.serving.hosting import Hosting
from narrowcast.serving.http.message import Request, Response
from narrowcast.serving.ray.answering import answer_call, answer_request
from narrowcast.serving.ray.counting import Ledger
from narrowcast.serving.ray.deployments import DeployedRepository, Deployment, Fleet
from narrowcast.serving.ray.wire import Call, CallAnswer, Refused, Report, RoutedModel, Table
from narrowcast.serving.refusals import Refusal, change_refusal
from narrowcast.serving.server import InferenceServer, ServerOptions
from narrowcast.serving.traffic import Traffic
from narrowcast.serving.watching.api import ServerState
from narrowcast.serving.watching.gauges import Gauges

__all__ = ["Keeper"]

_log = logging.getLogger(__name__)
#: How long an ingress replica waits for a change before it is told that there is none.
_FOLLOW_SECONDS = 1.0
#: An ingress replica that was silent for so long is taken to have ended.
_SILENT_SECONDS = 10.0
#: How often replicas are asked how they are, when nobody wants to know.
_LOOK_SECONDS = 2.0
_STEP_SECONDS = 0.01
_LOADING = Refused(503, "the models are being loaded; those that were loaded before are served on", 1)


@dataclass(slots=True)
class _Follower:
    """An ingress replica: the table that it goes by, the oldest one that requests under way went by, when it was heard."""

    applied: int
    settled: int
    heard: float


class Keeper:
    """Knows what is served, changes it, and says so.

    It is made in the event loop that it runs in.

    Args:
        places: Artifacts and folders of models.
        hosting: How models are run where their own files say nothing.
        options: The administrators' token, bounds, and the grace of replicas.
        fleet: Runs the versions.
    """

    def __init__(self, places: Sequence[Path], hosting: Hosting, options: ServerOptions, fleet: Fleet) -> None:
        self._grace = options.grace
        self._repository = DeployedRepository(places, hosting, options.limits, options.grace, fleet, self._withdraw)
        embedded = replace(
            EMBEDDED, limits=options.limits, token=options.token, grace=options.grace, load_timeout=None
        )  # the fleet knows better why a version does not start
        self._server = InferenceServer(self._repository, hosting, embedded)
        self._fleet = fleet
        self._loaded = False
        self._table = Table(time.time_ns())  # above those of keepers before
        self._changed = asyncio.Event()
        self._followers: dict[str, _Follower] = {}
        self._ledgers: defaultdict[tuple[str, str], Ledger] = defaultdict(Ledger)
        self._looking: asyncio.Task[None] | None = None
        self._ending = False

    @property
    def catalogue(self) -> Catalogue:
        """The models."""
        return self._server.catalogue

    @property
    def state(self) -> ServerState:
        """Whether all that was loaded can answer."""
        if self._ending:
            return "ending"
        return "ready" if self._loaded and self.catalogue.ready else "not ready"

    async def start(self) -> dict[str, str]:
        """Load all models side by side; one that cannot be loaded leaves the others alone.

        Returns:
            Why models were not loaded, by name.

        Raises:
            NarrowcastError: None can be loaded, or what is remembered cannot be read.
        """
        await self._fleet.inherit()
        remembered = self.catalogue.remembered()
        loads = (self.catalogue.restore(name, before) for name, before in remembered.items())
        failed: dict[str, NarrowcastError] = {}
        for name, outcome in zip(remembered, await asyncio.gather(*loads, return_exceptions=True), strict=True):
            if isinstance(outcome, NarrowcastError):
                failed[name] = outcome
            elif outcome is not None:
                raise outcome
        if failed and len(failed) == len(remembered):
            raise next(iter(failed.values()))
        self._loaded = True
        self._publish()
        self._looking = asyncio.create_task(self._look_again())
        return {name: str(error) for name, error in failed.items()}

    async def sweep(self) -> None:
        """End what a keeper before this one left and nobody took over, when no request goes there any more."""
        await self._withdraw()
        await self._fleet.sweep()

    async def stop(self) -> None:
        """Unload all models; nobody asks for anything any more."""
        self._ending = True
        if self._looking is not None:
            self._looking.cancel()
        await self._server.stop()

    # answering --------------------------------------------------------------------------------------------------------

    async def ask(self, request: Request) -> Response | Refused:
        """Return the answer to a request of the REST protocol that is no inference; changes are in force with it."""
        if not self._loaded:
            return _LOADING
        if request.target.partition(b"?")[0].endswith(b"/stats"):
            await self.look()
        response = await answer_request(self._server, request)
        if request.method == b"POST":
            await self._followed(self._publish())
        return response

    async def call(self, call: Call) -> CallAnswer | Refused:
        """Return the answer to a gRPC call that is no inference; changes are in force with it."""
        if not self._loaded:
            return _LOADING
        if call.method == "ModelStatistics":
            await self.look()
        answer = await answer_call(self._server, call)
        if call.method.startswith("RepositoryModel"):
            await self._followed(self._publish())
        return answer

    async def wake(self, name: str, version: str) -> Table | Refused:
        """Return the newest table, with a version that is loaded first if need be."""
        if not self._loaded:
            return _LOADING
        try:
            await self.catalogue.get(name, version)
        except Refusal as refusal:
            return Refused.of(refusal)
        except NarrowcastError as error:
            return Refused.of(change_refusal(error))
        self._publish()
        return self._table

    # the table --------------------------------------------------------------------------------------------------------

    async def follow(self, who: str, applied: int, settled: int) -> Table | None:
        """Return a newer table as soon as there is one, or None after a while.

        Args:
            who: The ingress replica.
            applied: Revision of the table that it goes by.
            settled: No request of it is under way that went by an older table than this.
        """
        if applied > self._table.revision:  # said by a keeper before, whose clock was ahead
            self._tell(replace(self._table, revision=applied + 1))
        self._followers[who] = _Follower(applied, settled, time.monotonic())
        try:
            async with asyncio.timeout(_FOLLOW_SECONDS):
                while not self._loaded or self._table.revision <= applied:
                    await self._changed.wait()
        except TimeoutError:
            return None
        return self._table

    def _publish(self) -> int:
        """Put what is served now into the table, if it is not there yet, and return the table's revision."""
        catalogue = self.catalogue
        models: dict[str, RoutedModel] = {}
        for name in catalogue.names:
            traffic = Traffic.of({int(version): share for version, share in catalogue.traffic(name).items()})
            versions = {int(served.version): self._deployment(served) for served in catalogue.served(name)}
            models[name] = RoutedModel(
                traffic, {version: item.remote for version, item in versions.items() if item and item.remote}
            )
        if _shown(models) != _shown(self._table.models):
            self._tell(Table(self._table.revision + 1, models))
        return self._table.revision

    def _tell(self, table: Table) -> None:
        """Let the ingress replicas hear of a table."""
        self._table = table
        self._changed.set()
        self._changed = asyncio.Event()

    def _deployment(self, served: ServedVersion) -> Deployment | None:
        """Return the deployment of a loaded version: the one whose signature it is, which no two share."""
        signature = served.scheduler.signature
        return next((item for item in self._repository.deployments if item.signature is signature), None)

    def _live(self) -> list[_Follower]:
        """Return the ingress replicas that are there, and forget those that are not."""
        oldest = time.monotonic() - _SILENT_SECONDS
        self._followers = {who: item for who, item in self._followers.items() if item.heard >= oldest}
        return list(self._followers.values())

    async def _followed(self, revision: int) -> None:
        """Return when all ingress replicas go by a table at least as new."""
        while not self._ending and any(follower.applied < revision for follower in self._live()):
            await asyncio.sleep(_STEP_SECONDS)

    async def _withdraw(self) -> None:
        """Return when no request goes to what is served no longer, or the grace is over."""
        revision = self._publish()
        end = time.monotonic() + self._grace
        while not self._ending and any(follower.settled < revision for follower in self._live()):
            if time.monotonic() > end:
                _log.warning("replicas end with requests under way, because the grace is over")
                return
            await asyncio.sleep(_STEP_SECONDS)

    # statistics -------------------------------------------------------------------------------------------------------

    def farewell(self, name: str, version: int, report: Report) -> None:
        """Take what a replica has counted until its end."""
        self._ledgers[name, str(version)].note(report, ended=True)

    async def look(self) -> None:
        """Ask all replicas how they are, and count together what they have counted."""
        asked = [
            item for item in self._repository.deployments if item.remote is not None and item.signature is not None
        ]
        await asyncio.gather(*map(self._look_at, asked))
        for served in self.catalogue.served():
            self._ledgers[served.name, served.version].write(served.scheduler.statistics)

    async def _look_at(self, deployment: Deployment) -> None:
        assert deployment.remote is not None
        assert deployment.planned is not None
        reports = await deployment.remote.reports()
        deployment.heard(reports)
        for report in reports:
            self._ledgers[deployment.planned.name, str(deployment.planned.version)].note(report)

    async def _look_again(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                await self.look()
            except Exception:  # a cluster that changes has many ways to fail; the next look may succeed
                _log.exception("replicas cannot be asked how they are")

    def gauges(self, served: ServedVersion) -> Gauges:
        """Return how the replicas of a loaded version stand; their memory is Ray's to give."""
        deployment = self._deployment(served)
        alive, pending, running = (
            (deployment.alive, deployment.pending, deployment.running) if deployment else (0, 0, 0)
        )
        return Gauges(alive, served.hosting.workers, pending, running, None)


def _shown(models: Mapping[str, RoutedModel]) -> object:
    """Return what tables are compared by."""
    return {
        name: (model.traffic, {version: remote.key for version, remote in model.versions.items()})
        for name, model in models.items()
    }
