"""One ``narrowcast serve`` command, as far as the files that deploy it need to know it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from narrowcast.artifacts import load_artifact
from narrowcast.artifacts.manifest import Manifest
from narrowcast.artifacts.store import MANIFEST
from narrowcast.errors import ConfigError
from narrowcast.serving.hosting import Hosting
from narrowcast.serving.repository import Repository
from narrowcast.serving.server import ServerOptions
from narrowcast.serving.settings import read_model_options
from narrowcast.serving.workers.sources import ArtifactSource

__all__ = ["Deployment", "Given"]

#: Seconds between the end of the grace and the moment at which whoever ends the server may kill it: what is left then is
#: answered, and worker processes are ended.
_AFTER_GRACE = 10


@dataclass(frozen=True)
class Given:
    """An option as it was given: its name, its values (none for a switch), and whether they are paths of this machine."""

    name: str
    values: tuple[str, ...] = ()
    is_path: bool = False

    def words(self) -> tuple[str, ...]:
        """Return the words of the command line, paths made absolute."""
        values = [str(Path(value).absolute()) for value in self.values] if self.is_path else self.values
        return tuple(word for value in values for word in (self.name, value)) if values else (self.name,)


@dataclass(frozen=True)
class Deployment:
    """What is to be deployed.

    Attributes:
        places: Artifacts and folders of models.
        hosting: How models are run.
        options: Where the server listens, and what it allows; the token is never written to a file.
        given: Options as they were given, the host and the token left out.
    """

    places: tuple[Path, ...]
    hosting: Hosting
    options: ServerOptions
    given: tuple[Given, ...] = ()

    def __post_init__(self) -> None:
        if self.options.port is None or 0 in self.ports.values():
            raise ConfigError(
                f"ports {', '.join(f'{name} {port}' for name, port in self.ports.items()) or 'none'} cannot be deployed",
                allowed="numbers that others can know; gRPC and metrics may be left out with -1",
            )
        Repository(self.places)

    @property
    def administered(self) -> bool:
        """Whether a token turns administration on."""
        return self.options.token is not None

    @property
    def stop_seconds(self) -> int:
        """Seconds from SIGTERM until the server may be killed."""
        return math.ceil(self.options.grace) + _AFTER_GRACE

    @property
    def ports(self) -> dict[str, int]:
        """Ports by what listens on them."""
        ports = {"http": self.options.port, "grpc": self.options.grpc_port, "metrics": self.options.metrics_port}
        return {name: port for name, port in ports.items() if port is not None}

    @property
    def extras(self) -> tuple[str, ...]:
        """Extras of the package that this server needs."""
        runtimes = {manifest.target.runtime for manifest, _ in self._loaded}
        return ("openvino", "serve") if "openvino" in runtimes else ("serve",)

    @cached_property
    def _loaded(self) -> list[tuple[Manifest, int]]:
        """What the versions that are loaded now say of themselves, and how many workers each has."""
        repository = Repository(self.places)
        found: list[tuple[Manifest, int]] = []
        for name in repository.names():
            root = repository.root(name)
            own = self.hosting if root is None else read_model_options(root / name, self.hosting)
            versions = repository.versions(name)
            for version in own.policy.select(sorted(versions)):
                source = versions[version]
                assert isinstance(source, ArtifactSource)
                found.append((load_artifact(source.folder, check=False).manifest, own.workers))
        return found

    @property
    def cores(self) -> int:
        """Threads that compute when all workers of all models do."""
        return max(1, sum(manifest.target.threads * workers for manifest, workers in self._loaded))

    @property
    def memory_bytes(self) -> int | None:
        """Memory of all workers by what was measured when the artifacts were built; None where one was not measured."""
        total = 0.0
        for manifest, workers in self._loaded:
            measured = [m for m in manifest.measurements if (m.measure, m.subject) == ("peak_memory", "artifact")]
            if not measured:
                return None
            total += measured[0].value * workers
        return math.ceil(total) or None

    # commands ---------------------------------------------------------------------------------------------------------

    def command_here(self) -> tuple[str, ...]:
        """Return the words behind ``serve`` for this machine."""
        return (
            *(str(place.absolute()) for place in self.places),
            *("--host", self.options.host),
            *(word for option in self.given for word in option.words()),
        )

    def command_inside(self, base: str) -> tuple[str, ...]:
        """Return the words behind ``serve`` for a container that has the models at a path.

        Raises:
            ConfigError: An option means nothing in a container.
        """
        for option in self.given:
            if option.is_path:
                raise ConfigError(f"{option.name} names a file of this machine, which a container does not have")
        if self.options.shared_memory:
            raise ConfigError(
                "--shared-memory is for clients of the same machine, and a container has a memory of its own"
            )
        return (
            *(target for _, target in self.mounts(base)),
            *("--host", "0.0.0.0"),
            *(word for option in self.given for word in option.words()),
        )

    def mounts(self, base: str) -> list[tuple[Path, str]]:
        """Return each place with its path in a container: one folder of models at the base, others below it by name."""
        places = [place.resolve() for place in self.places]
        if len(places) == 1 and not (places[0] / MANIFEST).is_file():
            return [(places[0], base)]
        names = _distinct([place.name for place in places])
        return [(place, f"{base}/{name}") for place, name in zip(places, names, strict=True)]


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names, those that came before with a number behind them."""
    found: list[str] = []
    for name in names:
        number = 1
        distinct = name
        while distinct in found:
            number += 1
            distinct = f"{name}-{number}"
        found.append(distinct)
    return found
