"""What the server adds to a model that does nothing: requests per second beside a bare HTTP server, in the same run.

    taskset is not needed: the script pins each server to one core and the load to another.
    python benchmarks/serving.py [--seconds 5] [--rounds 3] [--out results.json]

Servers, each a process of its own on the first core, one at a time, in turn for each round:

- ``bare``: asyncio, uvloop and httptools alone. It parses a request and answers with a fixed body; nothing that serves
  models with the same libraries can be faster.
- ``inline``: narrowcast with a no-op model (FP32[1,4] to FP32[1,4]) in the event loop.
- ``thread``: the same model in a thread.
- ``process``: an ONNX Identity artifact in a worker process, on the same core as the server.
- ``grpc``: the inline model over gRPC, loaded by grpc.aio clients, for which ``bare`` is no bound.

The load is closed loop: each connection sends its next request when the answer is there, and checks that the answer is the
right one once per connection. The numbers are medians over rounds, with the ratio to ``bare`` of the same round. The load
average is recorded: on a machine with other work they only guide.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httptools
import numpy as np
import uvloop

REQUEST_JSON = b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[1.0,2.0,3.0,4.0]}]}'
TARGET = b"/v2/models/noop/infer"
CONNECTIONS = (1, 32)
LARGE_ELEMENTS = 150_000  # 600 kB of FP32


# Servers --------------------------------------------------------------------------------------------------------------


class Bare(asyncio.Protocol):
    """The least that can be called an HTTP server."""

    BODY = (
        b'{"model_name":"noop","model_version":"1",'
        b'"outputs":[{"name":"y","datatype":"FP32","shape":[1,4],"data":[1.0,2.0,3.0,4.0]}]}'
    )

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None: ...

    def on_header(self, name: bytes, value: bytes) -> None: ...

    def on_body(self, body: bytes) -> None:
        self.body = body

    def on_message_complete(self) -> None:
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(self.BODY)
            + self.BODY
        )


async def run_bare() -> None:
    server = await asyncio.get_running_loop().create_server(Bare, "127.0.0.1", 0)
    print(json.dumps({"http": server.sockets[0].getsockname()[1]}), flush=True)
    await server.serve_forever()


async def run_narrowcast(kind: str) -> None:
    from narrowcast.serving.catalogue import Hosting
    from narrowcast.serving.datatypes import DATATYPES
    from narrowcast.serving.repository import Repository
    from narrowcast.serving.scheduling.queue import Batching
    from narrowcast.serving.scheduling.scheduler import Settings
    from narrowcast.serving.server import InferenceServer, ServerOptions
    from narrowcast.serving.signature import Signature, TensorSpec
    from narrowcast.serving.workers.loading import FunctionModel
    from narrowcast.serving.workers.sources import FunctionSource, Placement

    fp32 = DATATYPES["FP32"]
    small = Signature((TensorSpec("x", fp32, (-1, 4)),), (TensorSpec("y", fp32, (-1, 4)),), batched=True)
    large = Signature(
        (TensorSpec("x", fp32, (-1, LARGE_ELEMENTS)),), (TensorSpec("y", fp32, (-1, LARGE_ELEMENTS)),), batched=True
    )
    with tempfile.TemporaryDirectory() as folder:
        placement = Placement("inline" if kind == "grpc" else kind)
        if placement is Placement.PROCESS:
            repository = Repository([identity_artifact(Path(folder) / name, size) for name, size in MODELS.items()])
        else:
            repository = Repository(
                sources={
                    "noop": FunctionSource(lambda: FunctionModel(small, lambda inputs: {"y": inputs["x"]})),
                    "large": FunctionSource(lambda: FunctionModel(large, lambda inputs: {"y": inputs["x"]})),
                }
            )
        hosting = Hosting(placement, settings=Settings(Batching(32)))
        server = InferenceServer(repository, hosting, ServerOptions(port=0, grpc_port=0, metrics_port=None))
        await server.start()
        print(json.dumps(server.ports), flush=True)
        await server.run_until_signal()


MODELS = {"noop": 4, "large": LARGE_ELEMENTS}


def identity_artifact(folder: Path, size: int) -> Path:
    """Write an artifact that gives what it takes."""
    import onnx
    from onnx import TensorProto, helper

    from narrowcast.artifacts.manifest import DataRecord, Manifest, MetricRecord, ModelRecord, Verdict
    from narrowcast.artifacts.store import save_artifact
    from narrowcast.measure.environment import environment
    from narrowcast.recipes.plan import Plan
    from narrowcast.recipes.recipe import Optimise, Recipe
    from narrowcast.recipes.target import Target

    folder.mkdir()
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", values[:1], values[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), folder / "model.onnx"
    )
    target = Target()
    manifest = Manifest(
        narrowcast="benchmark",
        created="",
        model=ModelRecord(ref="identity", sha256="", bytes=0, random_weights=False),
        data=DataRecord(ref="none", sha256="", seed=0, calibration=0, search=0, report=0),
        metric=MetricRecord(name="none", unit="", higher_is_better=True),
        target=target,
        plan=Plan(recipe=Recipe(name="fp32", steps=(Optimise(),)), target=target),
        versions={},
        files={},
        parity=0.0,
        measurements=(),
        environment=environment(),
        verdict=Verdict(met=True, headline=""),
    )
    save_artifact(folder, manifest)
    return folder


@contextmanager
def server_on(core: int, kind: str) -> Iterator[dict[str, int]]:
    """Start a server on one core, and yield its ports."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", kind, "--core", str(core)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())
    finally:
        process.terminate()
        process.wait(20)


# Load -----------------------------------------------------------------------------------------------------------------


class Loader(asyncio.Protocol):
    """One connection of a closed loop: it counts answers, which must all have the length of the first."""

    def __init__(self, request: bytes, check: Callable[[bytes], None]) -> None:
        self.request = request
        self.check = check
        self.count = 0
        self.times: list[float] = []
        self.length = 0
        self.buffer = b""
        self.ready = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.sent = time.perf_counter()
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.buffer = self.buffer + data if self.buffer else data
        if not self.length:
            head, separator, _ = self.buffer.partition(b"\r\n\r\n")
            if not separator:
                return
            lengths = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
            self.length = len(head) + 4 + int(lengths[0].split(b":")[1])
        if len(self.buffer) < self.length:
            return
        if not self.count:
            self.check(self.buffer)
        self.count += 1
        self.buffer = b""
        now = time.perf_counter()
        self.times.append(now - self.sent)
        self.sent = now
        self.transport.write(self.request)


def post(target: bytes, body: bytes, header_length: int | None = None) -> bytes:
    extra = b"" if header_length is None else b"Inference-Header-Content-Length: %d\r\n" % header_length
    return b"POST %b HTTP/1.1\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n%b" % (target, extra, len(body), body)


async def http_load(port: int, request: bytes, check: Callable[[bytes], None], connections: int, seconds: float) -> Any:
    loop = asyncio.get_running_loop()
    pairs = [
        await loop.create_connection(lambda: Loader(request, check), "127.0.0.1", port) for _ in range(connections)
    ]
    await asyncio.sleep(min(1.0, seconds / 3))
    before, begun = sum(loader.count for _, loader in pairs), time.perf_counter()
    marks = [len(loader.times) for _, loader in pairs]
    await asyncio.sleep(seconds)
    done, elapsed = sum(loader.count for _, loader in pairs) - before, time.perf_counter() - begun
    times = sorted(t for (_, loader), mark in zip(pairs, marks, strict=True) for t in loader.times[mark:])
    for transport, _ in pairs:
        transport.abort()
    return {"rate": done / elapsed, "p50_ms": times[len(times) // 2] * 1e3}


async def grpc_load(port: int, connections: int, seconds: float) -> Any:
    import grpc.aio

    from narrowcast.oip.messages import INFERENCE

    request = INFERENCE["ModelInferRequest"](model_name="noop")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(np.arange(4, dtype=np.float32).tobytes())
    times: list[float] = []
    end = [float("inf")]

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=INFERENCE["ModelInferRequest"].SerializeToString,
            response_deserializer=INFERENCE["ModelInferResponse"].FromString,
        )

        async def one() -> None:
            while time.perf_counter() < end[0]:
                sent = time.perf_counter()
                response = await call(request)
                times.append(time.perf_counter() - sent)
                assert response.raw_output_contents[0] == request.raw_input_contents[0]

        tasks = [asyncio.create_task(one()) for _ in range(connections)]
        await asyncio.sleep(min(1.0, seconds / 3))
        times.clear()
        begun = time.perf_counter()
        end[0] = begun + seconds
        await asyncio.gather(*tasks)
    times.sort()
    return {"rate": len(times) / seconds, "p50_ms": times[len(times) // 2] * 1e3}


def check_small(answer: bytes) -> None:
    assert answer.startswith(b"HTTP/1.1 200"), answer[:300]
    outputs = json.loads(answer.partition(b"\r\n\r\n")[2])["outputs"]
    assert outputs[0]["data"] == [1.0, 2.0, 3.0, 4.0], outputs


def large_request() -> tuple[bytes, Callable[[bytes], None]]:
    data = np.arange(LARGE_ELEMENTS, dtype=np.float32).tobytes()
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "x",
                    "shape": [1, LARGE_ELEMENTS],
                    "datatype": "FP32",
                    "parameters": {"binary_data_size": len(data)},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()

    def check(answer: bytes) -> None:
        assert answer.startswith(b"HTTP/1.1 200"), answer[:300]
        assert answer.endswith(data), "the data came back changed"

    return post(b"/v2/models/large/infer", head + data, len(head)), check


# The run --------------------------------------------------------------------------------------------------------------


async def measure(kind: str, ports: dict[str, int], seconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for connections in CONNECTIONS:
        if kind == "grpc":
            found[f"{connections}"] = await grpc_load(ports["grpc"], connections, seconds)
        else:
            request = post(TARGET, REQUEST_JSON)
            found[f"{connections}"] = await http_load(ports["http"], request, check_small, connections, seconds)
    if kind in ("inline", "process"):
        request, check = large_request()
        found["600kB"] = await http_load(ports["http"], request, check, 1, seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", default="bare,inline,thread,process,grpc")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.serve:
        os.sched_setaffinity(0, {arguments.core})
        uvloop.run(run_bare() if arguments.serve == "bare" else run_narrowcast(arguments.serve))
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    rounds: list[dict[str, Any]] = []
    for _ in range(arguments.rounds):
        found: dict[str, Any] = {"load": os.getloadavg()[0]}
        for kind in arguments.kinds.split(","):
            with server_on(cores[0], kind) as ports:
                found[kind] = uvloop.run(measure(kind, ports, arguments.seconds))
        rounds.append(found)
    show(rounds)
    if arguments.out:
        arguments.out.write_text(json.dumps({"cores": len(cores), "rounds": rounds}, indent=1) + "\n")


def show(rounds: list[dict[str, Any]]) -> None:
    print(f"load average {min(r['load'] for r in rounds):.1f} to {max(r['load'] for r in rounds):.1f}")
    for kind in (key for key in rounds[0] if key != "load"):
        for case in rounds[0][kind]:
            rate = statistics.median(r[kind][case]["rate"] for r in rounds)
            p50 = statistics.median(r[kind][case]["p50_ms"] for r in rounds)
            line = f"{kind:8} {case:>6}  {rate:8.0f} /s  p50 {p50:6.3f} ms"
            if case in rounds[0].get("bare", {}) and kind not in ("bare", "grpc"):
                ratio = statistics.median(r[kind][case]["rate"] / r["bare"][case]["rate"] for r in rounds)
                line += f"  {ratio:5.2f} of bare"
            print(line)


if __name__ == "__main__":
    main()
