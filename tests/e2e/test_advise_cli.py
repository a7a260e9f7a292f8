"""``narrowcast advise`` from end to end."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.command import Cli, strict

MODEL = "torchvision:squeezenet1_1"


@pytest.fixture(autouse=True)
def no_catalogue_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def test_items_have_gain_place_next_step_and_source(cli: Cli) -> None:
    done = cli("advise", MODEL, "--device", "t4")
    assert done.code == 0, done.err
    words = " ".join(done.out.split())
    assert f"{MODEL} on NVIDIA T4" in words
    assert "1x3x224x224 in fp32, run by torch" in words
    assert "1. " in words
    assert "saves " in words
    for label in ("seen", "do", "effort", "but", "source"):
        assert any(line.split()[:1] == [label] for line in done.out.splitlines()), label
    assert "features.1, " in words
    assert "26 places: " in words  # of many operators, a few names
    assert "Gains do not add up" in words
    assert all(len(line.rstrip()) <= 100 for line in done.out.splitlines())


def test_json_has_every_operator_and_the_same_order(cli: Cli) -> None:
    done = cli("advise", MODEL, "--device", "t4", "--json", "--all")
    assert done.code == 0, done.err
    found = strict(done.out)
    assert (found["model"], found["device"], found["precision"]) == (MODEL, "t4", "fp32")
    gains = [item["gain"]["seconds"] for item in found["advice"] if item["gain"]]
    assert gains == sorted(gains, reverse=True)
    assert all(0 < item["gain"]["share"] < 1 for item in found["advice"] if item["gain"])
    elementwise = next(item for item in found["advice"] if item["rule"] == "elementwise")
    assert "features.1" in elementwise["operators"]
    top = strict(cli("advise", MODEL, "--device", "t4", "--json", "--top", "1").out)
    assert top["advice"] == found["advice"][:1]


def test_nothing_to_say_is_said(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "import torch\n\ndef model():\n    return torch.nn.Identity(), torch.zeros(2, 4)\n"
    (tmp_path / "advised_identity.py").write_text(module, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    done = cli("advise", "py:advised_identity:model", "--device", "t4")
    assert done.code == 0, done.err
    assert "No advice" in done.out


def test_what_cannot_be_advised_is_an_error_with_a_next_step(cli: Cli) -> None:
    unknown = cli("advise", MODEL, "--device", "t44")
    assert unknown.code == 2
    assert "'t44' is unknown" in unknown.words
    assert "t4" in unknown.words
    unsupported = cli("advise", MODEL, "--device", "t4", "--precision", "bf16")
    assert unsupported.code == 2
    assert "does not multiply in bf16" in unsupported.words
    assert "fp16" in unsupported.words
    nothing = cli("advise", MODEL, "--device", "t4", "--input", "0x1x8x8")
    assert nothing.code == 2
    assert "an axis of 0" in nothing.words
    without = cli("advise", MODEL, "--device", "rk3588", "--precision", "fp32")
    assert without.code == 2
    assert "int8-static" in without.words


def test_an_accelerator_of_integers_is_advised_for_and_says_what_is_left_out(cli: Cli) -> None:
    found = cli("advise", MODEL, "--device", "rk3588")
    assert found.code == 0
    words = " ".join(found.out.split())
    assert "in int8-static, run by compiled" in words
    assert "Nobody states the memory bandwidth of Rockchip RK3588, its NPU" in words
