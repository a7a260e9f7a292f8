"""What ``narrowcast serve`` writes and shows of itself, as a program that runs and ends."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.command import Cli, strict
from e2e.test_serve_cli import Program, artifact, wait_for
from narrowcast.artifacts.manifest import Manifest

ManifestOf = Callable[..., Manifest]


@pytest.fixture
def models(tmp_path: Path, manifest_of: ManifestOf) -> Path:
    """Model ``scale``, versions 2 and 3."""
    for version in (2, 3):
        artifact(tmp_path / "models" / "scale" / str(version) / "artifact", manifest_of(), float(version))
    return tmp_path / "models"


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def begin(*arguments: object) -> Program:
        programs.append(Program(*arguments))
        return programs[-1]

    yield begin
    for program in programs:
        if program.process.poll() is None:
            program.end()


def events(program: Program) -> list[dict[str, Any]]:
    """Return what the log says; each line of it is a JSON object."""
    return [strict(line) for line in program.log]


def admin(program: Program, target: str) -> None:
    request = urllib.request.Request(
        f"{program.url}/v2/repository/models/{target}", method="POST", headers={"Authorization": "Bearer s3cret"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.status == 200


def test_the_log_as_json_tells_the_life_of_a_server(models: Path, start: Callable[..., Program]) -> None:
    program = start(models, "--log", "json")
    assert program.infer("scale") == (200, 3.0)
    assert program.infer("nothing")[0] == 404
    admin(program, "scale/versions/2/promote")
    (worker,) = (each for each in program.workers() if any("/scale/2/" in part for part in each.cmdline()))
    worker.kill()
    wait_for(lambda: any("took its place" in line for line in program.log))
    assert program.end() == 0
    lines = events(program)
    assert all({"time", "level", "logger", "event"} <= line.keys() for line in lines)
    said = [line["event"] for line in lines]
    for event in ("model_ready", "request", "traffic", "worker_died", "worker_ready", "draining", "ended"):
        assert event in said, said
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["status"] for line in requests] == [200, 404, 200]
    assert requests[0].keys() >= {"request_id", "model", "version", "rows", "queue_ms", "compute_ms", "total_ms"}
    assert (requests[0]["model"], requests[0]["version"]) == ("scale", "3")
    (traffic,) = [line for line in lines if line["event"] == "traffic"]
    assert (traffic["model"], traffic["shares"]) == ("scale", {"2": 1.0})
    died = next(line for line in lines if line["event"] == "worker_died")
    assert died["level"] == "error"
    assert died["pid"] == worker.pid


@pytest.mark.parametrize(("style", "heard"), [("quiet", False), ("events", True)])
def test_requests_have_no_lines_unless_asked_for(
    models: Path, start: Callable[..., Program], style: str, heard: bool
) -> None:
    program = start(models, "--log", style, "--placement", "inline")
    assert program.infer("scale") == (200, 3.0)
    assert program.infer("nothing")[0] == 404
    assert program.end() == 0
    text = "".join(program.log)
    assert "request" not in text.replace("requests", "")
    assert ("is ready" in text) == heard


def test_the_addresses_that_are_printed_show_the_server(models: Path, start: Callable[..., Program]) -> None:
    program = start(models, "--placement", "inline")
    metrics = program.said["listening"]["metrics"]
    with urllib.request.urlopen(f"{metrics}/status", timeout=60) as response:
        document = json.load(response)
    assert document["state"] == "ready"
    assert [model["name"] for model in document["models"]] == ["scale"]
    with urllib.request.urlopen(metrics, timeout=60) as response:
        assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "nv_inference_count" in program.metrics()
    assert program.end() == 0


def test_traces_that_nobody_takes_hold_nothing_up(
    models: Path, start: Callable[..., Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector's port answers nothing; requests do, and the server ends."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    program = start(models, "--trace", "--log", "json", "--placement", "inline")
    assert program.infer("scale") == (200, 3.0)
    assert program.end() == 0
    (line,) = [line for line in events(program) if line["event"] == "request"]
    assert int(line["trace_id"], 16) > 0


def test_an_unknown_style_is_answered_in_words(models: Path, cli: Cli) -> None:
    done = cli("serve", models, "--log", "jsn")
    assert done.code == 2
    assert "log 'jsn' is unknown" in done.words
    assert "json" in done.words
