"""Artifact folders: written whole or not at all, read with every hash checked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from narrowcast.artifacts.manifest import SCHEMA, Manifest
from narrowcast.errors import ArtifactError, OutputError

__all__ = [
    "GRAPH",
    "MANIFEST",
    "REFERENCE",
    "Artifact",
    "check_output_folder",
    "file_sha256",
    "load_artifact",
    "publish",
    "save_artifact",
    "write_atomic",
]

MANIFEST = "manifest.json"
GRAPH = "model.onnx"
REFERENCE = "reference.npz"


@dataclass(frozen=True)
class Artifact:
    """An artifact folder that was read and whose hashes hold."""

    folder: Path
    manifest: Manifest

    @property
    def graph(self) -> Path:
        """The graph file."""
        return self.folder / GRAPH

    @property
    def reference(self) -> Path:
        """Stored reference inputs (``in:NAME``) and outputs (``out:NAME``)."""
        return self.folder / REFERENCE


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def check_output_folder(folder: Path, *, force: bool = False) -> None:
    """Check that an artifact could be written to a folder.

    Raises:
        OutputError: The folder cannot be written, or holds something that ``force`` does not allow to replace.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(
            f"output {folder} is a file",
            allowed="a folder that does not exist yet or is empty",
            next_step="name a folder",
        )
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MANIFEST).is_file():
            raise OutputError(
                f"output folder {folder} holds files that are no artifact",
                allowed="a folder that does not exist yet, is empty, or holds an artifact (with --force)",
                next_step="name another folder",
            )
        if not force:
            raise OutputError(
                f"output folder {folder} already holds an artifact",
                allowed="a folder that does not exist yet or is empty",
                next_step="name another folder, or replace the artifact with --force",
            )
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    reason = "no permission in" if parent.is_dir() else "there is a file at"
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(
            f"output folder {folder} cannot be written: {reason} {parent}",
            allowed="a folder in one that may be written to",
            next_step="name another folder",
        )


def save_artifact(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder whose other files are complete, with their hashes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    hashes = {str(path.relative_to(folder)): file_sha256(path) for path in files}
    write_atomic(folder / MANIFEST, manifest.model_copy(update={"files": hashes}).model_dump_json(indent=1))


def publish(built: Path, target: Path) -> None:
    """Move a complete artifact to its place; what was there is removed only after the new one is in place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    old = target.with_name(f"{target.name}.replaced-{os.getpid()}")
    if target.exists():
        target.rename(old)
    try:
        built.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    if old.exists():
        shutil.rmtree(old)


def load_artifact(folder: str | Path, *, check: bool = True) -> Artifact:
    """Return the artifact in a folder.

    Args:
        folder: The folder.
        check: Whether to check the hash of every file.

    Raises:
        ArtifactError: The folder is no artifact, was built by an incompatible version, or a file is missing or changed.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(
            f"{folder} is no artifact: it has no {MANIFEST}",
            allowed="a folder that narrowcast optimize wrote",
            next_step="check the path; an interrupted run leaves no artifact, so run optimize again to resume it",
        )
    manifest = _read_manifest(path)
    for problem in hash_problems(folder, manifest) if check else ():
        raise ArtifactError(
            f"artifact {folder} is damaged: {problem}",
            allowed="files as they were built",
            next_step="copy the artifact again, or build it again",
        )
    return Artifact(folder, manifest)


def _read_manifest(path: Path) -> Manifest:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema = content["schema_version"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ArtifactError(f"{path} is not a manifest: {error}", next_step="build the artifact again") from error
    if schema != SCHEMA:
        built = content.get("narrowcast", "an unknown version")
        raise ArtifactError(
            f"{path.parent} has artifact format {schema}, built by narrowcast {built}",
            allowed=f"format {SCHEMA}",
            next_step=f"build it again with this version, or read it with narrowcast {built}",
        )
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(
            f"{path} is not a valid manifest: {place}: {first['msg']}", next_step="build it again"
        ) from error


def hash_problems(folder: Path, manifest: Manifest) -> list[str]:
    """Return what differs between an artifact's files and its manifest, a sentence each."""
    problems: list[str] = []
    for name, expected in sorted(manifest.files.items()):
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            problems.append(f"file name {name!r} leads out of the folder")
        elif not path.is_file():
            problems.append(f"file {name} is missing")
        elif (found := file_sha256(path)) != expected:
            problems.append(f"file {name} has SHA-256 {found[:12]}..., the manifest says {expected[:12]}...")
    return problems
