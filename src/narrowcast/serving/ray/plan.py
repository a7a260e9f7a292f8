"""What a replica needs to know, and what can be refused before a cluster is asked for anything."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from narrowcast.artifacts import load_artifact
from narrowcast.artifacts.store import MANIFEST
from narrowcast.errors import ArtifactError, ConfigError, choices
from narrowcast.serving.hosting import Hosting
from narrowcast.serving.limits import Limits
from narrowcast.serving.repository import Repository
from narrowcast.serving.settings import read_model_options
from narrowcast.serving.state import read_state
from narrowcast.serving.workers.sources import ArtifactSource, Placement

__all__ = ["PlannedVersion", "Scale", "check_engine", "check_places", "planned_version"]


@dataclass(frozen=True)
class Scale:
    """How many replicas a version has, and on which cluster.

    Attributes:
        most: At most so many; the fewest are the workers of the model. None for always the same number.
        address: The cluster, or None to start one on this machine.
        up_seconds: How long load must ask for more replicas before there are more.
        down_seconds: How long fewer must be enough before there are fewer.
    """

    most: int | None = None
    address: str | None = None
    up_seconds: float = 30.0
    down_seconds: float = 600.0


@dataclass(frozen=True)
class PlannedVersion:
    """One version, with all that a replica needs to know; it is sent to other machines.

    Attributes:
        name: The model.
        version: Its version.
        folder: The artifact, at the same place on every machine of the cluster.
        content: Says what is in the artifact: a hash of its manifest, which has those of all files.
        hosting: How it is run; one worker, because replicas are Ray's.
        limits: Bounds on requests.
        threads: Threads that a replica computes with.
        fewest: Replicas at least.
        grace: Seconds that requests have to finish when a replica ends.
    """

    name: str
    version: int
    folder: str
    content: str
    hosting: Hosting
    limits: Limits
    threads: int
    fewest: int
    grace: float

    @property
    def ongoing(self) -> int:
        """Requests that Ray gives to one replica at a time: all that its queue takes, and one more batch.

        The bound of the queue is reached before, so overload is refused by the scheduler, which knows deadlines.
        """
        settings = self.hosting.settings
        return settings.queue + settings.batching.largest


def planned_version(
    name: str, version: int, folder: Path, hosting: Hosting, limits: Limits, grace: float
) -> PlannedVersion:
    """Return a version as its replicas run it.

    Args:
        name: The model.
        version: Its version.
        folder: The artifact.
        hosting: How the model is run; its workers are the replicas at least.
        limits: Bounds on requests.
        grace: Seconds that requests have to finish when a replica ends.

    Raises:
        ArtifactError: The artifact is damaged.
    """
    threads = load_artifact(folder).manifest.target.threads
    alone = replace(hosting, placement=Placement.THREAD, workers=1, on_demand=False)
    content = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    return PlannedVersion(name, version, str(folder), content, alone, limits, threads, hosting.workers, grace)


def check_engine(name: str) -> None:
    """Make sure that an engine is this one.

    Raises:
        ConfigError: There is no such engine.
    """
    if name != "ray":
        raise ConfigError(f"engine {name!r} is unknown", allowed=choices(name, ["local", "ray"]))


def check_places(places: Sequence[Path], hosting: Hosting, scale: Scale) -> list[str]:
    """Find what would keep the models of a repository from being served, and return their names.

    Args:
        places: Artifacts and folders of models.
        hosting: How models are run where their own files say nothing.
        scale: How many replicas there are.

    Raises:
        ArtifactError: A place is neither, or an artifact is damaged.
        ConfigError: A file of options, or what is remembered, cannot be read.
    """
    repository = Repository([place.absolute() for place in places])
    for root in repository.roots:
        read_state(root)
    names = repository.names()
    if not names:
        raise ArtifactError("there is no model to serve", allowed="an artifact, or a folder of NAME/VERSION/artifact")
    for name in names:
        root = repository.root(name)
        own = hosting if root is None else read_model_options(root / name, hosting)
        if scale.most is not None and scale.most < own.workers:
            raise ConfigError(
                f"model {name!r} has {own.workers} workers at least and {scale.most} at most",
                next_step="raise --max-workers",
            )
        found = repository.versions(name)
        wanted = own.policy.select(sorted(found))
        if not wanted:
            raise ConfigError(
                f"model {name!r} has none of the versions that the policy names",
                allowed=", ".join(map(str, sorted(found))),
            )
        for version in wanted:
            source = found[version]
            assert isinstance(source, ArtifactSource)
            load_artifact(source.folder)
    return names
