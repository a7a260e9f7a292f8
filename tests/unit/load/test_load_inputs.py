from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from narrowcast.errors import DataError
from narrowcast.load.encoding import encode_grpc, encode_http
from narrowcast.load.inputs import make_tensors, read_batches, read_shapes
from narrowcast.load.introduction import Introduction, TensorSpec
from narrowcast.load.target import read_target
from narrowcast.oip.datatypes import DATATYPES
from narrowcast.oip.messages import INFERENCE

TARGET = read_target("http://127.0.0.1:8000/behind/a/proxy")


def model(*inputs: TensorSpec, largest_batch: int | None = 8) -> Introduction:
    return Introduction("server", "1", (), "net", "3", "", inputs, largest_batch)


def image(shape: tuple[int, ...] = (-1, 3, 4), datatype: str = "FP32") -> TensorSpec:
    return TensorSpec("image", datatype, shape)


@pytest.mark.parametrize("datatype", sorted(DATATYPES))
@pytest.mark.parametrize("data", ["random", "zeros"])
def test_inputs_of_every_type_can_be_made_and_sent(datatype: str, data: str) -> None:
    known = model(image(datatype=datatype))
    made = make_tensors(known, {1: 0.5, 4: 0.5}, data, {}, seed=3)
    assert set(made) == {1, 4}
    for rows, variants in made.items():
        for tensors in variants:
            assert tensors["image"].shape == (rows, 3, 4)
            assert tensors["image"].dtype == DATATYPES[datatype].dtype
            head, _, body = encode_http(TARGET, known, tensors, rows, binary=False).payload.partition(b"\r\n\r\n")
            assert f"Content-Length: {len(body)}".encode() in head
            assert len(json.loads(body)["inputs"][0]["data"]) == rows * 12
    again = make_tensors(known, {1: 0.5, 4: 0.5}, data, {}, seed=3)
    assert (made[4][0]["image"] == again[4][0]["image"]).all()


def test_a_binary_request_has_its_bytes_behind_the_document() -> None:
    known = model(image(), TensorSpec("mask", "BOOL", (-1,)))
    tensors = make_tensors(known, {2: 1.0}, "random", {}, seed=0)[2][0]
    request = encode_http(TARGET, known, tensors, 2, binary=True)
    head, _, body = request.payload.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /behind/a/proxy/v2/models/net/versions/3/infer HTTP/1.1"
    length = int(next(line for line in lines if line.startswith("Inference-Header-Content-Length:")).split()[1])
    document = json.loads(body[:length])
    assert [item["parameters"]["binary_data_size"] for item in document["inputs"]] == [2 * 12 * 4, 2]
    assert document["parameters"] == {"binary_data_output": True}
    assert body[length:] == tensors["image"].tobytes() + tensors["mask"].tobytes()
    assert (request.rows, request.body) == (2, len(body))


def test_a_message_has_raw_contents() -> None:
    known = model(image())
    tensors = make_tensors(known, {2: 1.0}, "random", {}, seed=0)[2][0]
    message: Any = INFERENCE["ModelInferRequest"].FromString(encode_grpc(known, tensors, 2).payload)
    assert (message.model_name, message.model_version) == ("net", "3")
    assert list(message.inputs[0].shape) == [2, 3, 4]
    assert message.raw_input_contents[0] == tensors["image"].tobytes()


def test_arrays_of_a_file_are_gone_through_row_by_row(tmp_path: Path) -> None:
    array = np.arange(5 * 12, dtype=np.float32).reshape(5, 3, 4)
    np.savez(tmp_path / "data.npz", image=array)
    made = make_tensors(model(image()), {2: 1.0}, str(tmp_path / "data.npz"), {}, seed=0)[2]
    assert (made[0]["image"] == array[:2]).all()
    assert (made[2]["image"] == array[[4, 0]]).all()


@pytest.mark.parametrize(
    ("spec", "largest", "given", "shape"),
    [
        (image((-1, 3, 4)), None, {}, (2, 3, 4)),
        (image((-1, -1, 4)), 8, {"image": (1, 7, 4)}, (2, 7, 4)),
        (image((3, 4)), 0, {}, (3, 4)),
        (image((1, 3, 4)), None, {}, (1, 3, 4)),
        (image((-1, 4)), 0, {"image": (5, 4)}, (5, 4)),
    ],
    ids=["batched", "open-axis", "no-batch", "fixed", "open-without-batch"],
)
def test_shapes_follow_the_metadata(
    spec: TensorSpec, largest: int | None, given: dict[str, tuple[int, ...]], shape: tuple[int, ...]
) -> None:
    rows = 2 if shape[0] == 2 else 1
    made = make_tensors(model(spec, largest_batch=largest), {rows: 1.0}, "zeros", given, seed=0)
    assert made[rows][0]["image"].shape == shape


@pytest.mark.parametrize(
    ("spec", "largest", "batches", "said"),
    [
        (image((-1, -1, 4)), 8, {1: 1.0}, "leaves axes open"),
        (image((3, 4)), 0, {2: 1.0}, "no batch axis"),
        (image(), 8, {16: 1.0}, "more than the model takes"),
        (image(datatype="FP4"), 8, {1: 1.0}, "unknown type"),
    ],
    ids=["open", "no-batch", "too-many", "datatype"],
)
def test_what_does_not_fit_the_model_is_refused(
    spec: TensorSpec, largest: int, batches: dict[int, float], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        make_tensors(model(spec, largest_batch=largest), batches, "random", {}, seed=0)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"picture": np.zeros((2, 3, 4), np.float32)}, "no array for the input 'image'"),
        ({"image": np.zeros((2, 3, 4))}, "float64, the model takes FP32"),
        ({"image": np.zeros((2, 3, 5), np.float32)}, "has the shape 2x3x5, not nx3x4"),
        ({"image": np.zeros((0, 3, 4), np.float32)}, "has the shape 0x3x4"),
    ],
    ids=["name", "type", "shape", "empty"],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(DataError, match=said):
        make_tensors(model(image()), {1: 1.0}, str(tmp_path / "data.npz"), {}, seed=0)


def test_a_file_with_python_objects_is_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", image=np.array([{}], object))
    with pytest.raises(DataError, match="cannot be read"):
        make_tensors(model(image()), {1: 1.0}, str(tmp_path / "data.npz"), {}, seed=0)


def test_batches_and_shapes_are_read() -> None:
    assert read_batches("8") == {8: 1.0}
    assert read_batches("1:3,8:1") == {1: 0.75, 8: 0.25}
    for text in ("", "x", "1:0", "1:-1", "1,1", "1:inf"):
        with pytest.raises(DataError):
            read_batches(text)
    specs = [image(), TensorSpec("mask", "BOOL", (-1,))]
    assert read_shapes(["image=1x3x4"], specs) == {"image": (1, 3, 4)}
    assert read_shapes(["1x3x4"], specs[:1]) == {"image": (1, 3, 4)}
    for text in ("1x3x4", "images=1x3", "image=1xa", "image=0x3x4"):
        with pytest.raises(DataError):
            read_shapes([text], specs)
