"""``narrowcast profile`` from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from e2e.command import Cli, strict
from narrowcast.accounting.policies import POLICIES

MODEL = "bundled:digits-cnn"
GPT2 = {"model_type": "gpt2", "n_embd": 48, "n_layer": 3, "n_head": 4, "vocab_size": 100, "n_positions": 64}


@pytest.fixture
def gpt2(tmp_path: Path) -> str:
    """A folder with the configuration of a small GPT-2."""
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(GPT2 | {"architectures": ["GPT2LMHeadModel"]}))
    return f"hf:{folder}"


def record(cli: Cli, *arguments: object) -> dict[str, Any]:
    done = cli("profile", *arguments, "--json")
    assert done.code == 0, done.err
    return strict(done.out)


def test_one_value_of_json_says_everything(cli: Cli, gpt2: str) -> None:
    found = record(
        cli, gpt2, "--tokens", "16", "--mode", "train", "--optimizer", "adamw", "--device", "h100-sxm",
        "--precision", "bf16-mixed",
    )  # fmt: skip
    width, layers, words = GPT2["n_embd"], GPT2["n_layer"], GPT2["vocab_size"]
    block = 12 * width * width + 13 * width
    assert found["parameters"]["total"] == layers * block + (words + GPT2["n_positions"] + 2) * width
    assert found["flops"] == 2 * found["macs"]
    assert (found["mode"], found["precision"], found["device"]) == ("train", "bf16-mixed", "h100-sxm")
    memory = found["memory"]
    assert memory["optimizer_state"] >= 2 * 4 * found["parameters"]["total"]
    parts = ("data", "weights", "master", "gradients", "optimizer_state", "activations", "temporary", "kv_cache",
             "communication", "workspace")  # fmt: skip
    assert memory["peak"] == sum(memory[part] for part in parts)
    estimate = found["estimate"]
    assert 0 < estimate["floor"] <= estimate["low"] <= estimate["seconds"] <= estimate["high"]
    assert found["report"] is None
    # Keys and values of every layer, two bytes each.
    assert found["kv_cache"]["bytes_per_token"] == layers * 2 * width * 2
    assert found["attention"]["causal_macs"] < found["attention"]["macs"]


def test_what_was_not_asked_for_is_null(cli: Cli) -> None:
    found = record(cli, MODEL)
    assert found["estimate"] is None
    assert found["device"] is None
    assert found["kv_cache"] is None
    assert found["memory"]["peak"] > found["static_bytes"]


def test_packages_that_counting_never_calls_stay_unimported_and_the_process_ends_at_once(gpt2: str) -> None:
    code = (
        "import atexit, os, sys, narrowcast.cli.app as app\n"
        f"sys.argv = ['narrowcast', 'profile', {gpt2!r}, '--tokens', '8', '--json']\n"
        "leave = app.leave_at_once\n"
        "def look(status):\n"
        "    idle = ['torchao', 'scipy', 'torchvision']\n"
        "    print(status, [name for name in idle if name in sys.modules], file=sys.stderr)\n"
        "    import scipy\n"
        "    leave(status)\n"
        "app.leave_at_once = look\n"
        "atexit.register(print, 'taken apart', file=sys.stderr)\n"
        "app.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert strict(done.stdout)["parameters"]["total"] > 0
    assert done.stderr.splitlines()[-1] == "0 []"


@pytest.mark.parametrize("columns", [80, 120])
def test_the_terminal_shows_numbers_tree_and_operators(cli: Cli, gpt2: str, columns: int) -> None:
    done = cli("profile", gpt2, "--device", "t4", "--precision", "fp16", "--operators", "--top", "5")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= columns
    assert "\x1b" not in done.out
    (folded,) = [line for line in lines if "3 × GPT2Block" in line]
    assert folded.strip().startswith("│ ├ h.0-2")
    assert sum("GPT2Block" in line for line in lines) == 1
    first = next(place for place, line in enumerate(lines) if line.strip().startswith("operator "))
    assert [bool(line.strip()) for line in lines[first + 2 : first + 8]] == [True] * 5 + [False]
    for words in ("memory at the peak", "tokens kept", "peak memory", "Tied, counted once", "time"):
        assert words in done.out


def test_the_largest_batch_fits_and_one_more_does_not(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "narrowcast").mkdir()
    (tmp_path / "narrowcast" / "devices.toml").write_text(
        """[[device]]
name = "tiny"
title = "A tiny processor"
vendor = "nobody"
kind = "cpu"
architecture = "none"
year = 2026
formats = ["fp32"]
source = "made up for a test"
memory = { size_gb = 0.002, stated_gbs = 10.0 }
peaks = [{ dtype = "fp32", unit = "vector", tflops = 0.1 }]
""",
        encoding="utf-8",
    )
    arguments = (MODEL, "--device", "tiny", "--input", "1x1x8x8")
    most = record(cli, *arguments, "--largest-batch")["largest_batch"]
    size = round(0.002 * 2**30)
    peaks = [
        record(cli, MODEL, "--device", "tiny", "--input", f"{batch}x1x8x8")["memory"]["peak"]
        for batch in (most, most + 1)
    ]
    assert peaks[0] <= size < peaks[1]


def test_depth_limits_the_tree(cli: Cli, gpt2: str) -> None:
    deep, flat = (cli("profile", gpt2, "--depth", str(depth)).out for depth in (5, 0))
    assert "c_attn" in deep
    assert "transformer  GPT2Model" not in flat


def test_a_graph_is_counted_without_modules(cli: Cli, tmp_path: Path) -> None:
    weights = {"w": np.zeros((8, 3, 3, 3), np.float32), "v": np.zeros((288, 5), np.float32)}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
            helper.make_node("Relu", ["c"], ["r"], name="relu"),
            helper.make_node("Flatten", ["r"], ["f"], name="flatten"),
            helper.make_node("MatMul", ["f", "v"], ["y"], name="product"),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    file = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), file)
    found = record(cli, file, "--device", "t4", "--html", tmp_path / "m.html")
    assert found["macs"] == 8 * 27 * 36 + 288 * 5
    assert found["memory"] is None
    assert found["estimate"]["seconds"] > 0
    done = cli("profile", file, "--depth", "2")
    assert done.code == 0, done.err
    assert "Conv  convolution" in done.out
    assert "MatMul  matrix product" in done.out
    refused = cli("profile", file, "--mode", "train")
    assert refused.code == 2
    assert "no backward" in refused.words


def test_two_models_side_by_side(cli: Cli, gpt2: str, tmp_path: Path) -> None:
    page = tmp_path / "two.html"
    found = record(cli, MODEL, "--compare", gpt2, "--html", page)
    first, second = found["models"]
    difference = found["differences"]["parameters"]
    assert difference["difference"] == second["parameters"]["total"] - first["parameters"]["total"]
    assert difference["ratio"] == second["parameters"]["total"] / first["parameters"]["total"]
    assert found["report"] == str(page)
    assert "Side by side" in page.read_text(encoding="utf-8")
    done = cli("profile", MODEL, "--compare", gpt2)
    assert done.code == 0, done.err
    assert "difference" in done.out
    assert "ratio" in done.out


def test_the_report_is_written_whole_or_not_at_all(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "p.html"
    done = cli("profile", MODEL, "--device", "t4", "--html", page)
    assert done.code == 0, done.err
    assert f"report: {page}" in done.out
    whole = page.read_text(encoding="utf-8")
    assert whole.rstrip().endswith("</html>")
    again = cli("profile", MODEL, "--html", page)
    assert again.code == 2
    assert "already exists" in again.words

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    assert cli("profile", MODEL, "--html", page, "--force").code == 130
    monkeypatch.undo()
    assert page.read_text(encoding="utf-8") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["p.html"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([MODEL, "--device", "h10"], "nearest: h100-sxm"),
        ([MODEL, "--precision", "bf17"], "precision 'bf17' is unknown"),
        ([MODEL, "--mode", "train", "--optimizer", "adamx"], "optimizer 'adamx' is unknown"),
        ([MODEL, "--mode", "train", "--sharding", "zero4", "--devices", "2"], "did you mean zero"),
        ([MODEL, "--mode", "train", "--sharding", "zero2"], "say how many: --devices"),
        ([MODEL, "--tokens", "64"], "tokens = 64 for bundled:digits-cnn"),
        ([MODEL, "--input", "1x1x8x8", "--batch", "2"], "batch = 2 beside input 1x1x8x8"),
        ([MODEL, "--input", "0x1x8x8"], "an axis of 0"),
        ([MODEL, "--mode", "train", "--precision", "nf4"], "nobody trains in nf4"),
        ([MODEL, "--mode", "train", "--checkpoint", "nothing*"], "fits no module"),
        ([MODEL, "--optimizer", "sgd", "--accumulate", "4"], "--optimizer, --accumulate: an inference has none"),
        ([MODEL, "--device", "k80", "--precision", "bf16"], "does not multiply in bf16"),
        ([MODEL, "--largest-batch"], "without a device"),
        ([MODEL, "--html", "."], "is a folder"),
        ([MODEL, "--html", "no/such/p.html"], "no such folder"),
        (["bundled:nothing"], "no bundled model"),
        ([MODEL, "--compare", "nowhere.onnx"], "nowhere.onnx"),
        ([MODEL, "--input", "1x7x8x8"], "the inputs do not fit at layer"),
    ],
)
def test_mistakes_are_named(cli: Cli, arguments: list[str], says: str) -> None:
    done = cli("profile", *arguments)
    assert done.code == 2
    assert says in done.words
    assert "Traceback" not in done.err
    failed = cli("profile", *arguments, "--json")
    assert failed.code == 2
    assert set(strict(failed.out)) == {"error"}


def test_help_names_every_precision(cli: Cli) -> None:
    words = "".join(cli("profile", "--help").out.replace("│", "").split())
    assert all(name in words for name in POLICIES)
