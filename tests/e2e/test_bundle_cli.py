"""``narrowcast bundle``: a folder that runs an artifact without narrowcast, and is the same every time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from e2e.command import Cli, strict
from narrowcast.artifacts.manifest import Manifest
from narrowcast.artifacts.store import load_artifact, save_artifact
from narrowcast.recipes.target import Target
from narrowcast.runtimes import Runtime

ManifestOf = Callable[..., Manifest]
#: Runs a program as a machine would that has none of these packages.
BARE = """
import runpy, sys
sys.modules |= dict.fromkeys(["narrowcast", "onnx", "pydantic", "torch", "safetensors", "scipy"])
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_bare(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-c", BARE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def build(folder: Path, manifest: Manifest, runtime: Runtime) -> Path:
    """Write an artifact: a linear layer with ReLU, and what the runtime computes with it on four rows."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    weights = numpy_helper.from_array(generator.standard_normal((8, 3), np.float32), "w")
    values = [
        helper.make_tensor_value_info("a b", TensorProto.FLOAT, ["n", 8]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3]),
    ]
    nodes = [helper.make_node("MatMul", ["a b", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    inputs = {"a b": generator.standard_normal((4, 8), np.float32)}
    outputs = runtime.load(folder / "model.onnx").run(inputs)
    arrays = {f"in:{name}": value for name, value in inputs.items()} | {f"out:{n}": v for n, v in outputs.items()}
    np.savez(folder / "reference.npz", **arrays)  # type: ignore[arg-type]
    save_artifact(folder, manifest)
    return folder


@pytest.fixture
def artifact(tmp_path: Path, manifest_of: ManifestOf, runtime: Runtime) -> Path:
    return build(tmp_path / "net", manifest_of(target=Target(runtime=runtime.name, threads=2)), runtime)


def content(folder: Path) -> dict[str, tuple[int, float, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mode, path.stat().st_mtime, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_bundle_runs_without_narrowcast_and_gives_what_the_artifact_stores(
    artifact: Path, tmp_path: Path, cli: Cli, runtime: Runtime
) -> None:
    out = tmp_path / "edge"
    said = strict(cli("bundle", artifact, "--out", out, "--json").out)
    assert said["requirements"] == sorted(
        [f"numpy=={np.__version__}", f"{runtime.name}=={said_version(artifact, runtime)}"]
    )
    assert said["notes"] == []
    assert said["bytes"] == sum(len(data) for _, _, data in content(out).values())
    assert (out / "requirements.txt").read_text().split() == said["requirements"]
    reference = np.load(artifact / "reference.npz")
    np.savez(tmp_path / "in.npz", **{"a b": reference["in:a b"]})
    done = run_bare(out / "run.py", tmp_path / "in.npz", tmp_path / "out.npz")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    outputs = np.load(tmp_path / "out.npz")
    assert outputs.files == ["y"]
    accepted = load_artifact(artifact).manifest.parity * float(np.abs(reference["out:y"]).max())
    np.testing.assert_allclose(outputs["y"], reference["out:y"], rtol=0, atol=accepted)
    assert run_bare(out / "run.py", "--check").stdout.splitlines() == said["checked"]
    assert len((out / "run.py").read_text().splitlines()) < 60


def said_version(artifact: Path, runtime: Runtime) -> str:
    return load_artifact(artifact).manifest.environment.versions[runtime.name]


def test_two_bundles_are_the_same_and_hold_what_the_artifact_names_alone(
    artifact: Path, tmp_path: Path, cli: Cli
) -> None:
    (artifact / "notes.txt").write_text("not part of the artifact")
    assert cli("bundle", artifact, "--out", tmp_path / "one").code == 0
    assert cli("bundle", artifact, "--out", tmp_path / "two").code == 0
    first = content(tmp_path / "one")
    assert first == content(tmp_path / "two")
    assert sorted(first) == [
        "README.md",
        *(f"artifact/{name}" for name in ("manifest.json", "model.onnx", "reference.npz")),
        *("requirements.txt", "run.py"),
    ]
    readme = (tmp_path / "one" / "README.md").read_text()
    assert "| `a b` | input | float32 | [4, 8] |" in readme
    assert "2 threads" in readme


def test_the_runner_notices_damage_and_other_outputs(artifact: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "edge"
    assert cli("bundle", artifact, "--out", out).code == 0
    assert run_bare(out / "run.py", "too", "many", "words").returncode == 1
    reference = dict(np.load(artifact / "reference.npz"))
    np.savez(out / "artifact" / "reference.npz", **reference | {"out:y": reference["out:y"] * 1.01})  # type: ignore[arg-type]
    damaged = run_bare(out / "run.py", "--check")
    assert damaged.returncode == 1
    assert "reference.npz is damaged" in damaged.stderr
    save_artifact(out / "artifact", load_artifact(artifact).manifest)
    differs = run_bare(out / "run.py", "--check")
    assert differs.returncode == 1
    assert "differs by 0.0099 of its largest value" in differs.stdout


def test_a_bundle_that_does_not_compute_the_stored_outputs_is_not_written(
    artifact: Path, tmp_path: Path, cli: Cli
) -> None:
    reference = dict(np.load(artifact / "reference.npz"))
    np.savez(artifact / "reference.npz", **reference | {"out:y": reference["out:y"] + 1})  # type: ignore[arg-type]
    save_artifact(artifact, load_artifact(artifact, check=False).manifest)
    done = cli("bundle", artifact, "--out", tmp_path / "edge")
    assert done.code == 2
    assert "the bundle's own check fails: output y differs" in done.words
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_a_place_that_is_taken_is_refused_and_only_bundles_are_replaced(
    artifact: Path, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "edge"
    assert cli("bundle", artifact, "--out", out).code == 0
    (out / "run.py").write_text("changed")
    again = cli("bundle", artifact, "--out", out)
    assert again.code == 2
    assert "already holds a bundle" in again.words
    assert cli("bundle", artifact, "--out", out, "--force").code == 0
    assert "changed" not in (out / "run.py").read_text()
    (tmp_path / "mine").mkdir()
    for force in ((), ("--force",)):
        refused = cli("bundle", artifact, "--out", tmp_path / "mine", *force)
        assert refused.code == 2
        assert "is no bundle" in refused.words
    nowhere = cli("bundle", artifact, "--out", tmp_path / "no" / "where")
    assert nowhere.code == 2
    assert "no such folder" in nowhere.words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edge", "mine", "net"]


def test_versions_that_differ_here_are_told(
    tmp_path: Path, manifest_of: ManifestOf, cli: Cli, runtime: Runtime
) -> None:
    manifest = manifest_of(target=Target(runtime=runtime.name))
    environment = manifest.environment.model_copy(update={"versions": {"numpy": "1.99.0"}})
    artifact = build(tmp_path / "net", manifest.model_copy(update={"environment": environment}), runtime)
    said = json.loads(cli("bundle", artifact, "--out", tmp_path / "edge", "--json").out)
    assert said["notes"] == [f"numpy: checked with {np.__version__}, pinned to 1.99.0, with which it was measured"]
    assert "numpy==1.99.0" in said["requirements"]


def test_what_is_no_artifact_and_what_no_runner_is_known_for_is_refused(
    tmp_path: Path, manifest_of: ManifestOf, cli: Cli, runtime: Runtime
) -> None:
    done = cli("bundle", tmp_path, "--out", tmp_path / "edge")
    assert done.code == 2
    assert "is no artifact" in done.words
    artifact = build(tmp_path / "net", manifest_of(target=Target(runtime="openvin")), runtime)
    done = cli("bundle", artifact, "--out", tmp_path / "edge")
    assert done.code == 2
    assert "no runner is known for the runtime 'openvin'" in done.words
    assert "did you mean openvino?" in done.words
