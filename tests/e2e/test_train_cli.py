"""``narrowcast train`` as a person runs it: the words, the exit codes, a kill, and what the next command takes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import narrowcast as nc
from e2e.command import Cli, strict
from hurry import hurry

EXAMPLES = Path(__file__).parents[2] / "examples"

NET = """
import time
import torch
from torch import nn

class Slow(nn.Sequential):
    def forward(self, x):
        time.sleep({pause})
        return super().forward(x)

def net():
    layers = nn.Flatten(), nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4)
    return Slow(*layers), torch.zeros(2, 1, 4, 4)

def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), torch.zeros(2, 1, 4, 4)
"""
CONFIG = """
network: py:cli_net:net
data: {train: npz:data.npz, augment: {noise: 0.1}}
optimizer: {name: adamw, lr: 1e-2}
batch: 16
epochs: 3
log: 1
device: cpu
threads: 1
checkpoint: 4
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config, a network and data in the current folder."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)
    images = rng.standard_normal((4, 1, 4, 4))[labels] + 0.5 * rng.standard_normal((200, 1, 4, 4))
    np.savez("data.npz", input=images.astype(np.float32), labels=labels)
    Path("small.yaml").write_text(CONFIG)
    Path("cli_net.py").write_text(NET.format(pause=0))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cli_net", raising=False)
    torch.set_num_threads(1)


def told(folder: str) -> list[dict[str, Any]]:
    """Return a log without what depends on the clock."""
    lines = [strict(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "samples_per_s"} for line in lines]


def begun(*arguments: str, ready: Path) -> subprocess.Popen[str]:
    """Start the command in a process of its own, and return when a file is there."""
    command = [sys.executable, "-m", "narrowcast", "train", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not ready.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process


def test_a_newcomer_reads_what_is_trained_what_became_of_it_and_what_comes_next(cli: Cli) -> None:
    done = cli("train", "small.yaml", "--precision", "fp16-mixed")
    assert done.code == 0, done.err
    lines = dict(re.split(r":\s+", line, maxsplit=1) for line in done.out.splitlines())
    assert lines["network"] == "py:cli_net:net, 740 parameters"
    assert lines["data"] == "npz:data.npz: 90 samples to train on, 50 to validate on, 60 to report on"
    assert lines["precision"] == "fp16-mixed on cpu, loss scale 65536, dynamic"
    assert lines["training"] == "3 epochs (15 steps), batches of 16, adamw, seed 0"
    assert lines["folder"] == "runs/small"
    assert lines["trained"].startswith("15 steps in")
    assert re.fullmatch(
        r"top1 [01]\.\d{4} \(95 % interval .*\) on 60 samples of npz:data\.npz that were not trained on",
        lines["report"],
    )
    assert lines["doctor"].startswith("Healthy")
    assert lines["next"].startswith("narrowcast optimize runs/small --data npz:data.npz")
    assert done.err == ""  # no bar without a terminal


def test_json_is_the_result_and_nothing_else(cli: Cli) -> None:
    done = cli("train", "small.yaml", "--json", "--out", "run")
    assert done.code == 0, done.err
    assert strict(done.out) == strict(Path("run/result.json").read_text())


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_a_killed_run_goes_on_with_the_same_losses_bit_for_bit(cli: Cli, precision: str) -> None:
    assert cli("train", "small.yaml", "--out", "whole", "--precision", precision).code == 0
    Path("cli_net.py").write_text(NET.format(pause=0.05))
    process = begun(
        "small.yaml",
        "--out",
        "cut",
        "--precision",
        precision,
        ready=Path("cut/checkpoints/step-00000004/manifest.json"),
    )
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert not Path("cut/result.json").exists()
    done = cli("train", "small.yaml", "--out", "cut", "--precision", precision, "--resume")
    assert done.code == 0, done.err
    assert "going on after step" in done.out
    assert told("cut") == told("whole")
    results = [strict(Path(folder, "result.json").read_text()) for folder in ("cut", "whole")]
    assert results[0]["sha256"] == results[1]["sha256"]
    assert results[0]["report"] == results[1]["report"]


def test_ctrl_c_writes_a_checkpoint_and_ends_with_130(cli: Cli) -> None:
    Path("cli_net.py").write_text(NET.format(pause=0.2))
    process = begun("small.yaml", "--out", "run", "--set", "checkpoint=100", ready=Path("run/log.jsonl"))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert "Traceback" not in out + err
    assert "--resume goes on from the last checkpoint" in " ".join(err.split())
    assert list(Path("run/checkpoints").glob("step-*"))
    Path("cli_net.py").write_text(NET.format(pause=0))
    assert cli("train", "small.yaml", "--out", "run", "--set", "checkpoint=100", "--resume").code == 0


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (["--set", "optimzer.lr=1"], ["'optimzer.lr' is unknown", "did you mean optimizer?"]),
    "wrong value": (["--set", "batch=none"], ["small.yaml: batch = 'none'", "a whole number"]),
    "unknown precision": (["--precision", "fp16-mix"], ["fp16-mix", "did you mean fp16-mixed?"]),
    "refused precision": (["--precision", "fp16-true"], ["is refused", "use fp16-mixed"]),
    "precision of another device": (["--precision", "tf32"], ["tf32 on the CPU", "use fp32"]),
    "no data": (["--set", "data.train=npz:no.npz"], ["no.npz does not exist"]),
    "no space to search": (["--tune", "3"], ["has no section tune", "tune.space"]),
    "below a file": (["--out", "data.npz/run"], ["data.npz/run cannot be written"]),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_answered_in_words_with_code_2(kind: str, cli: Cli) -> None:
    arguments, needles = MISTAKES[kind]
    done = cli("train", "small.yaml", *arguments)
    assert done.code == 2
    assert "Traceback" not in done.err
    for needle in needles:
        assert needle in done.words


def test_an_unknown_key_in_the_file_is_named_with_the_file(cli: Cli) -> None:
    Path("small.yaml").write_text(CONFIG + "precison: fp32\n")
    done = cli("train", "small.yaml")
    assert done.code == 2
    assert "small.yaml: key 'precison' is unknown" in done.words
    assert "did you mean precision?" in done.words


def test_a_search_prints_its_trials_and_the_best(cli: Cli) -> None:
    Path("small.yaml").write_text(CONFIG + "tune: {space: {optimizer.lr: {low: 1e-3, high: 1e-1, log: true}}}\n")
    done = cli("train", "small.yaml", "--tune", "2")
    assert done.code == 0, done.err
    assert "optimizer.lr" in done.out
    assert "written to runs/small/best.yaml" in done.out
    shown = cli("train", "small.yaml", "--tune", "2", "--resume", "--json")
    assert [trial["state"] for trial in strict(shown.out)["trials"]] == ["complete", "complete"]


def test_two_processes_train_what_one_does(cli: Cli) -> None:
    config = CONFIG.replace("cli_net:net", "cli_net:plain").replace(", augment: {noise: 0.1}", "")
    Path("small.yaml").write_text(config + "ranks: sharded\n")
    assert cli("train", "small.yaml", "--out", "one").code == 0
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2", "-m", "narrowcast"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, "train", "small.yaml", "--out", "two"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained:") == 1  # the first process alone prints
    mine, theirs = ([line["loss"] for line in told(folder) if "loss" in line] for folder in ("one", "two"))
    assert theirs == pytest.approx(mine, rel=1e-5)
    assert strict(Path("two/result.json").read_text())["environment"]["processes"] == 2


# What comes next ------------------------------------------------------------------------------------------------------


def test_the_folder_is_a_model_for_every_command(cli: Cli) -> None:
    assert cli("train", EXAMPLES / "digits.yaml", "--out", "run", "--set", "epochs=1").code == 0
    model = nc.load_model("run")
    assert not model.random_weights
    assert str(model.ref) == "run:run"
    profiled = cli("profile", "run", "--json")
    assert strict(profiled.out)["parameters"]["total"] == 63_346


@pytest.mark.slow
def test_what_was_trained_goes_straight_into_optimize(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch.setattr)
    assert cli("train", EXAMPLES / "digits.yaml", "--out", "run", "--set", "epochs=4").code == 0
    done = cli("optimize", "run", "--data", "bundled:digits", "--max-drop", "2pt", "--minimise", "size", "--out", "out",
               "--json")  # fmt: skip
    assert done.code == 0, done.err
    shown = json.loads(done.out)
    assert shown["chosen"] != "fp32"
    found = {(m["measure"], m["subject"]): m["value"] for m in shown["measurements"]}
    assert found["accuracy", "original"] > 0.9
