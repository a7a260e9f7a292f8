"""What goes wrong around a request: overload, deadlines, clients that leave, models that fail, and the end of the server."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving_models import Gate, function, request

from narrowcast.errors import OutputError, RuntimeFailedError
from narrowcast.serving.catalogue import Hosting
from narrowcast.serving.scheduling.queue import Batching
from narrowcast.serving.scheduling.scheduler import Settings
from narrowcast.serving.signature import Tensors
from narrowcast.serving.workers.sources import Placement


def gated(serve: Any, gate: Gate, **settings: Any) -> Any:
    """A server with one thread that waits for a gate."""
    settings = {"batching": Batching(1)} | settings
    return serve({"gate": function(gate)}, hosting=Hosting(Placement.THREAD, 1, Settings(**settings)))


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(0.005)


def scheduler(running: Any, model: str = "gate") -> Any:
    return running.server.catalogue.find(model).scheduler


def test_overload_is_refused_and_over_when_it_is_over(serve: Any) -> None:
    gate = Gate()
    running = gated(serve, gate, queue=4)
    with ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(running.infer, "gate", request(number)) for number in range(20)]
        wait_for(lambda: sum(answer.done() for answer in answers) == 15)
        refused = [answer.result() for answer in answers if answer.done()]
        assert {answer.status for answer in refused} == {503}
        assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
        assert scheduler(running).pending == 4
        for _ in range(5):
            gate.open.release()
        assert sorted(answer.result().status for answer in answers) == [200] * 5 + [503] * 15
    gate.open.release()
    assert running.infer("gate", request(1)).status == 200


def test_a_deadline_travels_with_the_request(serve: Any) -> None:
    gate = Gate()
    running = gated(serve, gate)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(running.infer, "gate", request(1))
        assert gate.entered.acquire(timeout=20)
        late = running.infer("gate", request(2, parameters={"timeout": 20_000}))
        assert late.status == 504
        assert "never ran" in late.error
        gate.open.release()
        assert first.result().status == 200
    assert gate.ran == [[1.0]]


def test_a_client_that_disconnects_never_runs(serve: Any) -> None:
    gate = Gate()
    running = gated(serve, gate)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(running.infer, "gate", request(1))
        assert gate.entered.acquire(timeout=20)
        leaving = http.client.HTTPConnection("127.0.0.1", running.server.ports["http"])
        leaving.request("POST", "/v2/models/gate/infer", request(2))
        wait_for(lambda: scheduler(running).pending == 1)
        leaving.close()
        wait_for(lambda: scheduler(running).pending == 0)
        gate.open.release()
        assert first.result().status == 200
    gate.open.release()
    assert running.infer("gate", request(3)).status == 200
    assert gate.ran == [[1.0], [3.0]]
    assert scheduler(running).statistics.cancelled == 1


def test_a_poisoned_request_fails_alone_and_says_why(serve: Any) -> None:
    gate = Gate()

    def picky(inputs: Tensors) -> Tensors:
        if (inputs["x"] == 666).any():
            raise RuntimeFailedError("this value is poison")
        return gate(inputs)

    hosting = Hosting(Placement.THREAD, 1, Settings(Batching(8)))
    running = serve({"picky": function(picky)}, hosting=hosting)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(running.infer, "picky", request(0))
        assert gate.entered.acquire(timeout=20)
        answers = {value: pool.submit(running.infer, "picky", request(value)) for value in (1, 666, 3)}
        wait_for(lambda: scheduler(running, "picky").pending == 3)
        for _ in range(3):
            gate.open.release()
        assert first.result().status == 200
        assert {value: answer.result().status for value, answer in answers.items()} == {1: 200, 666: 500, 3: 200}
        assert "poison" in answers[666].result().error


def test_an_error_of_a_model_is_its_own(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    def broken(inputs: Tensors) -> Tensors:
        raise ZeroDivisionError("by zero")

    running = serve(
        {"broken": function(broken), "wrong": function(lambda inputs: {"z": inputs["x"]}), "fine": function()}
    )
    assert running.infer("broken", request(1)).status == 500
    assert "by zero" in caplog.text
    assert "gave nothing for output 'y'" in running.infer("wrong", request(1)).error
    assert running.infer("fine", request(1)).status == 200


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v2/", 200),
        ("GET", "/v2/models/fine/infer", 405),
        ("POST", "/v2/health/live", 405),
        ("DELETE", "/v2/models/fine", 405),
        ("GET", "/v2/models/fine", 200),
        ("HEAD", "/v2/models/fine", 200),
        ("GET", "/v2/models/none", 404),
        ("GET", "/v2/models/fine/versions/2", 404),
        ("GET", "/v2/models/fine/versions/1/config", 200),
        ("GET", "/v2/models/fine/versions/..%2f1", 404),
        ("GET", "/v2/models/fine/versions/%2e%2e/ready", 404),
        ("GET", "/v2/models/fine/versions/-1", 404),
        ("GET", "/v2/models/fine/versions/1" + "0" * 60, 404),
        ("GET", "/v2/models/fine/versions/%d9%a1", 404),
        ("POST", "/v2/repository/models/..%2ffine/load", 401),
        ("GET", "/openapi.json", 200),
        ("GET", "/v2/models/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/v2/models/%00/ready", 404),
        ("GET", "/v2/models/%ff/ready", 404),
        ("GET", "/v2/models/stats", 200),
        ("GET", "/v2/models/fine/stats?x=1", 200),
        ("GET", "/v2/cudasharedmemory/status", 404),
        ("GET", "/v2/systemsharedmemory/status", 200),
        ("GET", "/v2/systemsharedmemory/region/none/status", 400),
        ("POST", "/v2/systemsharedmemory/region/r/register", 403),
        ("POST", "/v2/repository/index", 200),
    ],
)
def test_targets(serve_once: Any, method: str, target: str, status: int, shared: list[Any]) -> None:
    if not shared:
        shared.append(serve_once({"fine": function()}))
    assert shared[0].ask(method, target).status == status


@pytest.fixture(scope="module")
def shared() -> list[Any]:
    return []


def test_what_is_not_there_is_not_advertised(serve_once: Any, shared: list[Any]) -> None:
    if not shared:
        shared.append(serve_once({"fine": function()}))
    extensions = shared[0].ask("GET", "/v2").json["extensions"]
    assert set(extensions) == {
        *("binary_tensor_data", "model_configuration", "model_repository", "parameters", "schedule_policy"),
        *("statistics", "system_shared_memory"),
    }


@pytest.mark.parametrize("target", ["fine/load", "fine/unload", "fine/rollback", "fine/versions/1/promote"])
def test_administration_is_for_those_who_have_the_token(serve: Any, target: str) -> None:
    for token, given, status in ((None, "Bearer x", 403), (None, "Bearer None", 403), ("x", "Bearer y", 401)):
        running = serve({"fine": function()}, token=token)
        answer = running.ask("POST", f"/v2/repository/models/{target}", Authorization=given)
        assert (answer.status, "administration" in answer.error) == (status, True)
        assert running.infer("fine", request(1)).status == 200


def test_health_is_a_status_and_a_document(serve_once: Any, shared: list[Any]) -> None:
    if not shared:
        shared.append(serve_once({"fine": function()}))
    for target, said in (
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2/models/fine/ready", {"name": "fine", "ready": True}),
    ):
        answer = shared[0].ask("GET", target)
        assert (answer.status, answer.json) == (200, said)


def test_statistics_count_by_window_and_the_metrics_agree(serve: Any) -> None:
    running = serve({"fine": function()}, hosting=Hosting(Placement.INLINE, 1, Settings(Batching(8))), metrics_port=0)

    def counted() -> dict[str, Any]:
        return running.ask("GET", "/v2/models/fine/stats").json["model_stats"][0]

    before = counted()
    for _ in range(5):
        assert running.infer("fine", request(1, 2)).status == 200
    assert running.infer("fine", b"{}").status == 400
    after = counted()
    assert after["inference_count"] - before["inference_count"] == 10
    assert after["execution_count"] - before["execution_count"] == 5
    assert after["inference_stats"]["success"]["count"] == 5
    assert after["inference_stats"]["queue"]["count"] == 5
    assert after["inference_stats"]["fail"]["count"] == 0
    assert 0 < after["inference_stats"]["compute_infer"]["ns"] < after["inference_stats"]["success"]["ns"]
    assert abs(after["last_inference"] / 1000 - time.time()) < 60
    text = running.ask("GET", "/metrics", port="metrics").body.decode()
    assert 'nv_inference_request_success{model="fine",version="1"} 5\n' in text, "as Triton calls it"
    samples = {  # the parser calls counters by OpenMetrics' names
        (sample.name, sample.labels.get("le", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("model") == "fine"
    }
    assert samples["nv_inference_request_success_total", ""] == 5
    assert samples["nv_inference_count_total", ""] == 10
    assert samples["nv_inference_exec_count_total", ""] == 5
    assert samples["nv_inference_pending_request_count", ""] == 0
    assert samples["nv_inference_request_duration_us_total", ""] > 0
    assert samples["narrowcast_request_duration_seconds_bucket", "+Inf"] == 5
    assert samples["narrowcast_request_duration_seconds_count", ""] == 5
    assert running.ask("GET", "/nothing", port="metrics").status == 404


def test_a_region_that_its_client_makes_smaller_is_refused_and_kills_nobody(serve: Any) -> None:
    running = serve({"fine": function()}, shared_memory=True)
    path = Path("/dev/shm/narrowcast_test_shrinks")
    try:
        path.write_bytes(bytes(4096 * 4))
        register = json.dumps({"key": f"/{path.name}", "byte_size": 4096 * 4}).encode()
        assert running.ask("POST", "/v2/systemsharedmemory/region/r/register", register).status == 200
        with path.open("r+b") as file:
            file.truncate(4096)
        place = {"shared_memory_region": "r", "shared_memory_offset": 8192, "shared_memory_byte_size": 16}
        item = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": place}
        answer = running.infer("fine", json.dumps({"inputs": [item]}).encode())
        assert (answer.status, "become smaller" in answer.error) == (400, True)
        body = request(1, outputs=[{"name": "y", "parameters": place}])
        answer = running.infer("fine", body)
        assert (answer.status, "become smaller" in answer.error) == (400, True)
        assert running.infer("fine", request(1)).status == 200
    finally:
        path.unlink()


@pytest.mark.parametrize(("listener", "said"), [("port", "Address already in use"), ("grpc_port", "it is taken")])
def test_a_port_that_is_taken_is_named(serve: Any, listener: str, said: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OutputError, match=f"127.0.0.1:{port} cannot be listened on: {said}"):
            serve({"fine": function()}, **{listener: port})


# The end --------------------------------------------------------------------------------------------------------------


def test_the_server_finishes_what_it_began_and_says_that_it_is_ending(serve: Any) -> None:
    gate = Gate()
    running = gated(serve, gate)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(running.infer, "gate", request(number)) for number in range(3)]
        assert gate.entered.acquire(timeout=20)
        wait_for(lambda: scheduler(running).pending == 2)
        stopped = threading.Event()
        pool.submit(lambda: (running.stop(), stopped.set()))
        wait_for(lambda: running.ask("GET", "/v2/health/ready").status == 503)
        assert running.ask("GET", "/v2/health/live").status == 200
        refused = running.infer("gate", request(9))
        assert refused.status == 503
        assert refused.headers["Connection"] == "close"
        assert not stopped.is_set()
        for _ in range(3):
            gate.open.release()
        assert [answer.result().status for answer in answers] == [200] * 3
        assert stopped.wait(20)


def test_what_is_not_finished_within_the_grace_is_told_and_not_reset(serve: Any) -> None:
    gate = Gate()
    hosting = Hosting(Placement.THREAD, 1, Settings(Batching(1)))
    running = serve({"gate": function(gate)}, hosting=hosting, grace=0.3)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(running.infer, "gate", request(number)) for number in range(3)]
        assert gate.entered.acquire(timeout=20)
        wait_for(lambda: scheduler(running).pending == 2)
        running.stop()
        gate.open.release()
        assert [answer.result().status for answer in answers] == [503] * 3
        assert "ending" in answers[2].result().error


def test_nothing_large_is_allocated_for_what_a_client_only_claims(serve: Any) -> None:
    """A shape of 64 TB and a length of 60 MB, of which nothing comes."""
    running = serve({"fine": function()})
    claims = {"name": "x", "shape": [1 << 42, 4], "datatype": "FP32", "parameters": {"binary_data_size": 1 << 46}}
    head = json.dumps({"inputs": [claims]}).encode()
    answer = running.infer("fine", head, Inference_Header_Content_Length=str(len(head)))
    assert answer.status == 400
    with socket.create_connection(("127.0.0.1", running.server.ports["http"])) as connection:
        connection.sendall(b"POST /v2/models/fine/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 60000000\r\n\r\n{")
        assert running.infer("fine", request(1)).status == 200
