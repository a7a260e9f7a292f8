from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from contracts.graphs import CASES, Case
from narrowcast.artifacts.manifest import Manifest
from narrowcast.artifacts.store import save_artifact
from narrowcast.errors import ArtifactError, NarrowcastError
from narrowcast.measure.verify import verify_artifact
from narrowcast.recipes.target import Target
from narrowcast.runtimes import Runtime

Make = Callable[..., Path]


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.fixture
def artifact_of(tmp_path: Path, runtime: Runtime, manifest_of: Callable[..., Manifest]) -> Make:
    """Write the artifact of a graph whose stored outputs are off by a share of the largest one."""

    def make(name: str = "several_inputs_and_outputs", off: float = 0.0, **fields: object) -> Path:
        folder, case = tmp_path / "artifact", case_of(name)
        folder.mkdir(exist_ok=True)
        onnx.save(case.model(), folder / "model.onnx")
        feeds = case.feeds(3)
        outputs = runtime.load(folder / "model.onnx").run(feeds)
        arrays = {f"in:{k}": v for k, v in feeds.items()}
        arrays |= {f"out:{k}": v + np.float32(off * np.abs(v).max()) for k, v in outputs.items()}
        np.savez(folder / "reference.npz", **arrays)
        save_artifact(folder, manifest_of(target=Target(runtime=runtime.name), **fields))
        return folder

    return make


def test_an_artifact_that_computes_what_it_computed_passes(artifact_of: Make) -> None:
    checks, differences = verify_artifact(artifact_of())
    assert [check.name for check in checks] == ["files", "load", "parity", "parity", "parity"]
    assert all(check.passed for check in checks)
    assert differences == []


def test_outputs_beyond_the_accepted_difference_fail_by_name(artifact_of: Make) -> None:
    checks, _ = verify_artifact(artifact_of(off=0.01))
    failed = [check for check in checks if not check.passed]
    assert {check.name for check in failed} == {"parity"}
    assert len(failed) == 3
    assert "'scores' differs by at most 0.0" in failed[0].seen


def test_the_manifest_decides_what_is_accepted(artifact_of: Make) -> None:
    checks, _ = verify_artifact(artifact_of(off=0.01, parity=0.03))
    assert all(check.passed for check in checks)


def test_outputs_of_another_shape_fail(artifact_of: Make, manifest_of: Callable[..., Manifest]) -> None:
    folder = artifact_of()
    arrays = dict(np.load(folder / "reference.npz"))
    arrays["out:scores"] = arrays["out:scores"][:2]
    np.savez(folder / "reference.npz", **arrays)
    target = Target(runtime=verify_target(folder))
    save_artifact(folder, manifest_of(target=target))
    checks, _ = verify_artifact(folder)
    failed = [check for check in checks if not check.passed]
    assert [check.seen for check in failed] == ["output 'scores' has shape [3, 20]"]


def verify_target(folder: Path) -> str:
    return Manifest.model_validate_json((folder / "manifest.json").read_bytes()).target.runtime


def test_outputs_that_became_nan_fail(artifact_of: Make, manifest_of: Callable[..., Manifest]) -> None:
    folder = artifact_of("gemm")
    model = onnx.load(folder / "model.onnx")
    bias = next(item for item in model.graph.initializer if item.name == "out.b")
    values = onnx.numpy_helper.to_array(bias).copy()
    values[3] = np.nan
    bias.CopyFrom(onnx.numpy_helper.from_array(values, "out.b"))
    onnx.save(model, folder / "model.onnx")
    save_artifact(folder, manifest_of(target=Target(runtime=verify_target(folder))))
    checks, _ = verify_artifact(folder)
    assert not checks[-1].passed


def test_a_tampered_file_is_no_matter_of_parity(artifact_of: Make) -> None:
    folder = artifact_of()
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ArtifactError, match=r"damaged: file model\.onnx"):
        verify_artifact(folder)


@pytest.mark.parametrize("lost", ["in:left", "out:mask"])
def test_a_reference_that_lacks_an_array_is_a_typed_error(
    artifact_of: Make, manifest_of: Callable[..., Manifest], lost: str
) -> None:
    folder = artifact_of()
    arrays = dict(np.load(folder / "reference.npz"))
    del arrays[lost]
    np.savez(folder / "reference.npz", **arrays)
    save_artifact(folder, manifest_of(target=Target(runtime=verify_target(folder))))
    with pytest.raises(NarrowcastError, match=lost.partition(":")[2]):
        verify_artifact(folder)


def test_an_artifact_without_reference_is_a_typed_error(
    artifact_of: Make, manifest_of: Callable[..., Manifest]
) -> None:
    folder = artifact_of()
    (folder / "reference.npz").unlink()
    save_artifact(folder, manifest_of(target=Target(runtime=verify_target(folder))))
    with pytest.raises(NarrowcastError, match=r"reference\.npz"):
        verify_artifact(folder)


def test_another_machine_and_other_versions_are_told(artifact_of: Make, manifest_of: Callable[..., Manifest]) -> None:
    folder = artifact_of()
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    built = manifest.environment.model_copy(
        update={
            "processor": "Abacus 9000",
            "versions": manifest.environment.versions | {"numpy": "0.1", "vanished": "3.0"},
        }
    )
    save_artifact(folder, manifest.model_copy(update={"environment": built}))
    checks, differences = verify_artifact(folder)
    assert all(check.passed for check in checks)
    assert len(differences) == 3
    assert "Abacus 9000" in differences[0]
    assert "0.1 where it was built" in differences[1]
    assert differences[2] == "vanished: not installed here, 3.0 where it was built"
