"""Requests as spans: their names, parents, times and attributes, and that a collector gets them."""

from __future__ import annotations

import gzip
import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from serving_models import function, request
from test_request_records import TRACE, Seen, call, message

from narrowcast.errors import RuntimeFailedError
from narrowcast.serving.catalogue import Hosting
from narrowcast.serving.scheduling.queue import Batching
from narrowcast.serving.scheduling.scheduler import Settings
from narrowcast.serving.watching.tracing import Tracing, to_collector
from narrowcast.serving.workers.sources import Placement

PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
UNSAMPLED = f"00-{TRACE}-b7ad6b7169203331-00"


def failing(inputs: Any) -> Any:
    raise RuntimeFailedError("planted")


class Traced:
    """A server whose spans are kept."""

    def __init__(self, serve: Any) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.seen = Seen()
        hosting = Hosting(Placement.THREAD, 1, Settings(Batching(8)))
        sources = {"scale": function(), "bad": function(failing)}
        self.running = serve(sources, hosting=hosting, observers=(Tracing(provider), self.seen), grpc_port=0)

    def spans(self, ask: Any) -> dict[str, ReadableSpan]:
        """Return the spans by name that a request leaves."""
        self.exporter.clear()
        count = len(self.seen.records)
        ask(self.running)
        self.seen.last(count + 1)
        return {span.name: span for span in self.exporter.get_finished_spans()}


@pytest.fixture(scope="module")
def traced(serve_once: Any) -> Traced:
    return Traced(serve_once)


def ns(span: ReadableSpan) -> tuple[int, int]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time, span.end_time


def test_nobody_who_does_not_ask_imports_it() -> None:
    told = "import sys, narrowcast.serving.running; print([m for m in sys.modules if m in ('opentelemetry', 'pynvml')])"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "[]\n"


def test_a_request_its_wait_and_its_batch(traced: Traced) -> None:
    before = time.time_ns()
    spans = traced.spans(lambda running: running.infer("scale", request(1, 2, id="mine"), traceparent=PARENT))
    after = time.time_ns()
    name = "POST /v2/models/{model_name}/infer"
    assert spans.keys() == {name, "queue", "compute"}
    whole, queue, compute = spans[name], spans["queue"], spans["compute"]
    assert whole.kind is SpanKind.SERVER
    assert whole.parent is not None
    assert f"{whole.parent.trace_id:032x}" == TRACE
    assert f"{whole.parent.span_id:016x}" == "b7ad6b7169203331"
    assert whole.parent.is_remote
    assert queue.parent == compute.parent == whole.context
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {TRACE}
    assert dict(whole.attributes or {}) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v2/models/{model_name}/infer",
        "url.path": "/v2/models/scale/infer",
        "url.scheme": "http",
        "narrowcast.request.id": "mine",
        "narrowcast.model.name": "scale",
        "narrowcast.model.version": "1",
        "narrowcast.rows": 2,
    }
    assert whole.status.status_code is StatusCode.UNSET
    assert before - 10**8 <= ns(whole)[0] <= ns(queue)[0] <= ns(queue)[1] == ns(compute)[0] < ns(compute)[1]
    assert ns(compute)[1] <= ns(whole)[1] <= after + 10**8
    assert traced.seen.records[-1].trace_id == TRACE


def test_a_request_without_a_context_begins_a_trace(traced: Traced) -> None:
    spans = traced.spans(lambda running: running.infer("scale", request(1)))
    whole = spans["POST /v2/models/{model_name}/infer"]
    assert whole.parent is None
    record = traced.seen.records[-1]
    assert record.trace_id == f"{whole.context.trace_id:032x}"


def test_who_is_not_sampled_leaves_no_span(traced: Traced) -> None:
    assert traced.spans(lambda running: running.infer("scale", request(1), traceparent=UNSAMPLED)) == {}
    assert traced.seen.records[-1].trace_id == TRACE


@pytest.mark.parametrize(
    ("target", "name", "status", "failed"),
    [
        ("/v2/models/bad/infer", "POST /v2/models/{model_name}/infer", 500, True),
        (
            "/v2/models/scale/versions/1/infer",
            "POST /v2/models/{model_name}/versions/{model_version}/infer",
            200,
            False,
        ),
        ("/v2/models/none/infer", "POST", 404, False),
        ("/" + "x" * 400, "POST", 404, False),
        ("/v2/repository/models/net/unload", "POST /v2/repository/models/{model_name}/unload", 401, False),
    ],
    ids=["fails", "version", "unknown", "nowhere", "administration"],
)
def test_names_are_few_and_errors_are_the_servers(
    traced: Traced, target: str, name: str, status: int, failed: bool
) -> None:
    spans = traced.spans(lambda running: running.ask("POST", target, request(1)))
    whole = spans[name]
    attributes = dict(whole.attributes or {})
    assert attributes["http.response.status_code"] == status
    assert attributes.get("error.type") == ("500" if failed else None)
    assert whole.status.status_code is (StatusCode.ERROR if failed else StatusCode.UNSET)
    assert ("narrowcast.reason" in attributes) == (status != 200)
    assert len(str(attributes["url.path"])) <= 256


def test_probes_leave_no_span(traced: Traced) -> None:
    assert traced.spans(lambda running: running.ask("GET", "/v2/health/ready")) == {}


def test_a_call(traced: Traced) -> None:
    spans = traced.spans(lambda running: call(running, message(3), ("traceparent", PARENT)))
    whole = spans["inference.GRPCInferenceService/ModelInfer"]
    assert f"{whole.context.trace_id:032x}" == TRACE
    attributes = dict(whole.attributes or {})
    assert attributes.pop("narrowcast.request.id") == TRACE
    assert attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": "inference.GRPCInferenceService/ModelInfer",
        "rpc.response.status_code": "OK",
        "narrowcast.model.name": "scale",
        "narrowcast.model.version": "1",
        "narrowcast.rows": 3,
    }
    assert spans.keys() == {whole.name, "queue", "compute"}
    refused = traced.spans(lambda running: call(running, message(model_version="9")))
    (span,) = refused.values()
    assert dict(span.attributes or {})["rpc.response.status_code"] == "NOT_FOUND"


# a collector ----------------------------------------------------------------------------------------------------------


class Collector(http.server.ThreadingHTTPServer):
    """Receives spans on loopback."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.got: list[tuple[str, dict[str, str], ExportTraceServiceRequest]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        assert isinstance(self.server, Collector)
        self.server.got.append((self.path, dict(self.headers), ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


@pytest.mark.parametrize("named", [None, "shop"])
def test_a_collector_gets_spans(
    collector: Collector, serve: Any, monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=t1")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    if named is not None:
        monkeypatch.setenv("OTEL_SERVICE_NAME", named)
    tracing = to_collector()
    running = serve({"scale": function()}, observers=(tracing,))
    assert running.infer("scale", request(1), traceparent=PARENT).status == 200
    running.stop()
    tracing.close()
    ((path, headers, export),) = collector.got
    assert path == "/v1/traces"
    assert {name.lower(): value for name, value in headers.items()}["x-tenant"] == "t1"
    (resource,) = export.resource_spans
    found = {item.key: item.value.string_value for item in resource.resource.attributes}
    assert found["service.name"] == (named or "narrowcast")
    assert found["deployment.environment.name"] == "test"
    (scope,) = resource.scope_spans
    assert scope.scope.name == "narrowcast.serving"
    assert sorted(span.name for span in scope.spans) == ["POST /v2/models/{model_name}/infer", "compute", "queue"]
    assert {span.trace_id.hex() for span in scope.spans} == {TRACE}
