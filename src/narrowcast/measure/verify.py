"""Check an artifact: its files, that it loads, and that it still computes what it computed when it was built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from narrowcast.artifacts.store import load_artifact
from narrowcast.data.loaders import read_npz
from narrowcast.errors import ArtifactError
from narrowcast.measure.environment import environment
from narrowcast.runtimes import get_runtime

__all__ = ["Check", "verify_artifact"]


@dataclass(frozen=True)
class Check:
    """One check: its name, whether it passed, and what was seen."""

    name: str
    passed: bool
    seen: str


def verify_artifact(folder: str | Path) -> tuple[list[Check], list[str]]:
    """Return the checks of an artifact, and how this machine and its software differ from where it was built.

    Args:
        folder: The artifact's folder.

    Raises:
        ArtifactError: The folder is no artifact, was built by an incompatible version, or its files changed.
        RuntimeMissingError: Its runtime is not installed.
        RuntimeFailedError: Its runtime refuses it.
    """
    artifact = load_artifact(folder)
    manifest = artifact.manifest
    checks = [Check("files", True, f"{len(manifest.files)} files with the hashes in the manifest")]
    runtime = get_runtime(manifest.target.runtime)
    session = runtime.load(artifact.graph, threads=manifest.target.threads)
    checks.append(Check("load", True, f"{runtime.name} {runtime.version()} loads the graph"))
    arrays = read_npz(artifact.reference)
    feeds = {key[3:]: value for key, value in arrays.items() if key.startswith("in:")}
    outputs = session.run(feeds)
    for name, actual in outputs.items():
        expected = arrays.get(f"out:{name}")
        if expected is None:
            raise ArtifactError(
                f"the reference of {folder} holds no output {name!r}",
                allowed=f"an array {'out:' + name!r}",
                next_step="build the artifact again",
            )
        largest = float(np.abs(expected).max()) if expected.size else 0.0
        same_shape = actual.shape == expected.shape
        worst = float(np.abs(actual.astype(np.float64) - expected).max()) if same_shape and expected.size else 0.0
        passed = same_shape and worst <= manifest.parity * max(largest, 1e-30)
        share = worst / max(largest, 1e-30)
        seen = f"output {name!r} differs by at most {share:.2g} of its largest value (accepted: {manifest.parity:g})"
        checks.append(
            Check("parity", passed, seen if same_shape else f"output {name!r} has shape {list(actual.shape)}")
        )
    return checks, _differences(manifest.environment.model_dump(), environment().model_dump())


def _differences(built: dict[str, object], here: dict[str, object]) -> list[str]:
    found = [
        f"{name}: {here[name]!r} here, {built[name]!r} where it was built"
        for name in ("processor", "instructions", "system")
        if built[name] != here[name]
    ]
    versions = (built["versions"], here["versions"])
    assert isinstance(versions[0], dict)
    assert isinstance(versions[1], dict)
    for name in sorted(versions[0].keys() | versions[1].keys()):
        before, now = versions[0].get(name), versions[1].get(name)
        if before != now and before is not None:
            found.append(f"{name}: {now or 'not installed'} here, {before} where it was built")
    return found
