"""Servers for `serving.py`, each a process of its own: ``python serving_programs.py KIND CORES``.

A program prints its ports as a line of JSON when it answers, and ends at SIGTERM. No-op models give what they take: ``noop``
has FP32[n,4], ``large`` FP32[n,150000], which is 600 kB a row.

- ``bare``: asyncio, uvloop and httptools alone. It parses a request and answers with a fixed body, or with the body that was
  sent where the target is that of ``large``; nothing that serves models with the same libraries can be faster.
- ``bare-grpc``: grpc.aio on uvloop, which sends the bytes back that came.
- ``FOLDER?workers=2&batch=32``: narrowcast with an artifact, in so many worker processes, in batches up to that size.
- ``inline``, ``thread``, ``process``: narrowcast, with the model where the name says. In ``process`` it is an ONNX artifact
  with an Identity; elsewhere a Python function.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"  # before gRPC is imported; as `narrowcast serve` does

import httptools
import uvloop

from narrowcast.oip.datatypes import DATATYPES
from narrowcast.serving.catalogue import Hosting
from narrowcast.serving.repository import Repository
from narrowcast.serving.scheduling.queue import Batching
from narrowcast.serving.scheduling.scheduler import Settings
from narrowcast.serving.server import InferenceServer, ServerOptions
from narrowcast.serving.signature import Signature, TensorSpec
from narrowcast.serving.workers.loading import FunctionModel
from narrowcast.serving.workers.sources import FunctionSource, Placement

LARGE_ELEMENTS = 150_000  # 600 kB of FP32
MODELS = {"noop": 4, "large": LARGE_ELEMENTS}
ECHO = "/bare/Echo"


class Bare(asyncio.Protocol):
    """The least that can be called an HTTP server."""

    BODY = (
        b'{"model_name":"noop","model_version":"1",'
        b'"outputs":[{"name":"y","datatype":"FP32","shape":[1,4],"data":[1.0,2.0,3.0,4.0]}]}'
    )

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)
        self.body: list[bytes] = []

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.echo = b"large" in url

    def on_header(self, name: bytes, value: bytes) -> None: ...

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        body, self.body = b"".join(self.body) if self.echo else self.BODY, []
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        if self.echo:
            self.transport.writelines((head, body))
        else:
            self.transport.write(head + body)


def ready(ports: dict[str, int]) -> None:
    print(json.dumps(ports), flush=True)


async def run_bare() -> None:
    server = await asyncio.get_running_loop().create_server(Bare, "127.0.0.1", 0)
    ready({"http": server.sockets[0].getsockname()[1]})
    await server.serve_forever()


async def run_bare_grpc() -> None:
    import grpc.aio

    async def echo(request: bytes, context: Any) -> bytes:
        return request

    server = grpc.aio.server()
    service, method = ECHO.strip("/").split("/")
    handlers = {method: grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    ready({"grpc": port})
    await server.wait_for_termination()


async def run_no_op(placement: Placement) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if placement is Placement.PROCESS:
            repository = Repository([identity_artifact(Path(folder) / name, size) for name, size in MODELS.items()])
        else:
            repository = Repository(sources={name: identity_function(size) for name, size in MODELS.items()})
        await run_narrowcast(repository, Hosting(placement, settings=Settings(Batching(32))))


async def run_artifact(folder: str, workers: str, batch: str) -> None:
    hosting = Hosting(Placement.PROCESS, int(workers), Settings(Batching(int(batch))))
    await run_narrowcast(Repository([Path(folder)]), hosting)


async def run_narrowcast(repository: Repository, hosting: Hosting) -> None:
    token = os.environ.get("NARROWCAST_ADMIN_TOKEN")
    options = ServerOptions(port=0, grpc_port=0, metrics_port=None, token=token, shared_memory=True)
    server = InferenceServer(repository, hosting, options)
    await server.start()
    gc.freeze()  # as `narrowcast serve` does
    ready(server.ports)
    await server.run_until_signal()


def identity_function(size: int) -> FunctionSource:
    """Return a model that gives the rows that it takes."""
    rows, same = (TensorSpec(name, DATATYPES["FP32"], (-1, size)) for name in ("x", "y"))
    return FunctionSource(lambda: FunctionModel(Signature((rows,), (same,), True), lambda inputs: {"y": inputs["x"]}))


def identity_artifact(folder: Path, size: int) -> Path:
    """Write an artifact that gives the rows that it takes."""
    import onnx
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    return make_artifact(folder)


def make_artifact(folder: Path) -> Path:
    """Make an artifact of a folder that holds a ``model.onnx``: with the least manifest that a server takes."""
    from narrowcast.artifacts.manifest import DataRecord, Manifest, MetricRecord, ModelRecord, Verdict
    from narrowcast.artifacts.store import save_artifact
    from narrowcast.measure.environment import environment
    from narrowcast.recipes.plan import Plan
    from narrowcast.recipes.recipe import Optimise, Recipe
    from narrowcast.recipes.target import Target

    target = Target()
    manifest = Manifest(
        narrowcast="benchmark",
        created="",
        model=ModelRecord(ref="benchmark", sha256="", bytes=0, random_weights=False),
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


def program(kind: str) -> Coroutine[Any, Any, None]:
    if "?" in kind:
        folder, _, options = kind.partition("?")
        return run_artifact(folder, **dict(parse_qsl(options)))
    programs = {"bare": run_bare, "bare-grpc": run_bare_grpc}
    return programs[kind]() if kind in programs else run_no_op(Placement(kind))


def main() -> None:
    kind, cores = sys.argv[1:]
    if cores != "all":
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    uvloop.run(program(kind))


if __name__ == "__main__":
    main()
