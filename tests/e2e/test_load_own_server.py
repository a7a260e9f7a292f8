"""``narrowcast load`` against ``narrowcast serve``, over both protocols."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from e2e.command import Cli, strict
from narrowcast.artifacts.manifest import Manifest
from narrowcast.artifacts.store import save_artifact


@pytest.fixture
def place(tmp_path: Path, manifest_of: Callable[..., Manifest]) -> Path:
    """An artifact that doubles FP32 [n, 4]."""
    folder = tmp_path / "double"
    folder.mkdir()
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    save_artifact(folder, manifest_of())
    return folder


@pytest.fixture
def listening(place: Path) -> Iterator[dict[str, str]]:
    """URLs of a server of it."""
    ports = ("--port", "0", "--grpc-port", "0", "--metrics-port", "-1")
    process = subprocess.Popen(
        [sys.executable, "-m", "narrowcast", "serve", str(place), *ports, "--placement", "inline", "--json"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if line == "}\n":
            break
    found = json.loads(text)["listening"]
    yield {"http": found["http"], "grpc": f"grpc://{found['grpc']}"}
    process.terminate()
    process.wait(60)
    process.stdout.close()


def load(cli: Cli, url: str, *arguments: object) -> Any:
    done = cli("load", url, "--model", "double", "--warmup", 0.2, "--lateness", "60s", *arguments, "--json")
    assert done.code == 0, done.err or done.out
    return strict(done.out)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_our_own_server_is_loaded(listening: dict[str, str], cli: Cli, protocol: str) -> None:
    opened = load(cli, listening[protocol], "--rate", 100, "--seconds", 1, "--batch", "1:1,3:1")
    assert opened["server"]["name"] == "narrowcast"
    assert opened["server"]["inputs"] == ["x FP32[-1,4]"]
    assert opened["run"]["counts"]["ok"] == opened["run"]["counts"]["due"] > 50
    assert set(opened["run"]["statuses"]) == {"200" if protocol == "http" else "0"}
    assert opened["run"]["rows_rate"] > 1.3 * opened["run"]["rate"]["value"]
    closed = load(cli, listening[protocol], "--concurrency", 4, "--seconds", 0.5, "--processes", 2)
    assert closed["run"]["counts"]["ok"] > 20
    assert closed["run"]["client"]["processes"] == 2
    done = cli("load", listening[protocol], "--model", "duoble", "--rate", 5)
    assert done.code == 2
    assert "did you mean double?" in done.words


@pytest.mark.exhaustive
def test_kinds_of_batching_are_compared(place: Path, cli: Cli) -> None:
    done = cli(
        *("load", place, "--model", "double", "--compare-batching", "--serve", "--max-batch 4 --delay 2"),
        *("--slo", "p50=80ms", "--rate", 50, "--seconds", 0.5, "--warmup", 0.2, "--lateness", "60s", "--json"),
    )
    assert done.code in (0, 1), done.err  # a busy machine may leave too few tries, or none that misses the bound
    found = strict(done.out)
    assert list(found["others"]) == ["dynamic", "static", "none"]
    assert {probe["kind"] for probe in found["probes"]} == {"dynamic", "static", "none"}
    assert len(found["probes"]) >= 36
    for gain in found["gains"].values():
        assert gain["low"] <= gain["value"] <= gain["high"]
    assert bool(found["gains"]) or done.code == 1
