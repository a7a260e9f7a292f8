from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from narrowcast.artifacts.manifest import SCHEMA, Manifest, Measurement
from narrowcast.artifacts.store import (
    Artifact,
    check_output_folder,
    file_sha256,
    load_artifact,
    publish,
    save_artifact,
    write_atomic,
)
from narrowcast.errors import ArtifactError, OutputError


@pytest.fixture
def manifest(manifest_of: Callable[..., Manifest]) -> Manifest:
    return manifest_of()


@pytest.fixture
def artifact(tmp_path: Path, manifest: Manifest) -> Path:
    folder = tmp_path / "artifact"
    (folder / "extra").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"weights" * 100)
    (folder / "extra" / "notes.txt").write_text("kept")
    save_artifact(folder, manifest)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# Reading --------------------------------------------------------------------------------------------------------------


def test_an_artifact_comes_back_with_a_hash_for_every_file(artifact: Path, manifest: Manifest) -> None:
    loaded = load_artifact(artifact)
    assert isinstance(loaded, Artifact)
    assert loaded.manifest.files.keys() == {"model.onnx", "extra/notes.txt"}
    assert loaded.manifest.files["model.onnx"] == file_sha256(artifact / "model.onnx")
    assert loaded.manifest.model_copy(update={"files": {}}) == manifest
    assert loaded.graph == artifact / "model.onnx"


def test_measurements_that_are_not_finite_survive(tmp_path: Path, manifest_of: Callable[..., Manifest]) -> None:
    infinite = Measurement(measure="accuracy", subject="original", value=float("inf"), unit="dB")
    save_artifact(tmp_path, manifest_of(measurements=(infinite,)))
    assert load_artifact(tmp_path).manifest.measurements[0].value == float("inf")


@pytest.mark.parametrize("name", ["model.onnx", "extra/notes.txt"])
def test_a_changed_file_is_named_with_both_hashes(artifact: Path, name: str) -> None:
    content = bytearray((artifact / name).read_bytes())
    before, content[0] = file_sha256(artifact / name), content[0] ^ 1
    (artifact / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"damaged: file {re.escape(name)} has SHA-256") as caught:
        load_artifact(artifact)
    assert before[:12] in caught.value.what
    assert file_sha256(artifact / name)[:12] in caught.value.what
    assert load_artifact(artifact, check=False).folder == artifact


def test_a_missing_file_is_named(artifact: Path) -> None:
    (artifact / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"file model\.onnx is missing"):
        load_artifact(artifact)


@pytest.mark.parametrize("name", ["../secret.txt", "extra/../../secret.txt", "/etc/hostname"])
def test_a_file_name_that_leads_out_of_the_folder_is_refused(artifact: Path, name: str) -> None:
    secret = artifact.parent / "secret.txt"
    secret.write_text("secret")
    edit(artifact, lambda content: content["files"].update({name: file_sha256(secret)}))
    with pytest.raises(ArtifactError, match="leads out of the folder"):
        load_artifact(artifact)


def test_a_link_that_leads_out_of_the_folder_is_refused(artifact: Path) -> None:
    secret = artifact.parent / "secret.txt"
    secret.write_text("secret")
    (artifact / "link.txt").symlink_to(secret)
    edit(artifact, lambda content: content["files"].update({"link.txt": file_sha256(secret)}))
    with pytest.raises(ArtifactError, match="leads out of the folder"):
        load_artifact(artifact)


@pytest.mark.parametrize("schema", [SCHEMA + 1, 0, "1", None])
def test_another_format_version_is_refused_with_who_built_it(artifact: Path, schema: object) -> None:
    edit(artifact, lambda content: content.update(schema_version=schema, narrowcast="9.9", unheard_of=True))
    with pytest.raises(ArtifactError, match=rf"artifact format {schema}, built by narrowcast 9\.9") as caught:
        load_artifact(artifact)
    assert f"format {SCHEMA}" in caught.value.allowed
    assert "narrowcast 9.9" in caught.value.next_step


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"text"', "{}", '{"narrowcast": "1"}', "\ud800"])
def test_a_file_that_is_no_manifest_is_named(artifact: Path, text: str) -> None:
    (artifact / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ArtifactError, match=r"manifest\.json is not a manifest"):
        load_artifact(artifact)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda content: content.pop("plan"), "plan"),
        (lambda content: content.update(parity="close"), "parity"),
        (lambda content: content["target"].update(threads=0), "target.threads"),
        (lambda content: content.update(surprise=1), "surprise"),
    ],
)
def test_an_entry_that_is_wrong_is_named_by_its_place(artifact: Path, change: Any, place: str) -> None:
    edit(artifact, change)
    with pytest.raises(ArtifactError, match=rf"not a valid manifest: {re.escape(place)}"):
        load_artifact(artifact)


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_is_no_artifact_says_so(tmp_path: Path, there: bool) -> None:
    folder = tmp_path if there else tmp_path / "absent"
    with pytest.raises(ArtifactError, match=r"is no artifact: it has no manifest\.json"):
        load_artifact(folder)


# Writing --------------------------------------------------------------------------------------------------------------


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, "old")

    def stop(self: Path, target: Path) -> None:
        assert path.read_text() == "old"
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_atomic(path, "newer")
    assert path.read_text() == "newer"


def test_publishing_puts_a_folder_in_place(tmp_path: Path) -> None:
    built = tmp_path / "work" / "built"
    built.mkdir(parents=True)
    (built / "manifest.json").write_text("{}")
    publish(built, tmp_path / "deep" / "er" / "out")
    assert (tmp_path / "deep" / "er" / "out" / "manifest.json").is_file()
    assert not built.exists()


def test_publishing_replaces_what_was_there_and_leaves_nothing_behind(tmp_path: Path) -> None:
    out, built = tmp_path / "out", tmp_path / "built"
    out.mkdir()
    built.mkdir()
    (out / "old.txt").write_text("old")
    (built / "new.txt").write_text("new")
    publish(built, out)
    assert [path.name for path in out.iterdir()] == ["new.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_publishing_that_fails_keeps_the_old_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, built = tmp_path / "out", tmp_path / "built"
    out.mkdir()
    built.mkdir()
    (out / "old.txt").write_text("old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self == built:
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="disk full"):
        publish(built, out)
    assert (out / "old.txt").read_text() == "old"


# The output folder ----------------------------------------------------------------------------------------------------


def test_a_new_or_empty_folder_can_be_written_to(tmp_path: Path) -> None:
    check_output_folder(tmp_path / "new" / "er")
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    check_output_folder(tmp_path / "empty")


def test_a_folder_with_an_artifact_is_refused_without_force(artifact: Path) -> None:
    with pytest.raises(OutputError, match="already holds an artifact") as caught:
        check_output_folder(artifact)
    assert "--force" in caught.value.next_step
    check_output_folder(artifact, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_with_other_files_is_refused_even_with_force(tmp_path: Path, force: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="holds files that are no artifact"):
        check_output_folder(tmp_path, force=force)


@pytest.mark.parametrize("force", [False, True])
def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path, force: bool) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="out is a file"):
        check_output_folder(tmp_path / "out", force=force)


@pytest.mark.parametrize("name", ["out", "deep/er/out"])
def test_a_file_above_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        check_output_folder(tmp_path / "file" / name)


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and allowed(path, mode))
    with pytest.raises(OutputError, match=f"no permission in {re.escape(str(tmp_path))}"):
        check_output_folder(tmp_path / "out")
