"""``narrowcast compare`` from end to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import narrowcast.formats as nf
from e2e.command import Cli, strict
from narrowcast.measure import weights as comparing
from narrowcast.models.bundled import DIGITS_WEIGHTS

DIGITS = str(DIGITS_WEIGHTS)


def test_the_numbers_are_those_of_the_formats(cli: Cli) -> None:
    done = cli("compare", DIGITS, "--formats", "fp16,int8,nf4,nvfp4", "--json")
    assert done.code == 0, done.err
    found = strict(done.out)
    assert [item["name"] for item in found["formats"]] == ["fp16", "int8", "nf4", "nvfp4"]
    assert found["report"] is None
    arrays = load_file(DIGITS)
    assert found["bytes"] == sum(array.nbytes for array in arrays.values())
    tensors = {item["name"]: item for item in found["tensors"]}
    assert set(tensors) == {name for name, array in arrays.items() if array.ndim > 1}
    assert {item["name"] for item in found["left_out"]} == set(arrays) - set(tensors)
    for name, tensor in tensors.items():
        matrix = arrays[name].reshape(len(arrays[name]), -1)
        made = {
            "int8": nf.quantize(matrix, "int8", granularity=nf.PerChannel(0)),
            "nf4": nf.quantize(matrix, "nf4", pad=True),
            "nvfp4": nf.quantize(matrix, "nvfp4", pad=True),
        }
        for format, whole in made.items():
            assert tensor["formats"][format]["sqnr_db"] == pytest.approx(nf.error(matrix, whole).sqnr_db)
            assert tensor["formats"][format]["bytes"] == whole.nbytes
        expected = nf.error(matrix, nf.cast(matrix, "fp16"), "fp16")
        assert tensor["formats"]["fp16"]["max_abs"] == pytest.approx(expected.max_abs)


@pytest.mark.parametrize("columns", [80, 100, 160])
def test_the_terminal_shows_formats_and_the_worst_tensors(
    cli: Cli, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    done = cli("compare", DIGITS, "--top", "3")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= columns
    rows = [line.split()[0] for line in lines if line.strip()]
    assert [row for row in rows if row in nf.names()] == [
        "fp16", "bf16", "e4m3fn", "int8", "int4", "nf4", "mxfp4", "nvfp4",
    ]  # fmt: skip
    assert sum(row.endswith("weight") for row in rows) == 3
    assert "left as they are, 3.54 kB: 6 (int64, no floating-point numbers), 25 (a vector)" in " ".join(
        done.out.split()
    )
    assert "\x1b" not in done.out
    assert ("one FP32 scale per output channel" in done.out) == (columns == 160)
    # Nothing but long names and words is cut.
    assert not any("…" in word for line in lines for word in line.split() if not word.endswith("weight"))


def test_the_report_is_written_whole_or_not_at_all(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "w.html"
    done = cli("compare", DIGITS, "--formats", "int8", "--out", str(page))
    assert done.code == 0, done.err
    assert f"report: {page}" in done.out
    whole = page.read_text(encoding="utf-8")
    assert whole.endswith("</html>\n") or whole.endswith("</html>")
    again = cli("compare", DIGITS, "--formats", "int4", "--out", str(page))
    assert again.code == 2
    assert "already exists" in again.words
    assert page.read_text(encoding="utf-8") == whole
    monkeypatch.setattr(Path, "replace", _interrupted)
    assert cli("compare", DIGITS, "--formats", "int4", "--out", str(page), "--force").code == 130
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert page.read_text(encoding="utf-8") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["w.html"]


def _interrupted(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_during_the_work_leaves_nothing(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "_histogram", _interrupted)
    assert cli("compare", DIGITS, "--formats", "int8", "--out", str(tmp_path / "w.html")).code == 130
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_a_report(cli: Cli, tmp_path: Path) -> None:
    page = tmp_path / "w.html"
    page.write_text("old")
    done = cli("compare", DIGITS, "--formats", "int8", "--out", str(page), "--force", "--json")
    assert strict(done.out)["report"] == str(page)
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere.safetensors"], "nowhere.safetensors does not exist"),
        (["cut.safetensors"], "no complete safetensors file"),
        (["vectors.safetensors"], "no weights to compare"),
        (["nothing"], "names no known source"),
        (["bundled:nothing"], "no bundled model"),
        ([DIGITS, "--formats", "int9"], "unknown number format 'int9'"),
        ([DIGITS, "--formats", ","], "no format to compare"),
        ([DIGITS, "--formats", "e8m0"], "no zero"),
        ([DIGITS, "--range", "widest"], "unknown range 'widest'"),
        ([DIGITS, "--formats", "int8", "--sort", "int4"], "not compared"),
        ([DIGITS, "--out", "."], "is a folder"),
        ([DIGITS, "--out", "no/such/w.html"], "cannot be written"),
    ],
)
def test_what_cannot_be_done_is_a_typed_error(cli: Cli, tmp_path: Path, arguments: list[str], says: str) -> None:
    (tmp_path / "cut.safetensors").write_bytes(Path(DIGITS).read_bytes()[:-1000])
    save_file({"bias": np.ones(4, np.float32)}, tmp_path / "vectors.safetensors")
    before = {path.name for path in tmp_path.iterdir()}
    done = cli("compare", *arguments, "--json")
    assert done.code == 2
    assert says in strict(done.out)["error"]["message"]
    assert {path.name for path in tmp_path.iterdir()} == before


def test_vectors_are_compared_when_asked(cli: Cli, tmp_path: Path) -> None:
    save_file({"bias": np.linspace(-1, 1, 50, dtype=np.float32)}, tmp_path / "m.safetensors")
    found = strict(cli("compare", "m.safetensors", "--all", "--formats", "int8,int4", "--json").out)
    assert [item["name"] for item in found["tensors"]] == ["bias"]
    assert found["tensors"][0]["formats"]["int4"]["bytes"] == 32 + 8  # two blocks of 32, the last filled up


def test_nan_in_a_tensor_is_said_and_stops_nothing(cli: Cli, tmp_path: Path) -> None:
    broken = np.ones((4, 8), np.float32)
    broken[2, 3] = np.nan
    save_file({"w": broken}, tmp_path / "m.safetensors")
    done = cli("compare", "m.safetensors", "--formats", "int8,mxfp4")
    assert done.code == 0, done.err
    assert "w: 1 number is NaN or infinite" in done.out


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["bundled:digits-cnn", "timm:mobilenetv2_050", "torchvision:squeezenet1_0"])
def test_models_are_compared_without_their_export(cli: Cli, reference: str) -> None:
    done = cli("compare", reference, "--formats", "int8,int4", "--top", "2")
    assert done.code == 0, done.err
    assert ("Random weights" in done.out) == (not reference.startswith("bundled"))
    assert "tensors that int4 damages most" in done.out


def test_a_function_of_the_user_gives_a_model(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "their_model.py").write_text(
        "import torch\n\ndef build():\n    return torch.nn.Linear(16, 8), torch.zeros(2, 16)\n"
    )
    found = strict(cli("compare", "py:their_model:build", "--formats", "int8", "--json").out)
    assert [(item["name"], item["shape"]) for item in found["tensors"]] == [("weight", [8, 16])]


def test_the_largest_models_of_the_examples(cli: Cli, tmp_path: Path) -> None:
    page = tmp_path / "w.html"
    found = strict(cli("compare", "bundled:efficientnet-lite0", "--out", str(page), "--json").out)
    assert len(found["tensors"]) == 50
    sqnr = {item["name"]: item["sqnr_db"] for item in found["formats"]}
    # Depthwise filters of 25 numbers: blocks of 32 span them, so the finer block of NVFP4 wins over INT4.
    assert sqnr["fp16"] > sqnr["bf16"] > sqnr["int8"] > sqnr["e4m3fn"] > sqnr["nf4"] > sqnr["int4"] > sqnr["mxfp4"]
    assert page.stat().st_size < 2_000_000
