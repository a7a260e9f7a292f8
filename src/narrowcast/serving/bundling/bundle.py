"""A folder that runs an artifact with its runtime and NumPy alone: no narrowcast, no network, nothing to build.

The content depends on the artifact alone, down to the times of the files, so two bundles of one artifact are the same.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

from narrowcast.artifacts.store import MANIFEST, Artifact, load_artifact, publish
from narrowcast.data.loaders import read_npz
from narrowcast.errors import ConfigError, OutputError, RuntimeFailedError, choices
from narrowcast.measure.environment import versions_of
from narrowcast.runtimes import get_runtime
from narrowcast.serving.text_templates import render_text

__all__ = ["RUNNER", "Bundle", "write_bundle"]

ARTIFACT = "artifact"
RUNNER = "run.py"
REQUIREMENTS = "requirements.txt"
#: Runtimes that a runner is known for, as people call them.
_TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_CHECK_SECONDS = 600


@dataclass(frozen=True)
class Bundle:
    """A bundle that was written and checked.

    Attributes:
        folder: Where it is.
        bytes: All its files together.
        requirements: What ``requirements.txt`` pins.
        checked: What its own check said on this machine.
        notes: Where the versions here are not those that it pins.
    """

    folder: Path
    bytes: int
    requirements: tuple[str, ...]
    checked: tuple[str, ...]
    notes: tuple[str, ...]


def write_bundle(artifact: str | Path, out: Path, *, force: bool = False) -> Bundle:
    """Write a bundle, and let its runner compare the outputs here with those that the artifact stores.

    Args:
        artifact: Folder of the artifact; every hash is checked.
        out: Folder of the bundle; it is there whole or not at all.
        force: Whether to replace a bundle that is there.

    Raises:
        ArtifactError: The folder is no artifact, or damaged.
        ConfigError: No runner is known for its runtime.
        OutputError: The bundle cannot be written, or its place is taken.
        RuntimeMissingError: The runtime is not installed here, so that the bundle cannot be checked.
        RuntimeFailedError: The outputs here are not those that the artifact stores.
    """
    loaded = load_artifact(artifact)
    runtime = loaded.manifest.target.runtime
    if runtime not in _TITLES:
        raise ConfigError(f"no runner is known for the runtime {runtime!r}", allowed=choices(runtime, _TITLES))
    get_runtime(runtime).version()
    _check_place(out, force)
    pinned = _pinned(loaded)
    built = Path(mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    try:
        _fill(built, loaded, pinned)
        checked = _check(built)
        size = sum(path.stat().st_size for path in built.rglob("*") if path.is_file())
        publish(built, out.absolute())
    except OSError as error:
        raise OutputError(
            f"bundle {out} cannot be written: {error.strerror}", next_step="name another folder"
        ) from error
    finally:
        shutil.rmtree(built, ignore_errors=True)
    here = versions_of(pinned)
    notes = tuple(
        f"{name}: checked with {here[name]}, pinned to {version}, with which it was measured"
        for name, version in pinned.items()
        if here[name] != version
    )
    return Bundle(out, size, _requirements(pinned), checked, notes)


def _check_place(out: Path, force: bool) -> None:
    """Make sure that a bundle can be written; only a bundle is ever replaced."""
    if out.exists():
        if not (out / RUNNER).is_file() or not (out / ARTIFACT / MANIFEST).is_file():
            raise OutputError(f"output {out} exists and is no bundle", allowed="a folder that does not exist yet")
        if not force:
            raise OutputError(
                f"output {out} already holds a bundle",
                allowed="a folder that does not exist yet",
                next_step="name another folder, or replace the bundle with --force",
            )
    if not os.access(out.absolute().parent, os.W_OK):
        raise OutputError(
            f"output {out} cannot be written: no such folder, or no permission in {out.absolute().parent}",
            next_step="name another folder",
        )


def _pinned(artifact: Artifact) -> dict[str, str]:
    """Return the versions that the artifact was measured with; of what it does not say, those that are here."""
    names = ("numpy", artifact.manifest.target.runtime)
    measured = artifact.manifest.environment.versions
    return versions_of(names) | {name: measured[name] for name in names if name in measured}


def _requirements(pinned: dict[str, str]) -> tuple[str, ...]:
    return tuple(f"{name}=={version}" for name, version in sorted(pinned.items()))


def _fill(folder: Path, artifact: Artifact, pinned: dict[str, str]) -> None:
    """Write all files; their modes and times are the same every time."""
    manifest = artifact.manifest
    for name in (*manifest.files, MANIFEST):
        place = folder / ARTIFACT / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact.folder / name, place)
    runtime = manifest.target.runtime
    values = {
        "manifest": manifest,
        "python": manifest.environment.versions.get("python", sys.version.split()[0]),
        "runtime": runtime,
        "tensors": _tensors(artifact),
        "title": _TITLES[runtime],
    }
    for name in (RUNNER, "README.md"):
        (folder / name).write_text(render_text(Path(__file__).with_name(f"{name}.j2"), values), encoding="utf-8")
    (folder / REQUIREMENTS).write_text("".join(f"{line}\n" for line in _requirements(pinned)), encoding="utf-8")
    created = datetime.fromisoformat(manifest.created).timestamp()
    for path in sorted((folder, *folder.rglob("*")), reverse=True):
        path.chmod(0o755 if path.is_dir() or path.name == RUNNER else 0o644)
        os.utime(path, (created, created))


def _tensors(artifact: Artifact) -> list[dict[str, str]]:
    sides = {"in": "input", "out": "output"}
    return [
        {"name": name, "side": sides[side], "dtype": str(array.dtype), "shape": str(list(np.shape(array)))}
        for key, array in read_npz(artifact.reference).items()
        for side, _, name in (key.partition(":"),)
    ]


def _check(folder: Path) -> tuple[str, ...]:
    """Let the runner compare its outputs with the stored ones, apart from everything else in this process."""
    command = [sys.executable, "-I", "-B", str(folder / RUNNER), "--check"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CHECK_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeFailedError(f"the bundle's own check took more than {_CHECK_SECONDS} s") from error
    if done.returncode != 0:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise RuntimeFailedError(
            f"the bundle's own check fails: {said[-1] if said else f'exit code {done.returncode}'}",
            next_step="narrowcast verify ARTIFACT says more; an artifact that fails here was built for another processor",
        )
    return tuple(done.stdout.splitlines())
