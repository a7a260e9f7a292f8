"""What clients only claim, or compress to next to nothing, takes no memory."""

from __future__ import annotations

import gzip
import json
import socket
import tracemalloc
import zlib
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from serving_models import function, request, spec

from narrowcast.serving.http.encoding import decompress
from narrowcast.serving.limits import Limits
from narrowcast.serving.protocol.requests import read_infer
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.rpc.tensors import read_message
from narrowcast.serving.shared_memory import SharedMemory
from narrowcast.serving.signature import Signature

#: Far below every claim here, and far above what an answer takes.
LITTLE = 4 << 20
LIMITS = Limits()
NOTHING_SHARED = SharedMemory(allowed=False)


@contextmanager
def little_memory() -> Generator[None]:
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < LITTLE, f"{peak} bytes"


def any_of(datatype: str) -> Signature:
    """A model that takes tensors of any two axes."""
    return Signature((spec("x", -1, -1, datatype=datatype),), (spec("y", -1, -1, datatype=datatype),), batched=True)


#: 16 MB to more than there is, and what is no shape at all.
SHAPES = [[1 << 11, 1 << 11], [1 << 40, 4], [1 << 62, 4], [1 << 63, 1 << 63], [1 << 100, 0], [-(1 << 22), 4], [-2, -8]]


@pytest.mark.parametrize("datatype", ["FP32", "BOOL", "BYTES"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_shape(shape: list[int], datatype: str) -> None:
    item = {"name": "x", "shape": shape, "datatype": datatype}
    values = {"FP32": [1.0], "BOOL": [True], "BYTES": ["a"]}[datatype]
    as_json = json.dumps({"inputs": [item | {"data": values}]}).encode()
    head = json.dumps({"inputs": [item | {"parameters": {"binary_data_size": 8}}]}).encode()
    for body, length in ((as_json, None), (head + b"\x04\0\0\0text", len(head))):
        with little_memory(), pytest.raises(Refusal) as caught:
            read_infer(body, length, any_of(datatype), LIMITS, NOTHING_SHARED)
        assert caught.value.status == 400


@pytest.mark.parametrize("datatype", ["FP32", "BYTES"])
@pytest.mark.parametrize(
    "shape", [shape for shape in SHAPES if all(-(1 << 63) <= size < 1 << 63 for size in shape)], ids=str
)
def test_a_shape_of_a_message(shape: list[int], datatype: str) -> None:
    from narrowcast.oip.messages import INFERENCE

    message = INFERENCE["ModelInferRequest"](model_name="m")
    message.inputs.add(name="x", datatype=datatype, shape=shape)
    message.raw_input_contents.append(b"\x04\0\0\0text")
    with little_memory(), pytest.raises(Refusal) as caught:
        read_message(message, any_of(datatype), LIMITS, NOTHING_SHARED)
    assert caught.value.status == 400


def test_lengths_of_bodies_that_do_not_come(serve: Any) -> None:
    running = serve({"fine": function()})
    claim = b"POST /v2/models/fine/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 60000000\r\n\r\n{"
    with little_memory(), ExitStack() as open_ones:
        for _ in range(20):
            connection = socket.create_connection(("127.0.0.1", running.server.ports["http"]))
            open_ones.enter_context(connection)
            connection.sendall(claim)
        assert running.infer("fine", request(1)).status == 200


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [(b"gzip", gzip.compress), (b"deflate", zlib.compress), (b"deflate", lambda data: zlib.compress(data)[2:-4])],
    ids=["gzip", "deflate", "bare deflate"],
)
def test_a_bomb(encoding: bytes, pack: Callable[[bytes], bytes]) -> None:
    bomb = pack(bytes(200 << 20))
    assert len(bomb) < 1 << 20
    with little_memory(), pytest.raises(Refusal) as caught:
        decompress(encoding, bomb, 1 << 20)
    assert caught.value.status == 413


def test_a_bomb_over_a_connection(serve: Any) -> None:
    running = serve({"fine": function()}, limits=Limits(decompressed_bytes=1 << 20))
    bomb = gzip.compress(bytes(200 << 20))
    with little_memory():
        answer = running.infer("fine", bomb, Content_Encoding="gzip")
    assert (answer.status, "after decompression" in answer.error) == (413, True)
    assert running.infer("fine", request(1)).status == 200


@pytest.mark.parametrize(
    "place",
    [
        {"shared_memory_byte_size": 1 << 40},
        {"shared_memory_byte_size": 1 << 80},
        {"shared_memory_byte_size": 16, "shared_memory_offset": 1 << 40},
        {"shared_memory_byte_size": 16, "shared_memory_offset": (1 << 63) - 8},
        {"shared_memory_byte_size": 16, "shared_memory_offset": 1 << 100},
        {"shared_memory_byte_size": 16, "shared_memory_offset": -16},
        {"shared_memory_byte_size": -16},
    ],
    ids=str,
)
def test_places_outside_a_region(place: dict[str, int], serve: Any) -> None:
    from multiprocessing.shared_memory import SharedMemory as Block

    running = serve({"fine": function()}, shared_memory=True)
    block = Block(create=True, size=4096)
    try:
        register = json.dumps({"key": f"/{block.name.lstrip('/')}", "byte_size": 4096}).encode()
        assert running.ask("POST", "/v2/systemsharedmemory/region/r/register", register).status == 200
        here = {"shared_memory_region": "r"} | place
        given = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": here}
        with little_memory():
            read = running.infer("fine", json.dumps({"inputs": [given]}).encode())
            written = running.infer("fine", request(1, outputs=[{"name": "y", "parameters": here}]))
        assert read.status in (400, 413)
        # A place for an output may be larger than the output; it must only lie where the output is written.
        assert written.status == 400 or place == {"shared_memory_byte_size": 1 << 40}
        assert running.infer("fine", request(1)).status == 200
        assert bytes(block.buf[16:]) == bytes(4080)
    finally:
        block.close()
        block.unlink()
