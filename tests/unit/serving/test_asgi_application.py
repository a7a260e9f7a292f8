"""The server as an ASGI application: the same answers as over its own listener, mounted, run, bounded and left."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx2
import numpy as np
import pytest
import tritonclient.http as triton
import uvicorn
from serving_models import Gate, doubled, function, request
from starlette.applications import Starlette
from starlette.routing import Mount

from narrowcast.errors import ConfigError, NarrowcastError
from narrowcast.serving.asgi import EMBEDDED, Application
from narrowcast.serving.catalogue import Hosting
from narrowcast.serving.limits import Limits
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.repository import Repository
from narrowcast.serving.workers.sources import FunctionSource, Placement, Source

TOKEN = "s3cret"
THREAD = Hosting(Placement.THREAD)


def application(sources: dict[str, Source] | None = None, **options: Any) -> Application:
    models = sources if sources is not None else {"net": function()}
    return Application(Repository(sources=models), THREAD, replace(EMBEDDED, grace=10.0, **options))


def mounted(inner: Application) -> Starlette:
    @asynccontextmanager
    async def lifespan(outer: Starlette) -> AsyncIterator[None]:
        async with inner:
            yield

    return Starlette(routes=[Mount("/in ference", inner), Mount("/watch", inner.metrics)], lifespan=lifespan)


async def ask(app: Any, method: str, target: str, body: Any = b"", **headers: str) -> httpx2.Response:
    named = {"accept-encoding": "identity"} | {name.replace("_", "-"): value for name, value in headers.items()}
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://here") as client:
        return await client.request(method, target, content=body or None, headers=named)


BINARY_HEAD = json.dumps(
    {
        "id": "seven",
        "inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}}],
        "parameters": {"binary_data_output": True},
    }
).encode()
BINARY = BINARY_HEAD + np.arange(4, dtype=np.float32).tobytes()


@pytest.mark.parametrize(
    ("method", "target", "body", "headers"),
    [
        ("GET", "/v2", b"", {}),
        ("GET", "/v2/health/live", b"", {}),
        ("HEAD", "/v2/health/ready", b"", {}),
        ("GET", "/v2/models/net", b"", {}),
        ("GET", "/v2/models/n%65t/versions/1/config", b"", {}),
        ("POST", "/v2/models/net/infer", request(1.0, 2.0), {}),
        ("POST", "/v2/models/net/infer?verbose=1", BINARY, {"Inference_Header_Content_Length": str(len(BINARY_HEAD))}),
        ("POST", "/v2/models/net/infer", gzip.compress(request(1.0), mtime=0), {"Content_Encoding": "gzip"}),
        ("POST", "/v2/models/net/infer", request(1.0), {"Accept_Encoding": "gzip"}),
        ("POST", "/v2/models/net/infer", b"{", {}),
        ("POST", "/v2/models/net/infer", request(1.0), {"Content_Encoding": "br"}),
        ("POST", "/v2/models/other/infer", request(1.0), {}),
        ("GET", "/v2/models/net/infer", b"", {}),
        ("GET", "/elsewhere/v2", b"", {}),
        ("POST", "/v2/repository/models/net/load", b"", {}),
        ("POST", "/v2/repository/models/net/unload", b"", {"Authorization": "Bearer wrong"}),
        ("POST", "/v2/repository/models/net/load", b"", {"Authorization": f"Bearer {TOKEN}"}),
        ("POST", "/v2/repository/index", b"", {}),
    ],
)
def test_the_answers_are_those_of_the_own_listener(
    serve: Any, method: str, target: str, body: bytes, headers: dict[str, str]
) -> None:
    own = serve({"net": function()}).ask(method, target, body, **headers)

    async def embedded() -> httpx2.Response:
        async with application(token=TOKEN) as inner:
            return await ask(inner, method, target, body, **headers)

    answer = asyncio.run(embedded())
    assert answer.status_code == own.status
    assert answer.content == (gzip.decompress(own.body) if own.headers["Content-Encoding"] == "gzip" else own.body)
    for name in ("content-type", "content-encoding", "allow", "retry-after", "inference-header-content-length", "vary"):
        assert answer.headers.get(name) == own.headers.get(name), name


def test_a_mounted_application_answers_under_its_prefix_within_the_outer_lifespan() -> None:
    async def run() -> None:
        inner = application()
        outer = mounted(inner)
        before = await ask(outer, "GET", "/in%20ference/v2/health/ready")
        assert before.status_code == 503
        assert "lifespan" in before.json()["error"]
        with pytest.raises(Refusal, match="not loaded"):
            assert inner.catalogue
        async with outer.router.lifespan_context(outer):
            assert inner.catalogue.ready
            answer = await ask(outer, "POST", "/in%20ference/v2/models/net/infer", request(3.0))
            assert answer.json()["outputs"][0]["data"][0] == 6.0
            assert (await ask(outer, "GET", "/v2")).status_code == 404
            assert 'nv_inference_count{model="net",version="1"} 1' in (await ask(outer, "GET", "/watch/metrics")).text
            with pytest.raises(ConfigError, match="runs already"):
                await inner.start()
        assert (await ask(outer, "GET", "/in%20ference/v2/health/ready")).status_code == 503

    asyncio.run(run())


@pytest.mark.parametrize(
    ("limits", "target", "body", "headers", "status"),
    [
        (Limits(body_bytes=100), "/v2/models/net/infer", b"x" * 101, {}, 413),
        (Limits(body_bytes=100), "/v2/models/net/infer", "chunks", {}, 413),
        (Limits(decompressed_bytes=1000), "/v2/models/net/infer", gzip.compress(b" " * 2000, mtime=0), "gzip", 413),
        (Limits(target_bytes=100), "/v2/models/" + "n" * 100, b"", {}, 414),
        (Limits(header_bytes=400), "/v2", b"", {"long": "x" * 400}, 431),
        (Limits(body_seconds=0.01), "/v2/models/net/infer", "slow", {}, 408),
    ],
)
def test_requests_are_bounded(limits: Limits, target: str, body: Any, headers: Any, status: int) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x" * 50

    async def slow() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    async def run() -> httpx2.Response:
        content = {"chunks": chunks, "slow": slow}[body]() if isinstance(body, str) else body
        named = {"Content_Encoding": headers} if isinstance(headers, str) else headers
        async with application(limits=limits) as inner:
            method = "GET" if body == b"" else "POST"
            return await ask(inner, method, target, content, **named)

    answer = asyncio.run(run())
    assert answer.status_code == status
    assert answer.json().keys() == {"error"}


def scope_of(target: str) -> dict[str, Any]:
    return {"type": "http", "method": "POST", "path": target, "headers": [], "http_version": "1.1"}


def test_a_client_that_leaves_takes_its_request_out_of_the_queue() -> None:
    gate = Gate()

    async def run() -> None:
        async with application({"net": function(gate)}) as inner:
            scheduler = inner.catalogue.find("net").scheduler
            first = asyncio.create_task(ask(inner, "POST", "/v2/models/net/infer", request(1.0)))
            while not scheduler.running:
                await asyncio.sleep(0.001)
            left = asyncio.Event()
            messages: list[dict[str, Any]] = [{"type": "http.request", "body": request(2.0)}]

            async def receive() -> dict[str, Any]:
                if messages:
                    return messages.pop()
                await left.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                raise AssertionError("nobody is there to be answered")

            second = asyncio.create_task(inner(scope_of("/v2/models/net/infer"), receive, send))
            while not scheduler.pending:
                await asyncio.sleep(0.001)
            left.set()
            await second
            assert scheduler.pending == 0
            assert scheduler.statistics.cancelled == 1
            gate.open.release()
            assert (await first).json()["outputs"][0]["data"][0] == 2.0

    asyncio.run(run())
    assert gate.ran == [[1.0]]


def test_a_client_that_leaves_in_the_middle_of_its_body_is_not_answered() -> None:
    messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": b"{", "more_body": True}]

    async def receive() -> dict[str, Any]:
        return messages.pop()

    async def send(message: Any) -> None:
        raise AssertionError("nobody is there to be answered")

    async def run() -> None:
        async with application() as inner:
            await inner(scope_of("/v2/models/net/infer"), receive, send)

    asyncio.run(run())
    assert not messages


async def lived(app: Application) -> list[dict[str, Any]]:
    """Return what an application says to a server that starts and ends it."""
    asked = [{"type": "lifespan.shutdown"}, {"type": "lifespan.startup"}]
    said: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return asked.pop()

    async def send(message: Any) -> None:
        said.append(message)

    await app({"type": "lifespan"}, receive, send)
    return said


def test_the_lifespan_protocol_starts_and_ends_it() -> None:
    assert [message["type"] for message in asyncio.run(lived(application()))] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]


def test_a_model_that_cannot_be_loaded_fails_the_startup_in_words() -> None:
    def broken() -> Any:
        raise NarrowcastError("the model is broken", next_step="mend it")

    (said,) = asyncio.run(lived(application({"net": FunctionSource(broken)})))
    assert said["type"] == "lifespan.startup.failed"
    assert said["message"] == "the model is broken\nNext: mend it"


def test_a_mistake_of_ours_is_a_500_and_not_a_broken_connection(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> httpx2.Response:
        async with application() as inner:
            inner.catalogue.find = None  # type: ignore[method-assign, assignment]
            return await ask(inner, "GET", "/v2/models/net")

    answer = asyncio.run(run())
    assert answer.status_code == 500
    assert "its log says more" in answer.json()["error"]
    assert "a request failed" in caplog.text


@pytest.fixture
def address() -> Iterator[str]:
    """The address of an outer application that uvicorn runs."""
    inner = application({"net": function(doubled)})
    server = uvicorn.Server(uvicorn.Config(mounted(inner), ws="none", log_config=None, lifespan="on"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()
    listener.close()


@pytest.mark.parametrize("binary", [False, True])
def test_the_client_of_triton_works_through_uvicorn_under_a_prefix(address: str, binary: bool) -> None:
    with triton.InferenceServerClient(f"{address}/in%20ference") as client:
        assert client.is_server_ready()
        assert client.get_model_metadata("net")["inputs"][0]["shape"] == [-1, 4]
        x = np.arange(4, dtype=np.float32).reshape(1, 4)
        item = triton.InferInput("x", [1, 4], "FP32")
        item.set_data_from_numpy(x, binary_data=binary)
        asked = triton.InferRequestedOutput("y", binary_data=binary)
        result = client.infer("net", [item], outputs=[asked], request_compression_algorithm="gzip")
        np.testing.assert_array_equal(result.as_numpy("y"), 2 * x)
        with pytest.raises(triton.InferenceServerException, match="'other' is not found"):
            client.infer("other", [item])
