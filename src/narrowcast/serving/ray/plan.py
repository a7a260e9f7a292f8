"""What is deployed: the models of a repository with their versions, and who answers requests that name none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from narrowcast.artifacts import load_artifact
from narrowcast.errors import ArtifactError, ConfigError, choices
from narrowcast.serving.hosting import Hosting
from narrowcast.serving.limits import Limits
from narrowcast.serving.repository import Repository
from narrowcast.serving.settings import read_model_options
from narrowcast.serving.state import read_state
from narrowcast.serving.traffic import Traffic
from narrowcast.serving.workers.sources import ArtifactSource, Placement

__all__ = ["PlannedModel", "PlannedVersion", "Scale", "check_engine", "plan"]


@dataclass(frozen=True)
class Scale:
    """How many replicas a version has.

    Attributes:
        most: At most so many; the fewest are the workers of the model. None for always the same number.
        address: The cluster, or None to start one on this machine.
    """

    most: int | None = None
    address: str | None = None


@dataclass(frozen=True)
class PlannedVersion:
    """One version, with all that a replica needs to know; it is sent to other machines.

    Attributes:
        name: The model.
        version: Its version.
        folder: The artifact, at the same place on every machine of the cluster.
        hosting: How it is run; one worker, because replicas are Ray's.
        limits: Bounds on requests.
        threads: Threads that a replica computes with.
        fewest: Replicas at least.
        grace: Seconds that requests have to finish when a replica ends.
    """

    name: str
    version: int
    folder: str
    hosting: Hosting
    limits: Limits
    threads: int
    fewest: int
    grace: float

    @property
    def deployment(self) -> str:
        """The name of its deployment."""
        return f"{self.name}-{self.version}"

    @property
    def ongoing(self) -> int:
        """Requests that Ray gives to one replica at a time: all that its queue takes, and one more batch.

        The bound of the queue is reached before, so overload is refused by the scheduler, which knows deadlines.
        """
        settings = self.hosting.settings
        return settings.queue + settings.batching.largest


@dataclass(frozen=True)
class PlannedModel:
    """A model: its versions, and which of them answer requests that name none."""

    name: str
    versions: tuple[PlannedVersion, ...]
    traffic: Traffic


def check_engine(name: str) -> None:
    """Make sure that an engine is this one.

    Raises:
        ConfigError: There is no such engine.
    """
    if name != "ray":
        raise ConfigError(f"engine {name!r} is unknown", allowed=choices(name, ["local", "ray"]))


def plan(places: Sequence[Path], hosting: Hosting, limits: Limits, grace: float) -> tuple[PlannedModel, ...]:
    """Return what is deployed for a repository as it is now, promotions and splits that it remembers included.

    Args:
        places: Artifacts and folders of models.
        hosting: How models are run where their own files say nothing.
        limits: Bounds on requests.
        grace: Seconds that requests have to finish when a replica ends.

    Raises:
        ArtifactError: A place is neither, or an artifact is damaged.
        ConfigError: A file of options, or what is remembered, cannot be read.
    """
    repository = Repository([place.absolute() for place in places])
    remembered = {root: read_state(root) for root in repository.roots}
    planned: list[PlannedModel] = []
    for name in repository.names():
        root = repository.root(name)
        own = hosting if root is None else read_model_options(root / name, hosting)
        found = repository.versions(name)
        wanted = own.policy.select(sorted(found))
        if not wanted:
            raise ConfigError(
                f"model {name!r} has none of the versions that the policy names",
                allowed=", ".join(map(str, sorted(found))),
            )
        state = None if root is None else remembered[root].get(name)
        traffic = Traffic.all_to(max(wanted))
        if state is not None and state.traffic is not None and set(state.traffic) <= set(found):
            traffic = Traffic.of(state.traffic)
        versions: list[PlannedVersion] = []
        for version in sorted({*wanted, *traffic.versions}):
            source = found[version]
            assert isinstance(source, ArtifactSource)
            versions.append(_planned(name, version, source.folder, own, limits, grace))
        planned.append(PlannedModel(name, tuple(versions), traffic))
    if not planned:
        raise ArtifactError("there is no model to serve", allowed="an artifact, or a folder of NAME/VERSION/artifact")
    return tuple(planned)


def _planned(name: str, version: int, folder: Path, own: Hosting, limits: Limits, grace: float) -> PlannedVersion:
    threads = load_artifact(folder).manifest.target.threads
    alone = replace(own, placement=Placement.THREAD, workers=1, on_demand=False)
    return PlannedVersion(name, version, str(folder), alone, limits, threads, own.workers, grace)
