"""``narrowcast doctor``: what is printed, what is written, and what is said of mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from e2e.command import Cli, strict
from unit.report.doctor_runs import LAYERS, STEPS, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def test_the_verdict_comes_first_then_the_cause_and_what_mends_it(cli: Cli, run: Path):
    found = cli("doctor", run)
    assert found.code == 0
    lines = found.out.splitlines()
    assert lines[0] == "✗ Overflow to infinity in blocks.1.mlp.up, forward, aten.addmm, at step 118"
    assert "blocks.1.mlp.up overflows FP16 in the forward pass from step 118 on" in lines[1]
    assert "61% of the gradients of stem.conv become zero." in lines[2]
    told = found.out[: found.out.index("layer, as fp16")]
    assert "Step 118: Overflow to infinity in blocks.1.mlp.up, forward, aten.addmm" in told
    assert told.index("✓ keep layer 'blocks.1.mlp.up' in fp32") < told.index("✗ halve the loss scale")
    for layer in LAYERS:
        assert layer in found.out
    assert "Recommended loss scale: 2¹⁴" in found.out
    assert found.out.index("non-finite") < found.out.index("back-off, normal")
    assert cli("doctor", write_run(run.parent / "sound", healthy=True)).out.startswith(
        "✓ All numbers fit their formats"
    )


def test_what_if_is_asked_by_format(cli: Cli, run: Path):
    found = cli("doctor", run, "--format", "e5m2")
    assert "layer, as e5m2" in found.out
    assert "layer, as e5m2" not in cli("doctor", run).out
    value = strict(cli("doctor", run, "--format", "fp8e4m3", "--format", "bf16", "--json").out)
    assert value["formats"] == ["e4m3fn", "bf16", "fp16", "e5m2"]


def test_programs_get_the_same_values(cli: Cli, run: Path):
    value = strict(cli("doctor", run, "--json").out)
    assert value["healthy"] is False
    assert value["steps"] == STEPS
    assert value["skips"] == [{"step": 118, "layers": ["blocks.1.mlp.up.weight"], "kind": "inf", "scale": 65536.0}]
    cause = value["events"][0]["cause"]
    assert (cause["step"], cause["layer"], cause["part"], cause["operator"]) == (
        118,
        LAYERS[4],
        "forward",
        "aten.addmm",
    )
    assert [remedy["mended"] for remedy in cause["remedies"]] == [True, True, False]
    layer = next(one for one in value["layers"] if one["name"] == LAYERS[4])
    forward = layer["parts"]["forward"]
    low, high = forward["formats"]["e4m3fn"]["plain"]["overflow"]
    assert 0.2 < low <= high < 0.6
    assert forward["largest"] > 65504
    assert value["advice"]["scale"]["scale"] == 2.0**14


@pytest.mark.parametrize("columns", [60, 200])
def test_terminals_of_any_width_are_served(cli: Cli, run: Path, columns: int):
    found = cli("doctor", run)
    assert found.code == 0
    assert max(map(len, found.out.splitlines())) <= columns
    assert "overflow" in found.out


def test_a_page_is_written_whole_and_only_over_others_on_request(cli: Cli, run: Path, tmp_path: Path):
    page = tmp_path / "numbers.html"
    assert "report:" in cli("doctor", run, "--html", page).out
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")
    again = cli("doctor", run, "--html", page)
    assert again.code == 2
    assert "--force" in again.words
    assert cli("doctor", run, "--html", page, "--force", "--json").code == 0
    assert cli("doctor", run, "--html", tmp_path / "no" / "such.html").code == 2


def test_tensorboard_files_are_written(cli: Cli, run: Path, tmp_path: Path):
    pytest.importorskip("tensorboard")
    found = cli("doctor", run, "--tensorboard", tmp_path / "board")
    assert found.code == 0
    assert list((tmp_path / "board").glob("events.out.tfevents.*"))


def test_mistakes_are_told_with_what_to_do(cli: Cli, run: Path, tmp_path: Path):
    missing = cli("doctor", tmp_path / "nowhere")
    assert missing.code == 2
    assert "does not exist" in missing.words
    assert "narrowcast train" in missing.words
    (tmp_path / "empty").mkdir()
    empty = cli("doctor", tmp_path / "empty")
    assert empty.code == 2
    assert "no record of the numerics doctor" in empty.words
    assert "train with the doctor on" in empty.words
    unknown = cli("doctor", run, "--format", "e5m22")
    assert unknown.code == 2
    assert "e5m2" in unknown.words
    assert "narrowcast" not in cli("doctor", run, "--format", "mxfp4").out
    as_json = strict(cli("doctor", tmp_path / "empty", "--json").out)
    assert as_json["error"]["type"] == "ArtifactError"


def test_a_run_that_was_killed_in_a_line_is_read_with_a_note(cli: Cli, run: Path):
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 2')
    with (run / "doctor" / "record.jsonl").open("a") as file:
        file.write('{"type": "reading", "st')
    found = cli("doctor", run)
    assert found.code == 0
    assert found.out.count("the last line is cut off") == 2


def test_a_record_that_is_damaged_inside_is_refused(cli: Cli, run: Path):
    record = run / "doctor" / "record.jsonl"
    lines = record.read_text().splitlines()
    record.write_text("\n".join([*lines[:5], "{", *lines[5:]]) + "\n")
    found = cli("doctor", run)
    assert found.code == 2
    assert "damaged at line 6" in found.words


def test_it_prints_without_torch(run: Path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from narrowcast.cli import main\n"
        f"sys.argv = ['narrowcast', 'doctor', {str(run)!r}]\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "blocks.1.mlp.up overflows" in done.stdout
