"""The commands from end to end, on a network of a few thousand weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper
from PIL import Image

import narrowcast
from contracts.graphs import Builder
from e2e.command import Cli, Outcome
from hurry import hurry
from narrowcast.artifacts import load_artifact
from narrowcast.runtimes import get_runtime, runtime_names
from narrowcast.search import optimize as search

CLASSES = 5
TESTS = Path(__file__).parents[1]
LAUNCHER = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs have switched off
from hurry import hurry
from narrowcast.cli import main
from narrowcast.search import trial
hurry()
apply = trial.apply_recipe
def logged(recipe, *rest, **named):
    print(recipe.name, file=open("built.log", "a"))
    if recipe.name == os.environ.get("WAIT_AT"):
        time.sleep(120)  # until the test interrupts it
    return apply(recipe, *rest, **named)
trial.apply_recipe = logged
main()
"""


def network() -> onnx.ModelProto:
    b = Builder(3)
    x = b.clip(b.conv(b.input("image", 3, 8, 8), "stem", (3, 16), 3, 3), "stem.relu6")
    x = b.clip(b.conv(x, "depthwise", (16, 16), 3, 3, group=16), "depthwise.relu6")
    x = b.node("Relu", b.conv(x, "expand", (16, 64), 1, 1), out="expand.relu")
    x = b.node("Flatten", b.node("GlobalAveragePool", x, out="pooled"), out="flat")
    b.gemm(x, "scores", 64, CLASSES)
    return b.model(scores=(CLASSES,))


@dataclass(frozen=True)
class Inputs:
    """A network and data that it is right about."""

    model: Path
    data: Path
    images: np.ndarray
    labels: np.ndarray


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("given")
    onnx.save(network(), folder / "net.onnx")
    images = np.random.default_rng(0).normal(size=(60, 3, 8, 8)).astype(np.float32)
    images *= np.exp(np.random.default_rng(1).normal(size=(60, 3, 1, 1))).astype(np.float32)
    session = ort.InferenceSession(str(folder / "net.onnx"), providers=["CPUExecutionProvider"])
    labels = np.asarray(session.run(None, {"image": images})[0]).argmax(1)
    np.savez(folder / "data.npz", image=images, labels=labels)
    return Inputs(folder / "net.onnx", folder / "data.npz", images, labels)


@pytest.fixture(scope="module", autouse=True)
def _in_a_hurry() -> Iterator[None]:
    """Measure for a moment only; nothing here looks at how long anything took."""
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch.setattr)
        yield


@pytest.fixture
def columns() -> int:
    return 400


@pytest.fixture(scope="module")
def built(given: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """An artifact, and what the command that made it said."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "launch.py").write_text(LAUNCHER)
    out = folder / "out"
    done = launch(folder, "optimize", given.model, "--data", f"npz:{given.data}", "--out", out, "--max-drop", "10pt",
                  "--minimise", "size", "--json")  # fmt: skip
    return out, done


def python_path() -> str:
    return os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))


def launch(folder: Path, *arguments: object) -> Outcome:
    (folder / "launch.py").write_text(LAUNCHER)
    done = subprocess.run(
        [sys.executable, "launch.py", *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "400", "PYTHONPATH": python_path()},
        timeout=300,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def optimize(given: Inputs, *rest: object) -> list[object]:
    return ["optimize", given.model, "--data", f"npz:{given.data}", *rest]


# The main job ---------------------------------------------------------------------------------------------------------


def test_optimize_writes_a_whole_artifact_and_nothing_beside_it(built: tuple[Path, Outcome]) -> None:
    folder, done = built
    assert done.code == 0, done.err
    names = {path.name for path in folder.iterdir()}
    assert names == {"manifest.json", "model.onnx", "reference.npz", "report.html", "report.json"}
    assert {path.name for path in folder.parent.iterdir()} <= {"out", "launch.py", "built.log"}
    manifest = load_artifact(folder).manifest
    assert manifest.files.keys() == names - {"manifest.json"}
    assert manifest.verdict.met
    assert (manifest.data.calibration, manifest.data.search, manifest.data.report) == (27, 15, 18)
    assert manifest.environment.versions["onnxruntime"] == ort.__version__
    assert not manifest.model.random_weights


def test_optimize_with_json_prints_the_report_and_nothing_else(built: tuple[Path, Outcome]) -> None:
    folder, done = built
    shown = json.loads(done.out)
    assert shown == json.loads((folder / "report.json").read_text())
    assert done.err.strip() == ""
    assert shown["verdict"]["met"] is True
    assert {candidate["name"] for candidate in shown["candidates"]} >= {"int8", "int8-weights", "fp16-weights", "fp32"}
    measures = {(item["measure"], item["subject"]) for item in shown["measurements"]}
    assert measures >= {
        (measure, subject)
        for measure in ("accuracy", "size", "latency_p50", "throughput", "peak_memory")
        for subject in ("original", "artifact")
    }


def test_the_report_needs_no_network(built: tuple[Path, Outcome]) -> None:
    page = (built[0] / "report.html").read_text(encoding="utf-8")
    for needle in ('src="http', "src='http", "@import", 'href="http', "url(http"):
        assert needle not in page


def test_the_smallest_candidate_is_chosen_when_size_is_the_objective(built: tuple[Path, Outcome]) -> None:
    shown = json.loads(built[1].out)
    feasible = [c for c in shown["candidates"] if c["feasible"]]
    smallest = min(feasible, key=lambda c: c["size"])
    assert shown["chosen"] == smallest["name"]
    assert (built[0] / "model.onnx").stat().st_size == smallest["size"]


def test_the_same_seed_gives_the_same_graph_to_the_byte(given: Inputs, built: tuple[Path, Outcome], cli: Cli) -> None:
    rest = ("--max-drop", "10pt", "--minimise", "size")
    assert cli(*optimize(given, "--out", "again", *rest)).code == 0
    assert Path("again/model.onnx").read_bytes() == (built[0] / "model.onnx").read_bytes()
    first, again = (dict(np.load(folder / "reference.npz")) for folder in (built[0], Path("again")))
    assert first.keys() == again.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(again[name], array)


def test_another_seed_splits_the_data_another_way(given: Inputs, built: tuple[Path, Outcome], cli: Cli) -> None:
    assert cli(*optimize(given, "--out", "other", "--seed", 1, "--minimise", "size")).code == 0
    one, other = (np.load(folder / "reference.npz")["in:image"] for folder in (built[0], Path("other")))
    assert not np.array_equal(one, other)
    assert load_artifact("other").manifest.data.seed == 1


@pytest.mark.parametrize("name", runtime_names())
def test_people_get_a_summary_and_where_the_report_is(given: Inputs, cli: Cli, name: str) -> None:
    done = cli(*optimize(given, "--out", "out", "--runtime", name, "--batch", 2))
    assert done.code == 0
    assert "out/report.html" in done.out
    assert "int8" in done.out
    manifest = load_artifact("out").manifest
    assert (manifest.target.runtime, manifest.target.batch) == (name, 2)
    assert cli("verify", "out").code == 0


def test_the_same_from_python(given: Inputs) -> None:
    budget = narrowcast.Budget.parse(max_drop="10pt", minimise="size")
    result = narrowcast.optimize(str(given.model), data=f"npz:{given.data}", out="out", budget=budget)
    assert result.met
    assert result.folder == Path("out")
    assert str(result) == load_artifact("out").manifest.verdict.headline
    checks, differences = narrowcast.verify("out")
    assert all(check.passed for check in checks)
    assert differences == []


def test_an_artifact_can_be_the_model_that_another_one_is_compared_with(
    given: Inputs, built: tuple[Path, Outcome], cli: Cli
) -> None:
    done = cli("bench", built[0], "--against", built[0], "--data", f"npz:{given.data}", "--seconds", 0.5, "--json")
    assert done.code == 0, done.err
    found = {(m["measure"], m["subject"]): m["value"] for m in json.loads(done.out)["measurements"]}
    assert found["accuracy", "original"] == found["accuracy", "artifact"]
    assert found["compression", "ratio"] == 1.0


# The other commands ---------------------------------------------------------------------------------------------------


def test_verify_passes_what_optimize_wrote(built: tuple[Path, Outcome], cli: Cli) -> None:
    done = cli("verify", built[0])
    assert done.code == 0
    assert "failed" not in done.out
    shown = json.loads(cli("verify", built[0], "--json").out)
    assert shown["passed"] is True
    assert {check["name"] for check in shown["checks"]} == {"files", "load", "parity"}


@pytest.mark.parametrize("name", ["model.onnx", "reference.npz", "report.html", "report.json"])
def test_verify_refuses_a_changed_file(built: tuple[Path, Outcome], cli: Cli, name: str) -> None:
    shutil.copytree(built[0], "copy")
    content = bytearray((Path("copy") / name).read_bytes())
    content[len(content) // 2] ^= 1
    (Path("copy") / name).write_bytes(content)
    for command in (["verify", "copy"], ["run", "copy", "--input", "x.npz", "--output", "y.npz"]):
        done = cli(*command)
        assert done.code == 2
        assert f"file {name} has SHA-256" in done.words
        assert "ArtifactError" in done.err


def test_verify_fails_with_1_where_outputs_differ(built: tuple[Path, Outcome], cli: Cli) -> None:
    shutil.copytree(built[0], "copy")
    arrays = dict(np.load("copy/reference.npz"))
    arrays["out:scores"] = arrays["out:scores"] * 2
    np.savez("copy/reference.npz", **arrays)
    manifest = json.loads(Path("copy/manifest.json").read_text())
    manifest["files"]["reference.npz"] = narrowcast.artifacts.store.file_sha256(Path("copy/reference.npz"))
    Path("copy/manifest.json").write_text(json.dumps(manifest))
    done = cli("verify", "copy")
    assert done.code == 1
    assert "failed" in done.out
    assert json.loads(cli("verify", "copy", "--json").out)["passed"] is False


def test_run_gives_what_the_session_gives(given: Inputs, built: tuple[Path, Outcome], cli: Cli) -> None:
    np.savez("in.npz", image=given.images[:7])
    done = cli("run", built[0], "--input", "in.npz", "--output", "out.npz", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == {"output": "out.npz", "outputs": {"scores": ["float32", [7, CLASSES]]}}
    session = get_runtime("onnxruntime").load(built[0] / "model.onnx")
    np.testing.assert_array_equal(np.load("out.npz")["scores"], session.run({"image": given.images[:7]})["scores"])
    assert {path.name for path in Path.cwd().iterdir()} == {"in.npz", "out.npz"}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"picture": np.zeros((1, 3, 8, 8), np.float32)}, "no input 'image'"),
        ({"image": np.zeros((1, 3, 8, 8))}, "'image' is float64"),
        ({"image": np.zeros((1, 3, 9, 8), np.float32)}, "'image' is float32 [1, 3, 9, 8]"),
        ({"image": np.zeros((1, 3, 8, 8), np.float32), "more": np.zeros(1)}, "no input 'more'"),
    ],
)
def test_run_names_the_input_that_does_not_fit(
    built: tuple[Path, Outcome], cli: Cli, arrays: dict[str, np.ndarray], message: str
) -> None:
    np.savez("in.npz", **arrays)
    done = cli("run", built[0], "--input", "in.npz", "--output", "out.npz")
    assert (done.code, message in done.words, "in.npz" in done.words) == (2, True, True)
    assert not Path("out.npz").exists()


def test_run_names_an_output_that_cannot_be_written(given: Inputs, built: tuple[Path, Outcome], cli: Cli) -> None:
    np.savez("in.npz", image=given.images[:1])
    done = cli("run", built[0], "--input", "in.npz", "--output", "no/such/folder/out.npz")
    assert done.code == 2
    assert "no/such/folder/out.npz" in done.words


def test_bench_prints_both_sides(given: Inputs, built: tuple[Path, Outcome], cli: Cli) -> None:
    arguments = ("bench", built[0], "--against", given.model, "--data", f"npz:{given.data}", "--seconds", 0.5)
    done = cli(*arguments)
    assert done.code == 0, done.err
    assert "size" in done.out.lower()
    shown = cli(*arguments, "--json")
    found = {(m["measure"], m["subject"]): m for m in json.loads(shown.out)["measurements"]}
    assert found["size", "original"]["value"] == given.model.stat().st_size
    assert found["size", "artifact"]["value"] == (built[0] / "model.onnx").stat().st_size
    assert found["accuracy", "original"]["samples"] == 18  # the report part alone
    assert found["accuracy", "original"]["value"] == 1.0
    assert "interleaved" in found["latency_p50", "ratio"]["protocol"]


def test_bench_refuses_a_model_with_other_inputs(given: Inputs, built: tuple[Path, Outcome], cli: Cli) -> None:
    b = Builder(0)
    b.gemm(b.input("x", 4), "scores", 4, CLASSES)
    onnx.save(b.model(scores=(CLASSES,)), "other.onnx")
    np.savez("x.npz", x=np.zeros((9, 4), np.float32))
    done = cli("bench", built[0], "--against", "other.onnx", "--data", "npz:x.npz", "--seconds", 0.5)
    assert done.code == 2
    assert "take different inputs" in done.words
    assert "'image'" in done.words


def test_runtimes_are_listed_with_their_versions(cli: Cli) -> None:
    done = cli("runtimes")
    assert done.code == 0
    shown = json.loads(cli("runtimes", "--json").out)["runtimes"]
    assert [item["name"] for item in shown] == runtime_names()
    for item in shown:
        assert item["name"] in done.out
        assert item["version"] is None or item["version"] in done.out
    assert {item["name"]: item["version"] for item in shown}["onnxruntime"] == ort.__version__


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("command", [[], ["optimize"], ["bench"], ["verify"], ["run"], ["runtimes"]])
def test_every_command_explains_itself(cli: Cli, command: list[str], option: str) -> None:
    done = cli(*command, option)
    assert done.code == 0
    assert "Usage:" in done.out


def test_the_version_is_printed(cli: Cli) -> None:
    assert cli("--version").out.strip() == f"narrowcast {narrowcast.__version__}"


# Budgets that cannot be met -------------------------------------------------------------------------------------------


def test_a_budget_out_of_reach_is_an_answer_with_an_artifact_and_advice(given: Inputs, cli: Cli) -> None:
    done = cli(*optimize(given, "--out", "out", "--ratio", "1000x", "--max-drop", "10pt"))
    assert done.code == 3
    assert "Traceback" not in done.err
    manifest = load_artifact("out").manifest
    assert not manifest.verdict.met
    assert any(not s.met and s.limit.measure == "size" for s in manifest.verdict.standings)
    assert manifest.verdict.advice
    assert " ".join(manifest.verdict.advice[-1].split()) in " ".join(done.out.replace("│", " ").split())
    assert cli("verify", "out").code == 0


@pytest.fixture(scope="module")
def blamed(given: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """Full INT8 breaks the accuracy limit and everything else the size limit."""
    folder = tmp_path_factory.mktemp("blamed")
    limits = ("--metric", "sqnr", "--at-least", 45, "--ratio", "2.2x")
    return folder / "out", launch(folder, *optimize(given, "--out", "out", *limits, "--json"))


def test_a_broken_accuracy_limit_names_the_operators_to_blame(blamed: tuple[Path, Outcome]) -> None:
    folder, done = blamed
    assert done.code == 3, done.err
    shown = json.loads(done.out)
    assert shown == json.loads((folder / "report.json").read_text())
    assert {item["group"] for item in shown["blame"]} >= {"stem", "depthwise", "expand", "scores"}
    noises = [item["noise"] for item in shown["blame"]]
    assert noises == sorted(noises, reverse=True)
    assert shown["evaluations"] <= 8
    assert shown["evaluations"] == len(shown["candidates"])
    assert any(name.startswith("int8-float") for name in (c["name"] for c in shown["candidates"]))
    assert shown["verdict"]["advice"]


def test_json_is_json_even_where_numbers_are_infinite(blamed: tuple[Path, Outcome]) -> None:
    """The SQNR of the original is infinite; RFC 8259 knows neither Infinity nor NaN, and jq refuses them."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    shown = json.loads(blamed[1].out, parse_constant=refuse)
    kept = json.loads((blamed[0] / "report.json").read_text(), parse_constant=refuse)
    originals = [
        [m["value"] for m in d["measurements"] if (m["measure"], m["subject"]) == ("accuracy", "original")]
        for d in (shown, kept)
    ]
    assert originals == [["Infinity"], ["Infinity"]]


# Bad input ------------------------------------------------------------------------------------------------------------


def spoil(given: Inputs, **arrays: Any) -> str:
    """Write the data with some arrays replaced (or left out, where None)."""
    kept = {"image": given.images, "labels": given.labels} | arrays
    np.savez("spoiled.npz", **{name: value for name, value in kept.items() if value is not None})
    return "npz:spoiled.npz"


def with_nan(images: np.ndarray) -> np.ndarray:
    images = images.copy()
    images[41, 1, 2, 3] = np.nan
    return images


def broken_picture(given: Inputs) -> str:
    Path("pictures").mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8)).save(f"pictures/{number}.png")
    Path("pictures/broken.png").write_text("no picture")
    return "imagefolder:pictures"


BAD_DATA: dict[str, tuple[Callable[[Inputs], str], list[str]]] = {
    "missing file": (lambda g: "npz:absent.npz", ["absent.npz", "does not exist"]),
    "unknown source": (lambda g: "csv:data.csv", ["'csv:data.csv'", "npz"]),
    "empty folder": (lambda g: "imagefolder:.", ["holds no pictures"]),
    "wrong name": (lambda g: spoil(g, image=None, picture=g.images), ["'image'", "'picture'"]),
    "wrong dtype": (lambda g: spoil(g, image=g.images.astype(np.float64)), ["'image' is float64", "float32"]),
    "wrong shape": (lambda g: spoil(g, image=g.images[:, :, :7]), ["'image'", "[2, 3, 7, 8]", "3, 8, 8"]),
    "too few axes": (lambda g: spoil(g, image=g.images[:, 0, 0]), ["'image'", "[2, 8]"]),
    "NaN": (lambda g: spoil(g, image=with_nan(g.images)), ["'image' holds nan at [41, 1, 2, 3]"]),
    "no samples": (lambda g: spoil(g, image=g.images[:0], labels=g.labels[:0]), ["no samples"]),
    "two samples": (lambda g: spoil(g, image=g.images[:2], labels=g.labels[:2]), ["2 samples", "empty"]),
    "label too large": (lambda g: spoil(g, labels=g.labels + 90), ["5 classes", "0 to 4"]),
    "one label too large": (
        lambda g: spoil(g, labels=np.where(np.arange(60) == 7, 5, g.labels)),
        ["label 5 (sample 7)", "0 to 4"],
    ),
    "negative label": (lambda g: spoil(g, labels=g.labels - 9), ["label -9", "negative"]),
    "labels that are no numbers": (lambda g: spoil(g, labels=g.labels.astype(str)), ["labels", "<U"]),
    "too few labels": (lambda g: spoil(g, labels=g.labels[:9]), ["image: 60", "labels: 9"]),
    "missing module": (lambda g: "py:no_such_module:f", ["no_such_module"]),
    "an array too many": (lambda g: spoil(g, depth=g.images), ["npz:spoiled.npz has an array 'depth'", "'image'"]),
    "broken picture": (broken_picture, ["broken.png cannot be read"]),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data_are_named_and_nothing_is_written(given: Inputs, cli: Cli, kind: str) -> None:
    make, needles = BAD_DATA[kind]
    done = cli("optimize", given.model, "--data", make(given), "--out", "out")
    check_refused(done, needles)
    assert not [*Path.cwd().glob("out*")]


def check_refused(done: Outcome, needles: list[str]) -> None:
    assert done.code == 2, done.out + done.err
    assert "Traceback" not in done.err
    for needle in needles:
        assert needle in done.words
    assert done.out.strip() == ""


def truncated(given: Inputs) -> str:
    Path("cut.onnx").write_bytes(given.model.read_bytes()[:3000])
    return "cut.onnx"


def unsupported(given: Inputs) -> str:
    model = network()
    model.graph.node[1].op_type, model.graph.node[1].domain = "Frobnicate", "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    Path("odd.onnx").write_bytes(model.SerializeToString())
    return "odd.onnx"


def fixed_batch(given: Inputs) -> str:
    model = network()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, "fixed.onnx")
    return "fixed.onnx"


def text_file(given: Inputs) -> str:
    Path("notes.onnx").write_text("not a model")
    return "notes.onnx"


BAD_MODELS: dict[str, tuple[Callable[[Inputs], str], list[str]]] = {
    "missing file": (lambda g: "absent.onnx", ["absent.onnx", "does not exist"]),
    "truncated": (truncated, ["cut.onnx (3000 bytes)"]),
    "no ONNX": (text_file, ["notes.onnx"]),
    "unsupported operator": (unsupported, ["odd.onnx", "Frobnicate"]),
    "fixed batch": (fixed_batch, ["fixed.onnx", "'image' has the fixed shape [1, 3, 8, 8]", "dynamic"]),
    "unknown scheme": (lambda g: "keras:resnet", ["'keras:resnet'", "timm"]),
    "misspelt": (lambda g: "bundled:digit-cnn", ["'digit-cnn'", "did you mean digits-cnn?"]),
    "missing module": (lambda g: "py:no_such_module:f", ["no_such_module"]),
    "folder": (lambda g: ".", ["model.onnx"]),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_bad_models_are_named_and_nothing_is_written(given: Inputs, cli: Cli, kind: str) -> None:
    make, needles = BAD_MODELS[kind]
    done = cli("optimize", make(given), "--data", f"npz:{given.data}", "--out", "out")
    check_refused(done, needles)
    assert not [*Path.cwd().glob("out*")]


@pytest.mark.parametrize(
    ("options", "needles"),
    [
        (["--latency", "5ms", "--speedup", "2x"], ["latency 0.005 s", "speedup 2x", "--speedup"]),
        (["--size", "1MB", "--ratio", "2x"], ["size 1e+06 bytes", "ratio 2x"]),
        (["--max-drop", "1%", "--at-least", "0.9"], ["max_drop", "at_least 0.9"]),
        (["--max-drop", "a little"], ["'a little'", "0.5%"]),
        (["--max-drop", "-1%"], ["'-1%'"]),
        (["--latency", "5 parsecs"], ["'5 parsecs'", "5ms"]),
        (["--ratio", "0x"], ["'0x'"]),
        (["--at-least", "nan"], ["nan"]),
        (["--minimise", "beauty"], ["'beauty'", "latency, size, memory"]),
        (["--metric", "top7"], ["'top7'", "top1"]),
        (["--metric", "sqnr", "--max-drop", "1%"], ["sqnr", "--at-least"]),
        (["--runtime", "onxruntime"], ["'onxruntime'", "did you mean onnxruntime?"]),
        (["--threads", "0"], ["'--threads'"]),
        (["--batch", "-1"], ["'--batch'"]),
        (["--seed", "-1"], ["seed"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_bad_options_are_named_and_nothing_is_written(
    given: Inputs, cli: Cli, options: list[str], needles: list[str]
) -> None:
    done = cli(*optimize(given, "--out", "out", *options))
    check_refused(done, needles)
    assert not [*Path.cwd().glob("out*")]


def test_a_metric_on_labels_refuses_data_without(given: Inputs, cli: Cli) -> None:
    data = spoil(given, labels=None)
    done = cli("optimize", given.model, "--data", data, "--out", "out", "--metric", "top1")
    check_refused(done, ["top1 needs labels", "agreement"])


def test_a_metric_that_fails_is_named_and_nothing_is_left(given: Inputs, cli: Cli) -> None:
    Path("own_metric.py").write_text("def broken(outputs, reference): raise RuntimeError('out of ideas')\n")
    done = cli(*optimize(given, "--out", "out", "--metric", "py:own_metric:broken"))
    check_refused(done, ["metric py:own_metric:broken failed with RuntimeError: out of ideas", "--debug"])
    assert not [*Path.cwd().glob("out*")]


def test_an_existing_artifact_is_refused_without_force_and_replaced_with(
    given: Inputs, built: tuple[Path, Outcome], cli: Cli
) -> None:
    shutil.copytree(built[0], "out")
    before = Path("out/manifest.json").read_bytes()
    check_refused(cli(*optimize(given, "--out", "out")), ["out already holds an artifact", "--force"])
    assert Path("out/manifest.json").read_bytes() == before
    assert cli(*optimize(given, "--out", "out", "--force", "--minimise", "size", "--seed", 3)).code == 0
    assert load_artifact("out").manifest.data.seed == 3
    assert {path.name for path in Path.cwd().iterdir()} == {"out"}


def test_files_of_somebody_else_are_never_replaced(given: Inputs, cli: Cli) -> None:
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("years of work")
    check_refused(cli(*optimize(given, "--out", "out", "--force")), ["out holds files that are no artifact"])
    assert Path("out/thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("out", ["file", "file/out", "/proc/narrowcast-out", "/dev/null/out"])
def test_an_output_folder_that_cannot_be_written_is_named(given: Inputs, cli: Cli, out: str) -> None:
    Path("file").write_text("kept")
    check_refused(cli(*optimize(given, "--out", out)), [out.removesuffix("/out").removesuffix("/narrowcast-out")])
    assert Path("file").read_text() == "kept"


def test_errors_are_json_where_json_was_asked_for(given: Inputs, cli: Cli) -> None:
    done = cli("optimize", "absent.onnx", "--data", f"npz:{given.data}", "--out", "out", "--json")
    assert done.code == 2
    error = json.loads(done.out)["error"]
    assert error["type"] == "ModelError"
    assert "absent.onnx" in error["message"]


@pytest.mark.parametrize("arguments", [["verify", "absent"], ["run", "absent", "--input", "a", "--output", "b"]])
def test_a_folder_that_is_no_artifact_is_named(cli: Cli, arguments: list[str]) -> None:
    check_refused(cli(*arguments), ["absent is no artifact"])


def test_debug_shows_where_an_error_came_from(given: Inputs, tmp_path: Path) -> None:
    done = launch(tmp_path, "optimize", "absent.onnx", "--data", f"npz:{given.data}", "--out", "out", "--debug")
    assert done.code != 0
    assert "Traceback" in done.err
    assert "ModelError" in done.err


def test_the_module_runs_as_a_command_too(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "narrowcast", "verify", "absent"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "absent is no artifact" in " ".join(done.stderr.split())


# Interruption ---------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_leaves_no_artifact_and_goes_on_where_it_stopped(
    given: Inputs, tmp_path: Path, built: tuple[Path, Outcome]
) -> None:
    (tmp_path / "launch.py").write_text(LAUNCHER)
    arguments = optimize(given, "--out", "out", "--max-drop", "10pt", "--minimise", "size")
    state = tmp_path / "out.work" / "state.json"
    process = subprocess.Popen(
        [sys.executable, "launch.py", *map(str, arguments)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "400", "PYTHONPATH": python_path(), "WAIT_AT": "fp16-weights"},
    )
    while process.poll() is None and not (state.exists() and '"name":"int8-weights"' in state.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    done_already = [item["candidate"]["name"] for item in json.loads(state.read_text())["finished"]]
    assert done_already[:2] == ["int8", "int8-weights"]

    (tmp_path / "built.log").unlink()
    again = launch(tmp_path, *arguments)
    assert again.code == 0, again.err
    assert f"{len(done_already)} candidates are finished already" in again.words
    rebuilt = (tmp_path / "built.log").read_text().split() if (tmp_path / "built.log").exists() else []
    assert not set(rebuilt) & set(done_already)
    assert set(rebuilt) | set(done_already) >= {"int8", "int8-weights", "fp16-weights", "fp32"}
    assert not (tmp_path / "out.work").exists()
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (built[0] / "model.onnx").read_bytes()
    assert narrowcast.load_artifact(tmp_path / "out").manifest.verdict.met


def test_an_interruption_while_the_artifact_is_written_leaves_none(
    given: Inputs, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from narrowcast.search import final

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    rest = ("--out", "out", "--minimise", "size")
    with monkeypatch.context() as patch:
        patch.setattr(final, "save_artifact", stop)
        done = cli(*optimize(given, *rest))
    assert done.code == 130
    assert not Path("out").exists()
    assert cli(*optimize(given, *rest)).code == 0
    assert {path.name for path in Path.cwd().iterdir()} == {"out"}


def test_a_changed_request_does_not_go_on_with_the_old_one(
    given: Inputs, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from narrowcast.search import final

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(final, "save_artifact", stop)
        assert cli(*optimize(given, "--out", "out")).code == 130
    done = cli(*optimize(given, "--out", "out", "--seed", 5))
    assert done.code == 0
    assert "going on with an earlier run" not in done.words


def test_an_interrupted_person_is_told_how_to_go_on(given: Inputs, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "load_model", stop)
    done = cli(*optimize(given, "--out", "out"))
    assert done.code == 130
    assert "run the same command again" in done.words


# A real network -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_bundled_network_meets_half_a_point_with_int8_throughout(cli: Cli) -> None:
    done = cli("optimize", "bundled:digits-cnn", "--data", "bundled:digits", "--max-drop", "0.5pt", "--minimise",
               "size", "--out", "out", "--json")  # fmt: skip
    assert done.code == 0, done.err
    shown = json.loads(done.out)
    assert shown["chosen"].startswith("int8")
    full = next(c for c in shown["candidates"] if c["name"] == "int8")
    assert full["feasible"]
    assert full["kept_float"] == 0
    found = {(m["measure"], m["subject"]): m["value"] for m in shown["measurements"]}
    assert found["accuracy", "original"] > 0.95
    assert found["accuracy_drop", "artifact"] <= 0.005
    assert found["compression", "ratio"] > 2.5
