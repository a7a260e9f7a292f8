from __future__ import annotations

import math
from pathlib import Path

import pytest

from narrowcast.artifacts.manifest import Blame, Candidate
from narrowcast.errors import OutputError
from narrowcast.recipes.plan import Plan
from narrowcast.recipes.recipe import Recipe, StaticInt8
from narrowcast.recipes.target import Target
from narrowcast.search.mixed import Diagnosis, FloatStep
from narrowcast.search.workspace import Finished, Workspace

DIAGNOSIS = Diagnosis(
    blame=(
        Blame(group="a", op_type="Conv", noise=math.inf, seconds=0.2),
        Blame(group="b", op_type="Add", noise=0.1, seconds=0.0),
    ),
    path=(
        FloatStep(keep=(), noise=math.inf, seconds=1e-3),
        FloatStep(keep=("a",), noise=1 / 3, seconds=2e-3),
        FloatStep(keep=("a", "b"), noise=0.0, seconds=3e-3),
    ),
)
PRINT = {"model": "abc", "seed": 0}


def finished(name: str, **fields: object) -> Finished:
    recipe = Recipe(name=name, steps=(StaticInt8(),))
    return Finished(candidate=Candidate(name=name, recipe=recipe, **fields), plan=Plan(recipe=recipe, target=Target()))


def test_what_was_finished_is_found_again_by_the_same_request(tmp_path: Path) -> None:
    first = Workspace(tmp_path / "out", PRINT)
    assert first.folder == tmp_path / "out.work"
    assert first.resumed == 0
    first.graph("int8").write_bytes(b"graph")
    first.finish(finished("int8", accuracy=0.9))
    first.finish(finished("fp32", failure="refused"))
    assert first.diagnosis is None
    first.diagnosis = DIAGNOSIS
    again = Workspace(tmp_path / "out", dict(reversed(PRINT.items())))
    assert again.resumed == 2
    found = again.find("int8")
    assert found is not None
    assert found.candidate.accuracy == 0.9
    assert again.find("other") is None
    assert again.diagnosis == DIAGNOSIS
    assert again.graph("int8").read_bytes() == b"graph"


@pytest.mark.parametrize("other", [{"model": "abc", "seed": 1}, {"model": "abd", "seed": 0}, {"model": "abc"}])
def test_another_request_starts_afresh(tmp_path: Path, other: dict[str, object]) -> None:
    first = Workspace(tmp_path / "out", PRINT)
    first.graph("int8").write_bytes(b"graph")
    first.finish(finished("int8"))
    first.diagnosis = DIAGNOSIS
    again = Workspace(tmp_path / "out", other)
    assert again.resumed == 0
    assert again.diagnosis is None
    assert not again.graph("int8").exists()


@pytest.mark.parametrize("text", ["", "{", '{"fingerprint": 3}', "[]"])
def test_a_state_that_cannot_be_read_starts_afresh(tmp_path: Path, text: str) -> None:
    first = Workspace(tmp_path / "out", PRINT)
    first.finish(finished("int8"))
    (first.folder / "state.json").write_text(text)
    assert Workspace(tmp_path / "out", PRINT).resumed == 0


def test_a_finished_candidate_whose_graph_is_gone_is_built_again(tmp_path: Path) -> None:
    first = Workspace(tmp_path / "out", PRINT)
    first.graph("int8").write_bytes(b"graph")
    first.finish(finished("int8"))
    first.graph("int8").unlink()
    assert Workspace(tmp_path / "out", PRINT).find("int8") is None


def test_a_finished_candidate_whose_graph_has_changed_is_built_again(tmp_path: Path) -> None:
    """A machine that loses power may have written the state, and only a part of the graph."""
    first = Workspace(tmp_path / "out", PRINT)
    first.graph("int8").write_bytes(b"graph")
    first.finish(finished("int8"))
    assert Workspace(tmp_path / "out", PRINT).find("int8") is not None
    first.graph("int8").write_bytes(b"gra")
    assert Workspace(tmp_path / "out", PRINT).find("int8") is None


def test_files_of_somebody_else_are_never_removed(tmp_path: Path) -> None:
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"out\.work.*holds other files"):
        Workspace(tmp_path / "out", PRINT)
    assert (tmp_path / "out.work" / "thesis.tex").read_text() == "years of work"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        Workspace(tmp_path / "file" / "out", PRINT)


def test_removing_leaves_nothing(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "out", PRINT)
    workspace.fresh("artifact")
    workspace.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_relative_output_folder_works(tmp_path: Path) -> None:
    assert Workspace(Path("out"), PRINT).folder.resolve() == tmp_path / "out.work"


def test_an_error_before_anything_is_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError), Workspace(tmp_path / "out", PRINT):
        raise OutputError("no room")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("error", [OutputError("no room"), KeyboardInterrupt()])
def test_what_is_finished_outlives_errors_and_interruptions(tmp_path: Path, error: BaseException) -> None:
    workspace = Workspace(tmp_path / "out", PRINT)
    workspace.finish(finished("fp32", failure="refused"))
    with pytest.raises(type(error)), workspace:
        raise error
    assert Workspace(tmp_path / "out", PRINT).resumed == 1
