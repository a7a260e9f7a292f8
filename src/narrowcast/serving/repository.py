"""The folder that models are loaded from: ``NAME/VERSION/artifact``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from narrowcast.artifacts.store import MANIFEST
from narrowcast.errors import ArtifactError
from narrowcast.serving.workers.sources import ArtifactSource, Source

__all__ = ["Repository", "VersionPolicy"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
#: Version of a model that was named by its artifact folder alone.
_ONLY = 1


@dataclass(frozen=True)
class VersionPolicy:
    """Which versions of a model are served.

    Attributes:
        latest: How many of the newest; 0 for all.
        named: These, whatever else there is; empty for the newest.
    """

    latest: int = 1
    named: tuple[int, ...] = ()

    def select(self, versions: Sequence[int]) -> tuple[int, ...]:
        """Return those of the versions that are served, in order."""
        if self.named:
            return tuple(sorted(set(versions) & set(self.named)))
        return tuple(sorted(versions)[-self.latest :])


class Repository:
    """Models by name and version.

    Args:
        places: Folders of models, and folders that are an artifact themselves.
        sources: Models that a library brings, by name: one that is version 1, or several by version.

    Raises:
        ArtifactError: A place is neither, or two have a model of the same name.
    """

    def __init__(
        self, places: Sequence[Path] = (), sources: Mapping[str, Source | Mapping[int, Source]] | None = None
    ) -> None:
        self._fixed: dict[str, dict[int, Source]] = {
            name: {_ONLY: source} if isinstance(source, Source) else dict(source)
            for name, source in (sources or {}).items()
        }
        self._roots: list[Path] = []
        for place in places:
            if (place / MANIFEST).is_file():
                self._add_artifact(place)
            elif place.is_dir():
                self._roots.append(place.resolve())
            else:
                raise ArtifactError(
                    f"{place} is no folder", allowed="an artifact, or a folder of NAME/VERSION/artifact"
                )

    def _add_artifact(self, place: Path) -> None:
        name = place.resolve().name
        if not _NAME.fullmatch(name) or name in self._fixed:
            taken = "is the name of another model too" if name in self._fixed else "cannot be the name of a model"
            raise ArtifactError(
                f"{place}: {name!r} {taken}",
                allowed="letters, digits, dots, dashes and underscores, each name once",
                next_step="rename the folder, or put it into a folder of NAME/VERSION/artifact",
            )
        self._fixed[name] = {_ONLY: ArtifactSource(place)}

    @property
    def roots(self) -> tuple[Path, ...]:
        """The folders of models, without links on the way to them."""
        return tuple(self._roots)

    def names(self) -> list[str]:
        """Return the names of all models that are there now."""
        found = set(self._fixed)
        for root in self._roots:
            found.update(path.name for path in _entries(root) if self._versions_in(root, path.name))
        return sorted(found)

    def versions(self, name: str) -> dict[int, Source]:
        """Return the versions of a model that are there now; none where there is no such model.

        A name that is no plain name is that of no model: nothing outside the roots is ever looked at.
        """
        if name in self._fixed:
            return dict(self._fixed[name])
        root = self.root(name)
        return {} if root is None else self._versions_in(root, name)

    def root(self, name: str) -> Path | None:
        """Return the folder that a model's versions are in, or None where it is no model of a folder."""
        return next((root for root in self._roots if name not in self._fixed and self._versions_in(root, name)), None)

    def _versions_in(self, root: Path, name: str) -> dict[int, Source]:
        if not _NAME.fullmatch(name):
            return {}
        model = root / name
        if model.is_symlink() or not model.is_dir():
            return {}
        return {
            int(path.name): ArtifactSource(path / "artifact")
            for path in _entries(model)
            if _VERSION.fullmatch(path.name) and _is_plain_folder(path) and _is_plain_folder(path / "artifact")
        }


def _entries(folder: Path) -> list[Path]:
    """Return what is in a folder; nothing in one that has gone meanwhile."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_plain_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
