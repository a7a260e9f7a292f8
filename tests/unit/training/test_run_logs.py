"""The log of a run: whole lines, and only those that hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from narrowcast.errors import OutputError, RuntimeMissingError
from narrowcast.training import logs
from narrowcast.training.logs import RunLog, keep_lines, read_log


def test_each_line_is_json_with_its_step(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.write(1, {"loss": 0.5, "grad_norm": None})
        log.write(2, {"validation": {"metric": "top1", "value": 0.25}})
        assert log.lines == 2
    assert read_log(tmp_path) == [
        {"step": 1, "loss": 0.5, "grad_norm": None},
        {"step": 2, "validation": {"metric": "top1", "value": 0.25}},
    ]


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_numbers_that_json_has_not_are_texts(tmp_path: Path, number: float) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.write(1, {"loss": number, "part": {"value": number}})
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=lambda _: pytest.fail("no JSON"))["part"]["value"] == str(number)


def test_a_line_is_on_the_disk_when_it_is_written(tmp_path: Path) -> None:
    log = RunLog(tmp_path, tensorboard=False)
    log.write(1, {"loss": 1.0})
    assert len(read_log(tmp_path)) == 1
    log.__exit__(None, None, None)


@pytest.mark.parametrize(("lines", "left"), [(0, 0), (2, 2), (3, 3), (9, 3)])
def test_lines_after_the_checkpoint_go_and_torn_ones_too(tmp_path: Path, lines: int, left: int) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    keep_lines(path, lines)
    assert [line["step"] for line in read_log(tmp_path)] == list(range(1, left + 1))
    assert path.read_text().endswith("\n") or not left


def test_a_log_goes_on_after_the_lines_that_hold(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    with RunLog(tmp_path, tensorboard=False, lines=1) as log:
        log.write(2, {"loss": 1.0})
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"gone/log\.jsonl cannot be written"):
        RunLog(tmp_path / "gone", tensorboard=False)


def test_tensorboard_that_is_missing_is_named_with_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(logs.importlib, "import_module", missing)
    with pytest.raises(RuntimeMissingError, match="TensorBoard") as caught:
        RunLog(tmp_path, tensorboard=True)
    assert "narrowcast[train]" in caught.value.next_step
