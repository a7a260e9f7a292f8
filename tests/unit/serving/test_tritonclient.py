"""NVIDIA's own clients, unchanged, against the server."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from serving_models import echo, function
from tritonclient.utils import InferenceServerException
from tritonclient.utils.shared_memory import (
    create_shared_memory_region,
    destroy_shared_memory_region,
    get_contents_as_numpy,
    set_shared_memory_region,
)

from narrowcast.serving.catalogue import Hosting
from narrowcast.serving.datatypes import DATATYPES
from narrowcast.serving.scheduling.queue import Batching
from narrowcast.serving.scheduling.scheduler import Settings
from narrowcast.serving.workers.sources import Placement

TOKEN = "s3cret"
ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)
HTTP_ADMIN = {"Authorization": f"Bearer {TOKEN}"}
GRPC_ADMIN = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def running(serve_once: Any) -> Any:
    sources = {"double": function()} | {f"echo_{name.lower()}": echo(name) for name in DATATYPES}
    hosting = Hosting(Placement.INLINE, settings=Settings(Batching(8)))
    return serve_once(sources, hosting=hosting, grpc_port=0, shared_memory=True)


@pytest.fixture(scope="module")
def over_http(running: Any) -> Iterator[Any]:
    with triton_http.InferenceServerClient(running.address) as client:
        yield client


@pytest.fixture(scope="module")
def over_grpc(running: Any) -> Iterator[Any]:
    with triton_grpc.InferenceServerClient(running.grpc_address) as client:
        yield client


def rows_input(module: Any, rows: np.ndarray = ROWS) -> Any:
    tensor = module.InferInput("x", list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows)
    return tensor


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_health_metadata_and_configuration(kind: str, request: pytest.FixtureRequest) -> None:
    client = request.getfixturevalue(f"over_{kind}")
    more = {"as_json": True} if kind == "grpc" else {}
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("double")
    assert client.is_model_ready("double", "1")
    assert "binary_tensor_data" in client.get_server_metadata(**more)["extensions"]
    metadata = client.get_model_metadata("double", **more)
    assert metadata["versions"] == ["1"]
    assert [int(size) for size in metadata["inputs"][0]["shape"]] == [-1, 4], "the batch axis is part of the shape"
    config = client.get_model_config("double", **more)
    config = config["config"] if kind == "grpc" else config
    assert config["max_batch_size"] == 8
    assert [int(size) for size in config["input"][0]["dims"]] == [4], "the batch axis is no part of the dims"
    assert config["input"][0]["data_type"] == "TYPE_FP32"


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_http_inference(over_http: Any, binary: bool, compression: str | None) -> None:
    tensor = triton_http.InferInput("x", [2, 4], "FP32")
    tensor.set_data_from_numpy(ROWS, binary_data=binary)
    result = over_http.infer(
        "double",
        [tensor],
        outputs=[triton_http.InferRequestedOutput("y", binary_data=binary)],
        request_id="7",
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )
    np.testing.assert_array_equal(result.as_numpy("y"), ROWS * 2)
    assert result.get_response()["id"] == "7"


def test_http_answers_in_binary_where_no_output_is_named(over_http: Any) -> None:
    result = over_http.infer("double", [rows_input(triton_http)])
    assert result.get_output("y")["parameters"] == {"binary_data_size": 32}
    np.testing.assert_array_equal(result.as_numpy("y"), ROWS * 2)


def values(datatype: str) -> np.ndarray:
    if datatype == "BYTES":
        return np.array([b"a", b"", "Grüße".encode(), b"\x00\xff"], object)
    if datatype == "BOOL":
        return np.array([True, False, True])
    dtype = DATATYPES[datatype].dtype
    if datatype.startswith(("INT", "UINT")):
        return np.array([np.iinfo(dtype).min, 0, np.iinfo(dtype).max], dtype)
    # The clients send BF16 from FP32 arrays, and give FP32 back.
    return np.array([-1.5, 0.0, 3.0], np.float32 if datatype == "BF16" else dtype)


@pytest.mark.parametrize("kind", ["http", "grpc"])
@pytest.mark.parametrize("datatype", sorted(DATATYPES))
def test_every_datatype_comes_back_as_it_went(kind: str, datatype: str, request: pytest.FixtureRequest) -> None:
    client = request.getfixturevalue(f"over_{kind}")
    module = {"http": triton_http, "grpc": triton_grpc}[kind]
    array = values(datatype)
    tensor = module.InferInput("x", list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    result = client.infer(f"echo_{datatype.lower()}", [tensor]).as_numpy("y")
    assert result.tolist() == array.tolist()


def test_grpc_inference_and_statistics(over_grpc: Any) -> None:
    before = over_grpc.get_inference_statistics("double").model_stats[0]
    for _ in range(3):
        result = over_grpc.infer("double", [rows_input(triton_grpc)], request_id="9")
        np.testing.assert_array_equal(result.as_numpy("y"), ROWS * 2)
        assert result.get_response().id == "9"
    after = over_grpc.get_inference_statistics("double").model_stats[0]
    assert after.inference_count - before.inference_count == 6
    assert after.execution_count - before.execution_count == 3
    assert after.inference_stats.success.count - before.inference_stats.success.count == 3
    assert after.batch_stats[0].batch_size == 2
    assert after.batch_stats[0].compute_infer.count >= 3


def test_grpc_stream(over_grpc: Any) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    over_grpc.start_stream(lambda result, error: answers.put((result, error)))
    wrong = triton_grpc.InferInput("nope", [2, 4], "FP32")
    wrong.set_data_from_numpy(ROWS)
    for number in range(10):
        tensor = wrong if number == 4 else rows_input(triton_grpc, ROWS + np.float32(number))
        over_grpc.async_stream_infer("double", [tensor], request_id=str(number))
    for number in range(10):
        result, error = answers.get(timeout=30)
        if number == 4:
            assert "no input 'nope'" in str(error)
        else:
            assert error is None
            assert result.get_response().id == str(number)
            np.testing.assert_array_equal(result.as_numpy("y"), (ROWS + number) * 2)
    over_grpc.stop_stream()


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_repository(kind: str, request: pytest.FixtureRequest) -> None:
    client = request.getfixturevalue(f"over_{kind}")
    admin = HTTP_ADMIN if kind == "http" else GRPC_ADMIN
    module = {"http": triton_http, "grpc": triton_grpc}[kind]
    with pytest.raises(InferenceServerException, match="administration needs"):
        client.unload_model("double")
    client.unload_model("double", headers=admin)
    assert not client.is_model_ready("double")
    assert not client.is_model_ready("nobody"), "as Triton answers of models that it never had"
    with pytest.raises(InferenceServerException, match="'double' is not found"):
        client.infer("double", [rows_input(module)])
    index = client.get_model_repository_index()
    entries = index if kind == "http" else [{"name": m.name, "state": m.state} for m in index.models]
    assert next(entry["state"] for entry in entries if entry["name"] == "double") == "UNAVAILABLE"
    client.load_model("double", headers=admin)
    np.testing.assert_array_equal(client.infer("double", [rows_input(module)]).as_numpy("y"), ROWS * 2)


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_shared_memory(kind: str, request: pytest.FixtureRequest) -> None:
    client = request.getfixturevalue(f"over_{kind}")
    module = {"http": triton_http, "grpc": triton_grpc}[kind]
    given = create_shared_memory_region("given", f"/narrowcast_test_{kind}_given", 64)
    taken = create_shared_memory_region("taken", f"/narrowcast_test_{kind}_taken", 64)
    try:
        set_shared_memory_region(given, [ROWS])
        client.register_system_shared_memory("given", f"/narrowcast_test_{kind}_given", 64)
        client.register_system_shared_memory("taken", f"/narrowcast_test_{kind}_taken", 64)
        tensor = module.InferInput("x", [2, 4], "FP32")
        tensor.set_shared_memory("given", 32)
        output = module.InferRequestedOutput("y")
        output.set_shared_memory("taken", 32, offset=16)
        result = client.infer("double", [tensor], outputs=[output])
        if kind == "http":
            assert result.get_output("y")["parameters"]["binary_data_size"] == 0, "C++ clients end without it"
        np.testing.assert_array_equal(get_contents_as_numpy(taken, np.float32, [2, 4], offset=16), ROWS * 2)
        tensor.set_shared_memory("given", 32, offset=40)
        with pytest.raises(InferenceServerException, match="past the end of the region"):
            client.infer("double", [tensor])
        output.set_shared_memory("taken", 16)
        with pytest.raises(InferenceServerException, match="takes 32 bytes"):
            client.infer("double", [rows_input(module)], outputs=[output])
        client.unregister_system_shared_memory()
    finally:
        destroy_shared_memory_region(given)
        destroy_shared_memory_region(taken)


@pytest.mark.parametrize("kind", ["http", "grpc"])
@pytest.mark.parametrize("key", ["../etc/passwd", "/../x", "a/b", "", "narrowcast_no_such_object"])
def test_shared_memory_keys_that_are_no_objects(kind: str, key: str, request: pytest.FixtureRequest) -> None:
    client = request.getfixturevalue(f"over_{kind}")
    with pytest.raises(InferenceServerException, match="shared memory"):
        client.register_system_shared_memory("region", key, 64)


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_errors_say_what_is_wrong(kind: str, request: pytest.FixtureRequest) -> None:
    client = request.getfixturevalue(f"over_{kind}")
    module = {"http": triton_http, "grpc": triton_grpc}[kind]
    with pytest.raises(InferenceServerException, match="unknown") as caught:
        client.infer("nope", [rows_input(module)])
    assert caught.value.status() == {"http": "404", "grpc": "StatusCode.NOT_FOUND"}[kind]
    with pytest.raises(InferenceServerException, match=r"\[9, 4\]|9 rows") as caught:
        client.infer("double", [rows_input(module, np.zeros((9, 4), np.float32))])
    assert caught.value.status() == {"http": "400", "grpc": "StatusCode.INVALID_ARGUMENT"}[kind]
