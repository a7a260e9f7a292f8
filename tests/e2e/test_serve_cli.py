"""``narrowcast serve`` and ``narrowcast models``, as programs that run and end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import psutil
import pytest
from onnx import TensorProto, helper

from e2e.command import Cli
from narrowcast.artifacts.manifest import Manifest
from narrowcast.artifacts.store import save_artifact

TOKEN = "s3cret"
ManifestOf = Callable[..., Manifest]


def artifact(folder: Path, manifest: Manifest, factor: float) -> Path:
    """Write an artifact that multiplies FP32 [n, 4] by a number."""
    folder.mkdir(parents=True)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    constant = helper.make_tensor("k", TensorProto.FLOAT, [], [factor])
    graph = helper.make_graph([helper.make_node("Mul", ["x", "k"], ["y"])], "g", values[:1], values[1:], [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    save_artifact(folder, manifest)
    return folder


@pytest.fixture
def repository(tmp_path: Path, manifest_of: ManifestOf) -> Path:
    """Model ``scale``, version 2, which doubles, and model ``other``, which multiplies by 5."""
    artifact(tmp_path / "models" / "scale" / "2" / "artifact", manifest_of(), 2.0)
    artifact(tmp_path / "models" / "other" / "1" / "artifact", manifest_of(), 5.0)
    return tmp_path / "models"


class Program:
    """A server that runs."""

    def __init__(self, *arguments: object) -> None:
        ports = [f"--{name}port=0" for name in ("", "grpc-", "metrics-")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "narrowcast", "serve", *map(str, arguments), *ports, "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"NARROWCAST_ADMIN_TOKEN": TOKEN},
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, args=(self.process.stderr,), daemon=True)
        self._reader.start()
        text = ""
        for line in self.process.stdout:
            text += line
            if line == "}\n":
                break
        self.said: dict[str, Any] = json.loads(text) if text else {}

    def _read(self, stream: Any) -> None:
        self.log.extend(stream)

    @property
    def url(self) -> str:
        return self.said["listening"]["http"]

    def ask(self, method: str, target: str, body: bytes = b"") -> tuple[int, Any]:
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        try:
            connection.request(method, target, body or None)
            response = connection.getresponse()
            text = response.read()
            return response.status, json.loads(text) if text else None
        finally:
            connection.close()

    def metrics(self) -> str:
        with urllib.request.urlopen(self.said["listening"]["metrics"] + "/metrics", timeout=60) as response:
            return response.read().decode()

    def infer(self, model: str, value: float = 1.0) -> tuple[int, Any]:
        item = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [value] * 4}
        status, document = self.ask("POST", f"/v2/models/{model}/infer", json.dumps({"inputs": [item]}).encode())
        return status, document["outputs"][0]["data"][0] if status == 200 else document["error"]

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def worker_of(self, model: str) -> psutil.Process:
        return next(worker for worker in self.workers() if any(f"/{model}/" in part for part in worker.cmdline()))

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(60)
        self._reader.join(10)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()
        return code


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def begin(*arguments: object) -> Program:
        programs.append(Program(*arguments))
        return programs[-1]

    yield begin
    for program in programs:
        program.end(signal.SIGKILL)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(0.02)


def test_a_repository_is_served_changed_by_commands_and_ended(
    repository: Path, start: Callable[..., Program], cli: Cli, manifest_of: ManifestOf
) -> None:
    program = start(repository)
    assert program.said["models"] == ["other", "scale"]
    assert program.infer("scale") == (200, 2.0)
    assert program.infer("other") == (200, 5.0)
    artifact(repository / "scale" / "3" / "artifact", manifest_of(), 3.0)
    admin = ("--url", program.url, "--admin-token", TOKEN)
    assert cli("models", "load", "scale", "--url", program.url).code == 2
    assert cli("models", "load", "scale", *admin).code == 0
    assert program.infer("scale") == (200, 3.0)
    assert cli("models", "rollback", "scale", *admin).code == 0
    assert program.infer("scale") == (200, 2.0)
    assert cli("models", "promote", "scale", "3", *admin).code == 0
    assert program.infer("scale") == (200, 3.0)
    split = cli("models", "split", "scale", "2=1,3=3", *admin)
    assert split.out.splitlines()[1:] == [
        "version 2 answers 25.0% of the requests that name none",
        "version 3 answers 75.0% of the requests that name none",
    ]
    assert json.loads(cli("models", "split", "scale", *admin, "--json").out)["traffic"] == {"2": 0.25, "3": 0.75}
    assert {program.infer("scale")[1] for _ in range(60)} == {2.0, 3.0}
    assert json.loads(cli("models", "split", "scale", "off", *admin, "--json").out) == {
        "done": "split",
        "model": "scale",
        "traffic": {"3": 1.0},
        "kept": True,
    }
    assert cli("models", "unload", "other", *admin).code == 0
    assert program.infer("other")[0] == 404
    listed = json.loads(cli("models", "list", *admin, "--json").out)["models"]
    assert {(entry["name"], entry["version"]): entry["state"] for entry in listed} == {
        ("other", "1"): "UNAVAILABLE",
        ("scale", "2"): "UNAVAILABLE",
        ("scale", "3"): "READY",
    }
    workers = program.workers()
    assert program.end() == 0
    assert not any(worker.is_running() for worker in workers)
    assert not any("Traceback" in line for line in program.log), program.log


def test_what_is_under_way_at_sigterm_is_finished(repository: Path, start: Callable[..., Program]) -> None:
    """Clients that keep asking on their connections see 200, then one 503, and never a connection that breaks."""
    program = start(repository)
    item = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1.0] * 4}
    body = json.dumps({"inputs": [item]}).encode()
    statuses: list[list[int]] = [[] for _ in range(4)]
    broken: list[Exception] = []

    def keep_asking(mine: list[int]) -> None:
        connection = http.client.HTTPConnection(program.url.removeprefix("http://"), timeout=60)
        try:
            while not mine or mine[-1] == 200:
                connection.request("POST", "/v2/models/scale/infer", body)
                response = connection.getresponse()
                response.read()
                mine.append(response.status)
        except (OSError, http.client.HTTPException) as error:
            broken.append(error)
        finally:
            connection.close()

    clients = [threading.Thread(target=keep_asking, args=(mine,)) for mine in statuses]
    for client in clients:
        client.start()
    wait_for(lambda: min(map(len, statuses)) > 5)
    assert program.end() == 0
    for client in clients:
        client.join(20)
    assert not broken
    assert [mine[-1] for mine in statuses] == [503] * 4
    assert all(set(mine[:-1]) == {200} for mine in statuses)


def test_a_killed_worker_fails_what_it_ran_alone_and_comes_back(
    repository: Path, start: Callable[..., Program]
) -> None:
    program = start(repository)
    worker = program.worker_of("scale")
    worker.suspend()
    answers: list[tuple[int, Any]] = []
    client = threading.Thread(target=lambda: answers.append(program.infer("scale")))
    client.start()
    wait_for(lambda: 'narrowcast_running_batches{model="scale",version="2"} 1' in program.metrics())
    worker.kill()
    client.join(30)
    assert answers[0][0] == 503
    assert "may be sent again" in answers[0][1]
    assert program.infer("other") == (200, 5.0)
    wait_for(lambda: program.infer("scale") == (200, 2.0))
    assert program.ask("GET", "/v2/health/ready")[0] == 200
    assert program.end() == 0


def test_a_model_that_cannot_come_back_backs_off_and_leaves_the_others_alone(
    repository: Path, start: Callable[..., Program]
) -> None:
    program = start(repository)
    graph = repository / "scale" / "2" / "artifact" / "model.onnx"
    good = graph.read_bytes()
    graph.write_bytes(b"changed" + good)
    program.worker_of("scale").kill()
    wait_for(lambda: sum("cannot be started again" in line for line in program.log) >= 2)
    assert program.infer("scale")[0] == 503
    assert program.infer("other") == (200, 5.0)
    assert program.ask("GET", "/v2/health/live")[0] == 200
    assert program.ask("GET", "/v2/health/ready")[0] == 503
    assert program.ask("GET", "/v2/models/other/ready")[0] == 200
    assert any("damaged" in line for line in program.log)
    graph.write_bytes(good)
    wait_for(lambda: program.infer("scale") == (200, 2.0))
    assert program.end() == 0


@pytest.mark.parametrize("placement", ["process", "thread", "inline"])
def test_an_artifact_is_served_wherever_it_runs(
    tmp_path: Path, manifest_of: ManifestOf, start: Callable[..., Program], placement: str
) -> None:
    folder = artifact(tmp_path / "triple", manifest_of(), 3.0)
    program = start(folder, "--placement", placement, "--workers", 2, "--delay", 1)
    assert program.infer("triple", 2.0) == (200, 6.0)
    assert len(program.workers()) == (2 if placement == "process" else 0)
    assert program.end(signal.SIGINT) == 0


def test_models_are_loaded_when_they_are_asked_for_and_options_are_read_beside_them(
    repository: Path, start: Callable[..., Program]
) -> None:
    (repository / "scale" / "serving.json").write_text('{"workers": 2, "max_batch": 3}')
    program = start(repository, "--load", "on-demand", "--memory-budget", "8GiB")
    assert program.said["models"] == ["other", "scale"]
    assert program.workers() == []
    assert program.ask("GET", "/v2/health/ready")[0] == 200
    assert program.infer("scale") == (200, 2.0)
    assert len(program.workers()) == 2
    assert program.ask("GET", "/v2/models/scale/config")[1]["max_batch_size"] == 3
    assert program.end() == 0


def test_a_damaged_artifact_is_not_served(repository: Path, cli: Cli) -> None:
    graph = repository / "scale" / "2" / "artifact" / "model.onnx"
    graph.write_bytes(graph.read_bytes() + b"x")
    done = cli("serve", repository, "--port", 0, "--grpc-port", -1, "--metrics-port", -1)
    assert done.code == 2
    assert "ArtifactError" in done.err
    assert "damaged" in done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing"], "is no folder"),
        (["{models}", "--placement", "moon"], "placement 'moon' is unknown"),
        (["{models}", "--versions", "newest"], "versions 'newest' cannot be read"),
        (["{models}", "--batching", "static"], "static batching needs a delay"),
        (["{models}", "--batching", "statics"], "batching 'statics'"),
        (["{models}", "--load", "never"], "load 'never'"),
        (["{models}", "--memory-budget", "4GB"], "'4GB' is no size of memory"),
        (["{models}", "--memory-budget", "1MiB"], "more than the whole budget of 1.0 MiB"),
        (["{models}", "--preferred", "4,x"], "batch sizes '4,x' cannot be read"),
        (["{models}", "--preferred", "64"], "preferred batch size 64 is above max_batch 32"),
    ],
)
def test_mistakes_are_answered_in_words(repository: Path, cli: Cli, arguments: list[str], said: str) -> None:
    done = cli("serve", *(part.format(models=repository) for part in arguments))
    assert done.code == 2
    assert said in done.words


def test_a_port_that_is_taken_is_named(repository: Path, start: Callable[..., Program], cli: Cli) -> None:
    program = start(repository)
    port = program.url.rpartition(":")[2]
    done = cli("serve", repository, "--port", port, "--placement", "inline", "--grpc-port", -1, "--metrics-port", -1)
    assert done.code == 2
    assert f"127.0.0.1:{port} cannot be listened on" in done.words


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["list", "net"], "does not say what to change"),
        (["load"], "does not say what to change"),
        (["promote", "net"], "does not say what to change"),
        (["split", "net", "3"], "split '3' cannot be read"),
        (["split", "net", "3=1,3=2"], "names a version twice"),
        (["list", "--url", "http://127.0.0.1:x"], "is no URL"),
        (["list", "--url", "ftp://x"], "is no URL"),
        (["list", "--url", "http://127.0.0.1:1"], "nobody answers"),
    ],
)
def test_mistakes_about_models_are_answered_in_words(cli: Cli, arguments: list[str], said: str) -> None:
    done = cli("models", *arguments)
    assert done.code == 2
    assert said in done.words


def test_a_server_that_does_not_answer_in_time_is_not_taken_for_none(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrowcast.cli.models._SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done = cli("models", "load", "net", "--url", f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert done.code == 2
    assert "has not answered within 0.1 s; what it was asked to do may still be under way" in done.words
    assert "narrowcast models list" in done.words
