"""What observers are told of requests, over REST and gRPC: once each, with names, times and reasons."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from serving_models import Gate, function, request

from narrowcast.oip.messages import INFERENCE
from narrowcast.serving.catalogue import Hosting
from narrowcast.serving.scheduling.queue import Batching
from narrowcast.serving.scheduling.scheduler import Settings
from narrowcast.serving.watching.records import RequestRecord
from narrowcast.serving.workers.sources import Placement

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


class Seen:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.records: list[RequestRecord] = []

    def ended(self, record: RequestRecord) -> None:
        self.records.append(record)

    def last(self, count: int) -> RequestRecord:
        end = time.monotonic() + 20
        while len(self.records) < count:
            assert time.monotonic() < end, "nobody was told"
            time.sleep(0.005)
        assert len(self.records) == count
        return self.records[-1]


@pytest.fixture(scope="module", params=[Placement.INLINE, Placement.THREAD], ids=str)
def watched(serve_once: Any, request: pytest.FixtureRequest) -> tuple[Any, Seen]:
    seen = Seen()
    running = serve_once(
        {"scale": function()}, hosting=Hosting(request.param, 1, Settings(Batching(8))), observers=(seen,), grpc_port=0
    )
    return running, seen


def call(running: Any, message: Any, *metadata: tuple[str, str]) -> tuple[Any, dict[str, str]]:
    """Return the response (or the status) of a ModelInfer call, and its trailing metadata."""
    with grpc.insecure_channel(running.grpc_address) as channel:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=INFERENCE["ModelInferRequest"].SerializeToString,
            response_deserializer=INFERENCE["ModelInferResponse"].FromString,
        )
        try:
            response, done = infer.with_call(message, metadata=metadata, timeout=20)
        except grpc.RpcError as error:
            response = done = error  # type: ignore[assignment]
        return response, {str(key): str(value) for key, value in done.trailing_metadata()}


def message(rows: int = 1, **more: Any) -> Any:
    asked = INFERENCE["ModelInferRequest"](model_name="scale", **more)
    asked.inputs.add(name="x", datatype="FP32", shape=[rows, 4]).contents.fp32_contents.extend([1.0] * 4 * rows)
    return asked


def test_an_answered_request(watched: tuple[Any, Seen]) -> None:
    running, seen = watched
    count = len(seen.records)
    answer = running.infer("scale", request(1, 2, 3, id="mine"))
    record = seen.last(count + 1)
    assert answer.status == 200
    assert answer.headers["X-Request-Id"] == record.request_id == "mine"
    assert (record.protocol, record.method, record.target) == ("http", "POST", "/v2/models/scale/infer")
    assert (record.model, record.version, record.rows, record.status, record.reason) == ("scale", "1", 3, 200, "")
    assert 0 <= record.queue_ns <= record.total_ns
    assert 0 < record.compute_ns <= record.total_ns
    assert record.trace_id == ""


@pytest.mark.parametrize(
    ("sent", "headers", "named"),
    [
        ({"id": "body"}, {"X_Request_Id": "header"}, "header"),
        ({"id": "body"}, {}, "body"),
        ({}, {"traceparent": PARENT}, TRACE),
        ({}, {"traceparent": "00-" + "0" * 32 + "-b7ad6b7169203331-01"}, None),
        ({"id": "two\r\nlines"}, {}, None),
        ({"id": "x" * 129}, {}, None),
        ({}, {"X_Request_Id": "two words"}, None),
        ({}, {}, None),
    ],
    ids=["header", "body", "trace", "no-trace", "lines", "long", "words", "nothing"],
)
def test_what_a_request_is_called(
    watched: tuple[Any, Seen], sent: dict[str, str], headers: dict[str, str], named: str | None
) -> None:
    running, seen = watched
    count = len(seen.records)
    answer = running.infer("scale", request(1, **sent), **headers)
    record = seen.last(count + 1)
    assert answer.status == 200
    assert answer.headers["X-Request-Id"] == record.request_id
    if named is None:
        assert len(record.request_id) == 16
        assert int(record.request_id, 16) >= 0
    else:
        assert record.request_id == named
    assert record.trace_id == (TRACE if headers.get("traceparent") == PARENT else "")


@pytest.mark.parametrize(
    ("target", "body", "status", "model"),
    [
        ("/v2/models/scale/infer", b"{", 400, "scale"),
        ("/v2/models/none/infer", b"{}", 404, ""),
        ("/nowhere", b"", 404, ""),
    ],
)
def test_a_refused_request(watched: tuple[Any, Seen], target: str, body: bytes, status: int, model: str) -> None:
    running, seen = watched
    count = len(seen.records)
    answer = running.ask("POST", target, body, X_Request_Id="r1")
    record = seen.last(count + 1)
    assert answer.status == record.status == status
    assert answer.headers["X-Request-Id"] == record.request_id == "r1"
    assert record.reason == answer.error
    assert record.model == model
    assert (record.queue_ns, record.compute_ns) == (0, 0)


@pytest.mark.parametrize(
    ("sent", "status", "reason"),
    [
        (b"nonsense\r\n\r\n", 400, "not an HTTP request"),
        (b"POST /v2/models/scale/infer HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", 413, "the body is larger"),
        (
            b"POST /v2/models/scale/infer HTTP/1.1\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
            400,
            "gzip",
        ),
    ],
    ids=["nonsense", "large", "gzip"],
)
def test_what_cannot_be_read_is_told_too(watched: tuple[Any, Seen], sent: bytes, status: int, reason: str) -> None:
    running, seen = watched
    count = len(seen.records)
    with socket.create_connection(("127.0.0.1", running.server.ports["http"]), timeout=20) as connection:
        connection.sendall(sent)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 %d " % status)
    record = seen.last(count + 1)
    assert (record.protocol, record.method, record.target, record.status) == ("http", "", "", status)
    assert reason in record.reason


def test_a_call(watched: tuple[Any, Seen]) -> None:
    running, seen = watched
    count = len(seen.records)
    response, trailing = call(running, message(2, id="called"), ("traceparent", PARENT))
    record = seen.last(count + 1)
    assert list(response.outputs[0].shape) == [2, 4]
    assert trailing["x-request-id"] == record.request_id == "called"
    assert (record.protocol, record.method) == ("grpc", "ModelInfer")
    assert (record.model, record.version, record.rows, record.status) == ("scale", "1", 2, 200)
    assert record.trace_id == TRACE
    assert 0 < record.compute_ns <= record.total_ns


def test_a_refused_call(watched: tuple[Any, Seen]) -> None:
    running, seen = watched
    count = len(seen.records)
    error, trailing = call(running, message(model_version="9"), ("x-request-id", "r2"))
    record = seen.last(count + 1)
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert trailing["x-request-id"] == record.request_id == "r2"
    assert (record.model, record.version, record.status) == ("scale", "9", 404)
    assert record.reason == error.details()


def test_each_request_of_a_stream(watched: tuple[Any, Seen]) -> None:
    running, seen = watched
    count = len(seen.records)
    with grpc.insecure_channel(running.grpc_address) as channel:
        stream = channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=INFERENCE["ModelInferRequest"].SerializeToString,
            response_deserializer=INFERENCE["ModelStreamInferResponse"].FromString,
        )
        asked = [message(1, id="a"), message(2, id="b", model_version="7"), message(3, id="c")]
        answers = list(stream(iter(asked), timeout=20))
    seen.last(count + 3)
    assert len(answers) == 3
    found = sorted((record.request_id, record.status, record.rows) for record in seen.records[count:])
    assert found == [("a", 200, 1), ("b", 404, 0), ("c", 200, 3)]


def gated(serve: Callable[..., Any], gate: Gate, seen: Seen) -> Any:
    hosting = Hosting(Placement.THREAD, 1, Settings(Batching(1), queue=1))
    return serve({"gate": function(gate)}, hosting=hosting, observers=(seen,))


def test_waiting_expiring_leaving_and_overload(serve: Callable[..., Any]) -> None:
    """One request runs, one waits until it has expired, one is one too many, and one's client leaves."""
    gate, seen = Gate(), Seen()
    running = gated(serve, gate, seen)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(running.infer, "gate", request(1, id="first"))
        assert gate.entered.acquire(timeout=20)
        late = running.infer("gate", request(2, id="late", parameters={"timeout": 30_000}))
        record = seen.last(1)
        assert late.status == record.status == 504
        assert (record.request_id, record.compute_ns) == ("late", 0)
        assert 30_000_000 <= record.queue_ns <= record.total_ns
        connection = http.client.HTTPConnection(running.address, timeout=20)
        connection.request("POST", "/v2/models/gate/infer", request(3, id="gone"))
        scheduler = running.server.catalogue.find("gate").scheduler
        while not scheduler.pending:
            time.sleep(0.005)
        many = running.infer("gate", request(4, id="many"))
        record = seen.last(2)
        assert many.status == record.status == 503
        assert (record.request_id, record.model) == ("many", "gate")
        assert "requests wait already" in record.reason
        connection.close()
        record = seen.last(3)
        assert (record.request_id, record.status, record.reason) == ("gone", 499, "the client went away")
        gate.open.release()
        assert first.result().status == 200
    record = seen.last(4)
    assert record.request_id == "first"
    assert record.compute_ns >= 30_000_000


def test_a_server_that_nobody_watches_names_nothing(serve: Callable[..., Any]) -> None:
    answer = serve({"scale": function()}).infer("scale", request(1), X_Request_Id="r3")
    assert answer.status == 200
    assert "X-Request-Id" not in answer.headers
