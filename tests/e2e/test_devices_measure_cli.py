"""``narrowcast devices --measure`` from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from e2e.command import Cli


@pytest.fixture(autouse=True)
def no_catalogue_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def test_a_machine_that_is_not_measured_yet_says_how(cli: Cli) -> None:
    done = cli("devices", "auto")
    assert done.code == 2
    assert "narrowcast devices --measure cpu" in done.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device to measure")
def test_a_gpu_that_is_not_there_is_an_error(cli: Cli) -> None:
    done = cli("devices", "--measure", "cuda")
    assert done.code == 2
    assert "CUDA" in done.err


@pytest.mark.exhaustive
def test_a_measured_machine_is_a_device_of_the_catalogue(cli: Cli) -> None:
    done = cli("devices", "--measure", "cpu", "--threads", "1", "--json")
    assert done.code == 0, done.err
    measured = json.loads(done.out)
    assert Path(measured["catalogue"]).is_file()
    card = cli("devices", "auto")
    assert card.code == 0, card.err
    assert "1 threads" in card.out
    assert json.loads(cli("devices", "auto", "--json").out)["device"] == measured["device"]
