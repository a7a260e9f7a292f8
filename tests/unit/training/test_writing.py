"""What is said when a run's files cannot be written: the advice fits the cause, whichever file it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from narrowcast.errors import OutputError
from narrowcast.training.doctor.journal import Journal
from narrowcast.training.doctor.values import Reading, Setting
from narrowcast.training.ledger import Ledger, Skip
from narrowcast.training.logs import RunLog
from narrowcast.training.objectives import Result
from narrowcast.training.outcome import Environment, RunResult, write_result, write_weights

FULL = Path("/dev/full")  # a disk without room, as the system has one
SCORE = Result(metric="top1", value=0.5, low=None, high=None, samples=2, higher_is_better=True)
RESULT = RunResult(
    model="py:nets:net",
    arguments={},
    input=None,
    sha256="0" * 64,
    parameters=1,
    precision="fp32",
    seed=0,
    split_seed=0,
    parts={},
    validation=None,
    report=SCORE,
    loss=None,
    steps=1,
    skipped=0,
    seconds=1.0,
    doctor=None,
    environment=Environment(device="cpu", threads=1, processes=1, system="", versions={}),
)
SETTING = Setting(level="cheap", every=50, precision="fp32", compute="fp32", formats=("fp16",), layers=())


def log(folder: Path) -> None:
    with RunLog(folder, tensorboard=False) as opened:
        opened.write(1, {"loss": 1.0})


def ledger(folder: Path) -> None:
    found = Ledger()
    found.write_to(folder / "skips.jsonl")
    found.add(Skip(0, 0, None, (), "inf", 1.0))


WRITERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "log": (log, "log.jsonl"),
    "ledger": (ledger, "skips.jsonl"),
    "result": (lambda folder: write_result(folder, RESULT), ".result.json.partial"),
    "weights": (lambda folder: write_weights(folder, {"one": torch.ones(4)}), ".model.safetensors.partial"),
}


@pytest.mark.skipif(not FULL.is_char_device(), reason="the system has no full device")
@pytest.mark.parametrize("name", ["log", "ledger", "result"])
def test_where_the_disk_is_full_space_helps(name: str, tmp_path: Path) -> None:
    write, file = WRITERS[name]
    (tmp_path / file).symlink_to(FULL)
    with pytest.raises(OutputError, match="cannot be written: No space left on device") as caught:
        write(tmp_path)
    assert caught.value.next_step.startswith("free space or ")


@pytest.mark.parametrize("name", WRITERS)
def test_where_something_else_is_wrong_nobody_is_told_to_free_space(name: str, tmp_path: Path) -> None:
    write, file = WRITERS[name]
    (tmp_path / file).mkdir()
    with pytest.raises(OutputError, match=r"cannot be written: .*[Ii]s a directory") as caught:
        write(tmp_path)
    assert caught.value.next_step
    assert "space" not in caught.value.next_step


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_log_below_a_file_is_named(tensorboard: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"the log .*cannot be written"):
        RunLog(tmp_path / "file", tensorboard=tensorboard)


@pytest.mark.skipif(not FULL.is_char_device(), reason="the system has no full device")
@pytest.mark.parametrize("write", [Journal.save, Journal.write])
def test_the_doctors_record_on_a_full_disk_is_named(write: Callable[[Journal], object], tmp_path: Path) -> None:
    journal = Journal(SETTING, tmp_path, 0)
    (tmp_path / "record.jsonl").unlink()
    (tmp_path / "record.jsonl").symlink_to(FULL)
    journal.keep(Reading(step=0, loss=1.0))
    with pytest.raises(OutputError, match=r"the doctor's record in .* cannot be written: No space left on device"):
        write(journal)


def test_the_doctors_record_below_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"the doctor's record in .* cannot be written"):
        Journal(SETTING, tmp_path / "file" / "doctor", 0)
