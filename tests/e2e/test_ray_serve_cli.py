"""``narrowcast serve --engine ray``: what it refuses, and a cluster of two nodes that serves."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc as grpclib
import numpy as np
import onnx
import psutil
import pytest
import tritonclient.grpc
import tritonclient.http
from onnx import TensorProto, helper
from test_serve_cli import artifact

import narrowcast.serving.ray
from e2e.command import Cli
from narrowcast.artifacts.manifest import Manifest
from narrowcast.artifacts.store import save_artifact
from narrowcast.oip.messages import HEALTH

ManifestOf = Callable[..., Manifest]
#: Nothing is reported, no token is written to the user's folder, and each node's proxy has ports of its own.
QUIET = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0"}


@pytest.fixture
def models(tmp_path: Path, manifest_of: ManifestOf) -> Path:
    """Model ``scale``: version 1 doubles, version 2 triples."""
    for version, factor in ((1, 2.0), (2, 3.0)):
        artifact(tmp_path / "models" / "scale" / str(version) / "artifact", manifest_of(), factor)
    return tmp_path / "models"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--engine", "rya"], "engine 'rya' is unknown Allowed: local, ray (did you mean ray?)"),
        (["--engine", "ray", "--placement", "inline"], "--placement means nothing with --engine ray: Ray places"),
        (["--engine", "ray", "--memory-budget", "1GiB"], "--memory-budget means nothing with --engine ray"),
        (["--engine", "ray", "--shared-memory"], "--shared-memory means nothing with --engine ray"),
        (["--engine", "ray", "--render", "compose"], "--render means nothing with --engine ray"),
        (["--engine", "ray", "--port", "0"], "Ray cannot choose a port"),
        (["--engine", "ray", "--metrics-port", "0"], "Ray cannot choose a port"),
        (["--engine", "ray", "--workers", "4", "--max-workers", "3"], "4 workers at least and 3 at most"),
        (["--engine", "ray", "--versions", "=9"], "none of the versions that the policy names"),
        (["--max-workers", "3"], "--max-workers and --ray-address are for Ray"),
    ],
)
def test_what_means_nothing_with_ray_is_refused_by_name(
    models: Path, cli: Cli, arguments: list[str], said: str
) -> None:
    done = cli("serve", models, *arguments)
    assert done.code == 2
    assert said in done.words


def test_without_ray_the_way_to_install_it_is_said(models: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "narrowcast.serving.ray.engine", raising=False)
    monkeypatch.delattr(narrowcast.serving.ray, "engine", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    done = cli("serve", models, "--engine", "ray")
    assert done.code == 2
    assert "pip install 'narrowcast[ray]'" in done.words


@pytest.mark.filterwarnings("ignore")  # Ray's own, at its import
def test_a_cluster_that_is_not_there_and_a_port_that_is_taken_are_told_at_once(
    models: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        taken = cli("serve", models, "--engine", "ray", "--port", port)
    assert taken.code == 2
    assert f"127.0.0.1:{port} cannot be listened on" in taken.words
    nobody = cli("serve", models, "--engine", "ray", "--ray-address", f"127.0.0.1:{port}")
    assert nobody.code == 2
    assert f"no Ray cluster answers at 127.0.0.1:{port}" in nobody.words
    mistake = cli("serve", models, "--engine", "ray", "--ray-address", "here:x")
    assert mistake.code == 2
    assert "Ray address 'here:x' is none" in mistake.words


@pytest.mark.filterwarnings("ignore")  # Ray's own, at its import
@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "It failed.\nTraceback\n  raise X(\nnarrowcast.errors.ArtifactError: no a: b\nNext: c",
            "ArtifactError: no a: b",
        ),
        ("Traceback\nray.exceptions.OneError: first\n\nValueError: a\n", "ValueError: a"),
        ("The deployment is broken.\nIt takes: too long.\n", "It takes: too long."),
        (KeyError(), "KeyError"),
    ],
    ids=["ours", "last", "words", "nothing"],
)
def test_what_ray_says_in_pages_is_told_in_a_line(said: str | Exception, told: str) -> None:
    from narrowcast.serving.ray.cluster import brief

    assert brief(said) == told


# a cluster ------------------------------------------------------------------------------------------------------------


def free_ports(number: int) -> list[int]:
    """Return ports that are free, below those that the system gives to whoever asks for any port, as Ray does."""
    found: list[int] = []
    for port in random.sample(range(20_000, 32_000), 100):
        if len(found) < number:
            with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
                found.append(port)
    return found


class Nodes:
    """Two nodes of one CPU each on this machine; what Ray makes of them is a cluster of two machines.

    Attributes:
        address: Where the cluster is.
        ports: HTTP and gRPC of the first node's proxy, then of the second's.
    """

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.ports = free_ports(4)
        worker = {"RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(self.ports[2])}
        worker["RAY_SERVE_WORKER_PROXY_GRPC_PORT"] = str(self.ports[3])
        os.environ.update(worker)
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.second = self._cluster.add_node(num_cpus=1)
        self.address = self._cluster.address

    def lose_second(self) -> None:
        self._cluster.remove_node(self.second, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    for name in ("HTTP", "GRPC"):
        monkeypatch.setenv(f"RAY_SERVE_WORKER_PROXY_{name}_PORT", "0")  # so that it is taken back at the end
    cluster = Nodes()
    yield cluster
    cluster.close()


class Program:
    """``narrowcast serve --engine ray``, running."""

    def __init__(self, *arguments: object, command: list[str] | None = None) -> None:
        command = command or [
            *(sys.executable, "-m", "narrowcast", "serve"),
            *(*map(str, arguments), "--engine", "ray", "--json"),
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.errors: list[str] = []
        self._reader = threading.Thread(target=lambda: self.errors.extend(self.process.stderr or ()), daemon=True)
        self._reader.start()
        text = ""
        for line in self.process.stdout:
            text += line
            if line == "}\n":
                break
        self.said = json.loads(text) if text else {}
        if "listening" not in self.said:
            self.end()
            pytest.fail(f"{text}{''.join(self.errors)}")

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(120)
        self._reader.join(10)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return code


def get(port: int, target: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{target}", timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def answered(port: int) -> bool:
    """Whether a server behind a port says what it is."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2", timeout=30) as response:
            return response.status == 200
    except (OSError, urllib.error.HTTPError):
        return False


def infer(client: Any, module: Any, rows: int = 1, version: str = "") -> float:
    x = np.ones((rows, 4), np.float32)
    item = module.InferInput("x", list(x.shape), "FP32")
    item.set_data_from_numpy(x)
    return float(client.infer("scale", [item], model_version=version).as_numpy("y")[0, 0])


def health(port: int) -> str:
    """Return what a health check over gRPC is answered."""
    with grpclib.insecure_channel(f"127.0.0.1:{port}") as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            HEALTH["HealthCheckRequest"].SerializeToString,
            HEALTH["HealthCheckResponse"].FromString,
        )
        return {1: "SERVING", 2: "NOT_SERVING"}[check(HEALTH["HealthCheckRequest"](), timeout=30).status]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(0.2)


def values(port: int, family: str) -> dict[str, float]:
    """Return the numbers of a family of metrics by version."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    found = (re.fullmatch(rf'{family}{{model="[^"]*",version="(\d+)"}} (.*)', line) for line in lines)
    return {match[1]: float(match[2]) for match in found if match}


def change(port: int, target: str, token: str = "secret", body: bytes = b"") -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v2/repository/models/{target}", data=body, method="POST", headers=headers
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


class Load:
    """Clients that ask without a pause, and remember every answer that is not one version's."""

    def __init__(self, ports: list[int]) -> None:
        self.wrong: list[Any] = []
        self.seen: Counter[str] = Counter()
        self._over = False
        self._threads = [threading.Thread(target=self._ask, args=(port,)) for port in ports]
        for thread in self._threads:
            thread.start()

    def _ask(self, port: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        item = {"name": "x", "shape": [2, 4], "datatype": "FP32", "data": [1.0] * 8}
        while not self._over:
            connection.request("POST", "/v2/models/scale/infer", json.dumps({"inputs": [item]}))
            response = connection.getresponse()
            document = json.loads(response.read())
            version = document.get("model_version", "")
            if response.status != 200 or document["outputs"][0]["data"] != [float(version) + 1] * 8:
                self.wrong.append((response.status, document))
            self.seen[version] += 1
        connection.close()

    def end(self) -> None:
        self._over = True
        for thread in self._threads:
            thread.join(60)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_two_nodes_serve_the_protocol_and_one_of_them_may_go(models: Path, nodes: Nodes) -> None:
    rest, grpc = nodes.ports[:2]
    (metrics,) = free_ports(1)
    program = Program(
        *(models, "--ray-address", nodes.address, "--port", rest, "--grpc-port", grpc, "--metrics-port", metrics),
        *("--workers", 2, "--delay", 50, "--max-batch", 4),
    )
    try:
        assert (program.said["models"], program.said["failed"]) == (["scale"], {})
        for port in (rest, nodes.ports[2]):  # through the proxy of each node
            assert get(port, "/v2/health/ready") == (200, {"ready": True})
            with tritonclient.http.InferenceServerClient(f"127.0.0.1:{port}") as client:
                assert infer(client, tritonclient.http) == 3.0
        assert health(grpc) == "SERVING"
        with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{grpc}") as client:
            assert client.is_model_ready("scale")
            assert infer(client, tritonclient.grpc) == 3.0
            with pytest.raises(tritonclient.grpc.InferenceServerException, match="has no version '1' loaded"):
                infer(client, tritonclient.grpc, version="1")
        with tritonclient.http.InferenceServerClient(f"127.0.0.1:{rest}", concurrency=16) as client:
            item = tritonclient.http.InferInput("x", [1, 4], "FP32")
            item.set_data_from_numpy(np.ones((1, 4), np.float32))
            waiting = [client.async_infer("scale", [item]) for _ in range(40)]
            assert all(answer.get_result().as_numpy("y")[0, 0] == 3.0 for answer in waiting)
        (counted,) = get(rest, "/v2/models/scale/stats")[1]["model_stats"]
        assert counted["inference_count"] == 43
        assert counted["execution_count"] < 43, "requests that came together ran together"
        assert values(metrics, "nv_inference_count") == {"2": 43}
        assert values(metrics, "narrowcast_workers") == {"2": 2}
        status = get(metrics, "/status")[1]
        assert (status["state"], status["placement"]) == ("ready", "ray")
        states = [(model["name"], item["state"]) for model in status["models"] for item in model["versions"]]
        assert states == [("scale", "UNAVAILABLE"), ("scale", "READY")]
        assert get(rest, "/v2/models/none")[0] == 404
        nodes.lose_second()
        with tritonclient.http.InferenceServerClient(f"127.0.0.1:{rest}") as client:

            def answers() -> bool:
                try:
                    return infer(client, tritonclient.http) == 3.0
                except tritonclient.http.InferenceServerException:
                    return False

            wait_for(answers)
            wait_for(lambda: all(answers() for _ in range(10)))
        wait_for(lambda: get(rest, "/v2/health/ready")[0] == 200)
        assert values(metrics, "nv_inference_count")["2"] >= 43, "what the lost replica counted is not forgotten"
    finally:
        code = program.end()
    assert code == 0
    assert not any("Traceback" in line for line in program.errors), "".join(program.errors)
    assert not answered(rest), "the application is taken down, and the cluster stays"


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_changes_under_load_reach_both_nodes_and_streams_are_answered(
    models: Path, manifest_of: ManifestOf, nodes: Nodes
) -> None:
    rest, grpc, other, _ = nodes.ports
    broken = models / "broken" / "1" / "artifact"
    broken.mkdir(parents=True)
    (broken / "model.onnx").write_bytes(b"no model")
    save_artifact(broken, manifest_of())
    (metrics,) = free_ports(1)
    program = Program(
        *(models, "--ray-address", nodes.address, "--port", rest, "--grpc-port", grpc, "--metrics-port", metrics),
        *("--admin-token", "secret", "--max-batch", 4),
    )
    load = Load([])
    try:
        assert program.said["models"] == ["scale"], "it is served, though another model cannot be"
        assert program.said["failed"].keys() == {"broken"}
        assert "INVALID_PROTOBUF" in program.said["failed"]["broken"]
        assert get(rest, "/v2/models/broken")[0] == 404
        assert change(rest, "scale/versions/1/promote", "guess")[0] == 401
        with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{grpc}") as client:
            answers: queue.Queue[Any] = queue.Queue()
            client.start_stream(lambda result, error: answers.put(error or result.get_response().id))
            item = tritonclient.grpc.InferInput("x", [1, 4], "FP32")
            item.set_data_from_numpy(np.ones((1, 4), np.float32))
            for number in range(20):
                client.async_stream_infer("none" if number == 7 else "scale", [item], request_id=str(number))
            found = [answers.get(timeout=60) for _ in range(20)]
            client.stop_stream()
            assert "is not found" in str(found.pop(7))
            assert found == [str(number) for number in range(20) if number != 7]
            with pytest.raises(tritonclient.grpc.InferenceServerException, match="UNAUTHENTICATED"):
                client.load_model("scale")
            client.load_model("scale", headers={"authorization": "Bearer secret"})
        load = Load([rest, other, rest])
        for _ in range(2):
            for target, version in (("versions/1/promote", "1"), ("rollback", "2")):
                assert change(rest, f"scale/{target}") == (200, {"traffic": {version: 1.0}, "kept": True})
                for port in (rest, other):
                    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{port}") as client:
                        assert infer(client, tritonclient.http) == float(version) + 1
        done = change(other, "scale/traffic", body=b'{"weights": {"1": 1, "2": 1}}')
        assert done == (200, {"traffic": {"1": 0.5, "2": 0.5}, "kept": True})
        time.sleep(1)
        load.end()
        assert load.wrong == []
        assert load.seen.keys() == {"1", "2"}
        counted = values(metrics, "nv_inference_request_success")
        assert counted["1"] + counted["2"] == load.seen.total() + 19 + 8, "ended replicas count too"
        assert change(rest, "scale/unload") == (200, {"traffic": {}, "kept": True})
        assert get(other, "/v2/models/scale")[0] == 404
    finally:
        load.end()
        code = program.end()
    assert code == 0
    assert json.loads((models / "serving-state.json").read_text())["models"]["scale"]["history"]


class Administrator:
    """Somebody who changes what is served again and again, and remembers how it went."""

    def __init__(self, ports: list[int]) -> None:
        self.statuses: Counter[int] = Counter()
        self.wrong: list[Any] = []
        self._ports = ports
        self._over = False
        self._thread = threading.Thread(target=self._change)
        self._thread.start()

    def _change(self) -> None:
        while not self._over:
            for port in self._ports:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                body = json.dumps({"weights": {"2": 1}})
                headers = {"Authorization": "Bearer secret"}
                try:
                    connection.request("POST", "/v2/repository/models/scale/traffic", body, headers)
                    response = connection.getresponse()
                    said = response.read()
                    self.statuses[response.status] += 1
                    again = response.headers["Retry-After"]
                    if response.status != 200 and (response.status, again) != (503, "1"):
                        self.wrong.append((response.status, again, said))
                except OSError as error:
                    self.wrong.append(error)
                finally:
                    connection.close()
            time.sleep(0.05)

    def end(self) -> None:
        self._over = True
        self._thread.join(60)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_program_that_was_killed_is_taken_over_from_while_its_models_serve_on(models: Path, nodes: Nodes) -> None:
    rest, grpc, other, _ = nodes.ports
    given = (models, "--ray-address", nodes.address, "--port", rest, "--grpc-port", grpc, "--metrics-port", -1)
    given = (*given, "--workers", 2, "--admin-token", "secret")  # the cluster is full
    program = Program(*given)
    command = [sys.executable, "-m", "narrowcast", "serve", *map(str, given), "--engine", "ray"]
    second = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert second.returncode == 2
    assert "the cluster serves a repository already" in second.stderr
    old = replica_of("scale-2")
    assert old is not None
    load, administrator = Load([rest, other]), Administrator([rest, other])
    try:
        wait_for(lambda: administrator.statuses[200] > 0)
        program.process.kill()
        program.end()
        wait_for(lambda: administrator.statuses[503] > 3)
        assert get(rest, "/v2/health/ready") == (200, {"ready": True}), "it answers all that it is there for"
        assert get(rest, "/v2/models/scale/stats")[0] == 503
        elsewhere = [str(other if part == str(rest) else part) for part in command]
        third = subprocess.run(elsewhere, capture_output=True, text=True, timeout=120)
        assert third.returncode == 2
        assert f"listens for HTTP on 127.0.0.1:{rest}" in " ".join(third.stderr.replace("│", " ").split())
        with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{grpc}") as client:
            assert client.is_server_ready()
            with pytest.raises(tritonclient.grpc.InferenceServerException, match="UNAVAILABLE"):
                client.load_model("scale", headers={"authorization": "Bearer secret"})
        program = Program(*given)
        changed = administrator.statuses[200]
        wait_for(lambda: administrator.statuses[200] > changed)
        load.end()
        administrator.end()
        assert (load.wrong, administrator.wrong) == ([], [])
        assert load.seen.keys() == {"2"}
        assert old.is_running(), "it was taken over"
        (counted,) = get(rest, "/v2/models/scale/stats")[1]["model_stats"]
        assert counted["inference_count"] == 2 * load.seen.total()
        program.process.kill()
        program.end()
        program = Program(*given, "--max-batch", 2)
        assert not old.is_running(), "it ran otherwise than it is to be run now, and there was no room for both"
        with tritonclient.http.InferenceServerClient(f"127.0.0.1:{rest}") as client:
            assert infer(client, tritonclient.http) == 3.0
    finally:
        load.end()
        administrator.end()
        code = program.end()
    assert code == 0
    assert replica_of("scale-") is None, "nothing is left"


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_program_that_ends_while_it_loads_leaves_nothing(models: Path, nodes: Nodes) -> None:
    given = (models, "--ray-address", nodes.address, "--port", nodes.ports[0], "--metrics-port", -1, "--workers", 3)
    command = [sys.executable, "-m", "narrowcast", "serve", *map(str, given), "--engine", "ray"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: replica_of("scale-2") is not None)  # two run, and there is no room for the third
        process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, said) == (0, ""), errors
    assert "Traceback" not in errors
    assert replica_of("scale-") is None, "nothing is left"


def slow_artifact(folder: Path, manifest: Manifest, steps: int) -> Path:
    """Write an artifact that adds 1 to FP32 [n, 4] so many times, one after the other."""
    folder.mkdir(parents=True)
    vector = ["n", 4]
    body = helper.make_graph(
        [helper.make_node("Add", ["before", "one"], ["after"]), helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, vector),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, vector),
        ],
        [helper.make_tensor("one", TensorProto.FLOAT, [], [1.0])],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["steps", "", "x"], ["y"], body=body)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, vector)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, vector)],
        [helper.make_tensor("steps", TensorProto.INT64, [], [steps])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    save_artifact(folder, manifest)
    return folder


def replica_of(model: str) -> psutil.Process | None:
    """Return the process in which Ray runs the only replica of a model version."""
    for process in psutil.process_iter(["cmdline"]):
        if any(part.startswith("ray::ServeReplica:") and model in part for part in process.info["cmdline"] or ()):
            return process
    return None


REQUEST = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [0.0] * 4}]}


def ask(port: int, answers: list[tuple[int, Any]], wait: float = 120.0) -> None:
    """Ask the model once; a client that has waited long enough goes away."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=wait)
    try:
        connection.request("POST", "/v2/models/slow/infer", json.dumps(REQUEST))
        response = connection.getresponse()
        answers.append((response.status, json.loads(response.read())))
    except TimeoutError:
        answers.append((0, None))
    finally:
        connection.close()


def executions(port: int) -> int:
    (counted,) = get(port, "/v2/models/slow/stats")[1]["model_stats"]
    return counted["execution_count"]


@pytest.mark.exhaustive
def test_clients_that_leave_are_not_served_and_replicas_that_die_come_back(
    tmp_path: Path, manifest_of: ManifestOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    port, grpc = free_ports(2)
    folder = slow_artifact(tmp_path / "slow", manifest_of(), 2_000_000)
    program = Program(folder, "--port", port, "--grpc-port", grpc, "--metrics-port", -1, "--max-batch", 1)
    try:
        answers: list[tuple[int, Any]] = []
        first = threading.Thread(target=ask, args=(port, answers))
        first.start()
        time.sleep(0.3)
        left: list[tuple[int, Any]] = []
        ask(port, left, wait=0.3)
        assert left == [(0, None)], "the model is too quick for this test"
        first.join(120)
        assert [status for status, _ in answers] == [200]
        began = time.monotonic()
        ask(port, answers)
        took = time.monotonic() - began
        assert [status for status, _ in answers] == [200, 200]
        assert executions(port) == 2, "what the client asked for that left was run"
        waiting = [threading.Thread(target=ask, args=(port, answers)) for _ in range(4)]
        for thread in waiting:
            thread.start()
        time.sleep(0.3)
        with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{grpc}") as hurried:
            item = tritonclient.grpc.InferInput("x", [1, 4], "FP32")
            item.set_data_from_numpy(np.ones((1, 4), np.float32))
            with pytest.raises(tritonclient.grpc.InferenceServerException, match="and the client waits"):
                hurried.infer("slow", [item], client_timeout=2 * took)
        for thread in waiting:
            thread.join(120)
        assert [status for status, _ in answers] == [200] * 6, answers
        counts = [executions(port)]
        first = threading.Thread(target=ask, args=(port, answers))
        first.start()
        with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{grpc}") as fickle:
            time.sleep(0.3)
            fickle.async_infer("slow", [item], lambda result, error: None).cancel()
        first.join(120)
        ask(port, answers)
        counts.append(executions(port))
        assert counts[1] - counts[0] == 2, "what was cancelled was run"
        victim = replica_of("slow-1")
        assert victim is not None
        died: list[tuple[int, Any]] = []
        client = threading.Thread(target=ask, args=(port, died))
        client.start()
        time.sleep(0.3)
        victim.kill()
        client.join(120)
        assert died[0][0] == 503
        assert "may be sent again" in died[0][1]["error"]

        def again() -> bool:
            ask(port, answers)
            return answers[-1][0] == 200

        wait_for(again)
    finally:
        code = program.end()
    assert code == 0


@pytest.mark.exhaustive
def test_a_replica_whose_model_hangs_is_replaced(
    tmp_path: Path, manifest_of: ManifestOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    (port,) = free_ports(1)
    folder = slow_artifact(tmp_path / "slow", manifest_of(), 10_000_000_000)
    program = Program(folder, "--port", port, "--grpc-port", -1, "--metrics-port", -1, "--batch-timeout", 1)
    try:
        hung = replica_of("slow-1")
        assert hung is not None
        answers: list[tuple[int, Any]] = []
        ask(port, answers)
        assert answers[0][0] == 504
        assert "ran longer than 1 s" in answers[0][1]["error"]
        assert get(port, "/v2/health/live")[0] == 200
        wait_for(lambda: not hung.is_running() and replica_of("slow-1") is not None)
    finally:
        code = program.end()
    assert code == 0


#: Serves with delays of autoscaling that a test can wait for.
SCALED = """
import sys
from pathlib import Path
from narrowcast.cli.console import print_json
from narrowcast.serving.hosting import Hosting
from narrowcast.serving.ray.engine import run
from narrowcast.serving.ray.plan import Scale
from narrowcast.serving.scheduling.queue import Batching
from narrowcast.serving.scheduling.scheduler import Settings
from narrowcast.serving.server import ServerOptions

run(
    [Path(sys.argv[1])],
    Hosting(settings=Settings(Batching(1))),
    Scale(most=2, up_seconds=1, down_seconds=1),
    ServerOptions(port=int(sys.argv[2]), grpc_port=None, metrics_port=int(sys.argv[3])),
    lambda ports, failed: print_json({"listening": ports}),
)
"""


@pytest.mark.exhaustive
def test_replicas_come_with_load_and_go_without_it(
    tmp_path: Path, manifest_of: ManifestOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    port, metrics = free_ports(2)
    folder = slow_artifact(tmp_path / "slow", manifest_of(), 200_000)
    program = Program(command=[sys.executable, "-c", SCALED, str(folder), str(port), str(metrics)])
    over = threading.Event()

    def client(answers: list[tuple[int, Any]]) -> None:
        while not over.is_set():
            ask(port, answers)

    answers: list[tuple[int, Any]] = []
    clients = [threading.Thread(target=client, args=(answers,)) for _ in range(8)]
    try:
        assert values(metrics, "narrowcast_workers") == {"1": 1}
        for thread in clients:
            thread.start()
        wait_for(lambda: values(metrics, "narrowcast_workers") == {"1": 2})
        over.set()
        for thread in clients:
            thread.join(120)
        assert {status for status, _ in answers} == {200}
        wait_for(lambda: values(metrics, "narrowcast_workers") == {"1": 1})
        ask(port, answers)
        assert answers[-1][0] == 200
        assert values(metrics, "nv_inference_request_success") == {"1": len(answers)}, "what left was counted"
    finally:
        over.set()
        code = program.end()
    assert code == 0
