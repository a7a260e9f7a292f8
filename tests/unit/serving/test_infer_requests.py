"""Inference requests as clients send them, and as they should not."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_models import FOURS, spec

from narrowcast.serving.datatypes import DATATYPES, decode_binary, decode_json, encode_binary, encode_json
from narrowcast.serving.limits import Limits
from narrowcast.serving.protocol.requests import InferRequest, read_infer
from narrowcast.serving.protocol.responses import infer_response
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.signature import SharedSlice, Signature

LIMITS = Limits(tensors=4, rank=6)
TWO = Signature(
    (spec("x", -1, 2), spec("t", -1, datatype="BYTES")),
    (spec("y", -1, 2), spec("t", -1, datatype="BYTES")),
    batched=True,
)


class NoRegions:
    """No shared memory."""

    def read(self, place: SharedSlice) -> bytes:
        raise Refusal(400, "no such region")

    def write(self, place: SharedSlice, data: bytes | memoryview) -> None:
        raise Refusal(400, "no such region")


def read(body: bytes | dict[str, Any], header_length: int | None = None, signature: Signature = FOURS) -> InferRequest:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_infer(text, header_length, signature, LIMITS, NoRegions())


def described(**changes: Any) -> dict[str, Any]:
    """A request for FOURS with one field of its input changed; None removes the field."""
    item = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]} | changes
    return {"inputs": [{key: value for key, value in item.items() if value is not None}]}


def binary(shape: list[int], data: bytes, size: int | None = None, **more: Any) -> tuple[bytes, int]:
    parameters = {"binary_data_size": len(data) if size is None else size}
    item = {"name": "x", "shape": shape, "datatype": "FP32", "parameters": parameters}
    head = json.dumps({"inputs": [item], **more}).encode()
    return head + data, len(head)


# What is understood ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [[1, 2, 3, 4, 5, 6, 7, 8.5], [[1, 2, 3, 4], [5, 6, 7, 8.5]]], ids=["flat", "nested"])
def test_json_flat_and_nested(data: list[Any]) -> None:
    request = read(described(shape=[2, 4], data=data))
    assert request.rows == 2
    np.testing.assert_array_equal(request.inputs["x"], np.array([[1, 2, 3, 4], [5, 6, 7, 8.5]], np.float32))


def test_binary_data_behind_the_header() -> None:
    data = np.arange(8, dtype=np.float32)
    body, length = binary([2, 4], data.tobytes(), id="7", parameters={"priority": 2, "timeout": 1500})
    request = read(body, length)
    np.testing.assert_array_equal(request.inputs["x"], data.reshape(2, 4))
    assert (request.id, request.priority, request.timeout) == ("7", 2, pytest.approx(0.0015))


def test_a_raw_tensor() -> None:
    data = np.arange(4, dtype=np.float32)
    request = read(data.tobytes(), 0)
    np.testing.assert_array_equal(request.inputs["x"], data.reshape(1, 4))
    assert all(output.binary for output in request.outputs)


def test_a_raw_text_is_one_element() -> None:
    texts = Signature((spec("t", -1, 1, datatype="BYTES"),), (), batched=True)
    assert read(b"hello", 0, texts).inputs["t"].tolist() == [[b"hello"]]


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32", "FP64"])
@pytest.mark.parametrize("count", [0, 1, 100])
def test_integers_stand_for_real_numbers(datatype: str, count: int) -> None:
    value = 2**15 if datatype == "FP16" else 2**64 - 2**63
    tensor = decode_json("x", DATATYPES[datatype], [count], [value] * count)
    assert tensor.dtype == DATATYPES[datatype].dtype
    assert tensor.tolist() == [value] * count


def test_outputs_are_as_they_were_asked_for() -> None:
    asked = {
        "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
        "parameters": {"binary_data_output": False},
    }
    assert [output.binary for output in read(described() | asked).outputs] == [True]
    assert [output.binary for output in read(described() | {"parameters": {"binary_data_output": True}}).outputs] == [
        True
    ]
    assert [output.binary for output in read(described()).outputs] == [False]


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "no JSON object"),
        (b"[" * 5000, "not JSON"),
        (b'{"inputs":[{"name":"\xff"}]}', "not JSON"),
        (b'{"inputs":NaN}', "not JSON"),
        ({}, "'inputs' is no array"),
        ({"inputs": {}}, "'inputs' is no array"),
        ({"inputs": [3]}, "no JSON object"),
        ({"inputs": []}, "input 'x' is missing"),
        ({"inputs": [{}] * 5}, "more than 4 items"),
        (described(name=None), "no 'name'"),
        (described(name="z"), "no input 'z'"),
        (described(datatype=None), "datatype None; allowed: FP32"),
        (described(datatype="FP64"), "datatype 'FP64'; allowed: FP32"),
        (described(shape=None), "'shape' of integers"),
        (described(shape=[1, 4.0]), "'shape' of integers"),
        (described(shape=[True, 4]), "'shape' of integers"),
        (described(shape=[-1, 4]), "no tensor has shape"),
        (described(shape=[1, -4]), "no tensor has shape"),
        (described(shape=[10**18, 10**18]), "no tensor has shape"),
        (described(shape=[2**62, 4]), "no tensor has shape"),
        (described(shape=[0, 2**63], data=[]), "no tensor has shape"),
        (described(shape=[1] * 7), "more than 6 axes"),
        (described(shape=[10**9, 4]), "has 4 values"),
        (described(shape=[4]), "has shape [4]"),
        (described(shape=[1, 2, 2]), "has shape [1, 2, 2]"),
        (described(shape=[2, 2]), "has shape [2, 2]"),
        (described(shape=[0, 4], data=[]), "no rows"),
        (described(data=None), "array in 'data'"),
        (described(data="1234"), "array in 'data'"),
        (described(data=[1, 2, 3]), "has 3 values"),
        (described(data=[1, 2, 3, 4, 5]), "has 5 values"),
        (described(data=[1, 2, 3, None]), "None is no value of FP32"),
        (described(data=[1, 2, 3, "4"]), "'4' is no value of FP32"),
        (described(data=[1, 2, 3, True]), "True is no value of FP32"),
        (described(data=[1, 2, 3, 1e39]), "out of the range of FP32"),
        (described(data=[1, 2, 3, {}]), "no value of FP32"),
        (described(data=[[1, 2], [3, 4]]), "axis 0"),
        (described(data=[[[1, 2, 3, 4]]]), "axis 1"),
        (described(shape=[2, 4], data=[[1, 2, 3, 4], 5]), "not nested as deep"),
        (described(parameters=3), "no JSON object"),
        (described(parameters={"binary_data_size": 16}, data=None), "0 bytes are left"),
        (described(parameters={"binary_data_size": 0}), "more than one of 'data'"),
        (described(parameters={"shared_memory_region": "r"}, data=None), "both valid"),
        (described(parameters={"shared_memory_region": "r", "shared_memory_byte_size": -1}, data=None), "both valid"),
        (
            described(parameters={"shared_memory_region": "r", "shared_memory_byte_size": 16}, data=None),
            "no such region",
        ),
        ({"inputs": described()["inputs"] * 2}, "given twice"),
        (described() | {"id": 7}, "'id' is no text"),
        (described() | {"parameters": []}, "no JSON object"),
        (described() | {"parameters": {"priority": -1}}, "'priority' is -1"),
        (described() | {"parameters": {"priority": "high"}}, "'priority' is 'high'"),
        (described() | {"parameters": {"timeout": 1.5}}, "'timeout' is 1.5"),
        (described() | {"parameters": {"binary_data_output": 1}}, "neither true nor false"),
        (described() | {"parameters": {"sequence_id": 5}}, "keeps no sequences"),
        (described() | {"outputs": [{"name": "z"}]}, "no output 'z'"),
        (described() | {"outputs": [{"name": "y"}, {"name": "y"}]}, "asked for twice"),
        (described() | {"outputs": [{"name": "y", "parameters": {"classification": 3}}]}, "classification"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_request_that_does_not_fit_is_refused(body: bytes | dict[str, Any], said: str) -> None:
    with pytest.raises(Refusal) as caught:
        read(body)
    assert said in caught.value.message
    assert caught.value.status in (400, 501)


DATA = np.arange(4, dtype=np.float32).tobytes()


@pytest.mark.parametrize(
    ("body", "length", "said"),
    [
        (*binary([1, 4], DATA + b"x"), "17 bytes were sent"),
        (*binary([1, 4], DATA, size=15), "15 bytes were sent"),
        (*binary([1, 4], DATA, size=17), "16 bytes are left"),
        (*binary([1, 4], DATA, size=-1), "16 bytes are left"),
        (*binary([1, 4], DATA, size=10**30), "16 bytes are left"),
        (*binary([2, 4], DATA), "takes 32"),
        (*binary([10**12, 4], DATA), "takes 16000000000000"),
        (binary([1, 4], DATA)[0], 10_000, "but the body has"),
        (binary([1, 4], DATA)[0], 7, "not JSON"),
        (DATA + b"x", 0, "17 bytes were sent"),
        (b"", 0, "0 bytes were sent"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_binary_data_that_does_not_fit_are_refused(body: bytes, length: int, said: str) -> None:
    with pytest.raises(Refusal, match=said):
        read(body, length)


def test_bytes_that_belong_to_nobody_are_refused() -> None:
    body, length = binary([1, 4], DATA, size=16)
    with pytest.raises(Refusal, match="3 bytes belong to no input"):
        read(body + b"xyz", length)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x06\x00\x00\x00abcde", "reaches past the end"),
        (b"\xff\xff\xff\xffabcde", "reaches past the end"),
        (b"\x01\x00\x00\x00a\x01", "cannot hold"),
        (b"\x04\x00\x00\x00aaaa", "end before element 1"),
        (b"\x01\x00\x00\x00a\x01\x00\x00\x00bc", "1 bytes follow"),
    ],
)
def test_texts_that_do_not_fit_their_lengths_are_refused(data: bytes, said: str) -> None:
    with pytest.raises(Refusal, match=said):
        decode_binary("t", DATATYPES["BYTES"], [2], memoryview(data))


def test_a_byte_that_is_no_truth_value_is_refused() -> None:
    with pytest.raises(Refusal, match="neither 0 nor 1"):
        decode_binary("b", DATATYPES["BOOL"], [2], memoryview(b"\x01\x02"))


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        *(("INT8", 128), ("UINT8", -1), ("INT64", 2**63), ("UINT64", 2**64), ("INT32", 1.5)),
        *(("FP16", 65_520), ("BF16", 3.5e38), ("FP32", -1e39), ("BOOL", 1), ("BYTES", 3)),
    ],
)
@pytest.mark.parametrize("count", [1, 100])
def test_numbers_out_of_range_are_refused(datatype: str, value: Any, count: int) -> None:
    with pytest.raises(Refusal):
        decode_json("x", DATATYPES[datatype], [count], [value] * count)


# Responses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_json_has_no_infinity_and_binary_data_has(value: float) -> None:
    outputs = {"y": np.array([[1, value, 3, 4]], np.float32)}
    with pytest.raises(Refusal, match="NaN or infinity"):
        infer_response("m", "1", read(described()), outputs, NoRegions())
    request = read(described() | {"parameters": {"binary_data_output": True}})
    assert infer_response("m", "1", request, outputs, NoRegions()).body[1] == outputs["y"].tobytes()


def test_a_model_named_null_has_finite_outputs() -> None:
    outputs = {"y": np.ones((1, 4), np.float32)}
    document = json.loads(infer_response("null", "1", read(described()), outputs, NoRegions()).body[0])
    assert document["outputs"][0]["data"] == [1.0] * 4


def test_text_that_is_not_utf8_needs_binary_data() -> None:
    with pytest.raises(Refusal, match="not UTF-8"):
        encode_json("t", DATATYPES["BYTES"], np.array([b"\xff"], object))


def test_outputs_that_are_no_rows_of_memory_are_sent_in_order() -> None:
    turned = np.arange(6, dtype=np.int32).reshape(2, 3).T
    assert bytes(encode_binary(DATATYPES["INT32"], turned)) == struct.pack("<6i", 0, 3, 1, 4, 2, 5)
    assert np.asarray(encode_json("y", DATATYPES["INT32"], turned)).tolist() == [0, 3, 1, 4, 2, 5]


# Anything -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=9), max_size=9))
def test_texts_come_back(texts: list[bytes]) -> None:
    array = np.array([*texts, None], object)[:-1]
    data = encode_binary(DATATYPES["BYTES"], array)
    assert decode_binary("t", DATATYPES["BYTES"], [len(texts)], memoryview(data)).tolist() == texts


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
PARAMETERS = st.dictionaries(
    st.sampled_from(["binary_data_size", "binary_data", "shared_memory_region", "shared_memory_byte_size", "other"]),
    st.integers(-3, 40) | JSON_VALUES,
    max_size=3,
)
TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["x", "t", "z"]) | JSON_VALUES,
        "datatype": st.sampled_from(["FP32", "BYTES"]) | JSON_VALUES,
        "shape": st.lists(st.integers(-1, 3), max_size=3) | JSON_VALUES,
        "data": st.lists(st.floats(width=32, allow_nan=False) | st.text(max_size=3), max_size=6) | JSON_VALUES,
        "parameters": PARAMETERS | JSON_VALUES,
    },
)
DOCUMENTS = st.fixed_dictionaries(
    {"inputs": st.lists(TENSORS | JSON_VALUES, max_size=3) | JSON_VALUES},
    optional={
        "id": st.text(max_size=3) | JSON_VALUES,
        "outputs": st.lists(TENSORS | JSON_VALUES, max_size=3) | JSON_VALUES,
        "parameters": PARAMETERS | JSON_VALUES,
    },
)


def check_anything(body: bytes, header_length: int | None) -> None:
    """Whatever comes is a request that fits, or is refused with a status of the client's."""
    try:
        request = read(body, header_length, TWO)
    except Refusal as caught:
        refusal = caught
    else:
        refusal = None
    if refusal is not None:
        assert 400 <= refusal.status < 500 or refusal.status == 501
        assert refusal.message
        return
    assert request.inputs.keys() == {"x", "t"}
    assert request.inputs["x"].dtype == np.float32
    assert request.inputs["x"].shape == (request.rows, 2)
    assert request.inputs["t"].shape == (request.rows,)


@settings(max_examples=400, deadline=None)
@given(DOCUMENTS, st.binary(max_size=40), st.integers(-2, 2) | st.none())
def test_any_document_is_read_or_refused(document: Any, data: bytes, off: int | None) -> None:
    head = json.dumps(document).encode()
    check_anything(head + data, None if off is None else max(0, len(head) + off))


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(st.binary(max_size=4), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    st.integers(-1, 1),
)
def test_any_change_to_a_good_request_is_read_or_refused(
    rows: int, texts: list[bytes], changes: list[tuple[int, int]], off: int
) -> None:
    numbers = np.ones((rows, 2), np.float32).tobytes()
    strings = bytes(encode_binary(DATATYPES["BYTES"], np.array([*texts, None], object)[:-1]))
    inputs = [
        {"name": "x", "shape": [rows, 2], "datatype": "FP32", "parameters": {"binary_data_size": len(numbers)}},
        {"name": "t", "shape": [len(texts)], "datatype": "BYTES", "parameters": {"binary_data_size": len(strings)}},
    ]
    head = json.dumps({"inputs": inputs}).encode()
    body = bytearray(head + numbers + strings)
    for place, value in changes:
        body[place % len(body)] = value
    check_anything(bytes(body), max(1, len(head) + off))


@pytest.mark.parametrize("count", [1, 100])
@pytest.mark.parametrize(
    ("datatype", "value"),
    [("FP32", 3.4028235e38), ("FP32", -3.4028235677973362e38), ("FP16", 65519.99), ("BF16", 3.3895314e38)],
)
def test_the_largest_numbers_as_they_are_commonly_written(datatype: str, value: float, count: int) -> None:
    """Shortest decimal fractions may lie above the number that they stand for."""
    read_back = decode_json("x", DATATYPES[datatype], (count,), [value] * count)
    assert np.isfinite(read_back).all()
    largest = np.array(np.inf, DATATYPES[datatype].dtype).view(f"u{read_back.dtype.itemsize}") - 1
    assert (np.abs(read_back).view(f"u{read_back.dtype.itemsize}") == largest).all()


@pytest.mark.parametrize("count", [1, 100])
@pytest.mark.parametrize(
    ("datatype", "value"), [("FP32", 2.0**128 - 2.0**103), ("FP16", 65520), ("BF16", -(2.0**128 - 2.0**119))]
)
def test_the_smallest_numbers_that_are_rounded_to_infinity(datatype: str, value: float, count: int) -> None:
    with pytest.raises(Refusal, match="out of the range"):
        decode_json("x", DATATYPES[datatype], (count,), [value] * count)


#: Stands for arrays as deep as JSON may be, which is deeper than Python shows.
DEEP = "a deep array"


@pytest.mark.parametrize(
    "document",
    [
        described(data=[1, DEEP]),
        described(datatype=DEEP),
        described(parameters={"binary_data_size": DEEP}, data=None),
        described() | {"parameters": {"priority": DEEP}},
        described() | {"parameters": {"timeout": DEEP}},
        described() | {"outputs": [{"name": DEEP}]},
        described(datatype="F" * 10**6),
        described(name="x" * 10**6),
    ],
    ids=["data", "datatype", "size", "priority", "timeout", "output", "long datatype", "long name"],
)
def test_what_is_wrong_is_shown_in_short(document: dict[str, Any]) -> None:
    text = json.dumps(document).replace(f'"{DEEP}"', "[" * 1000 + "]" * 1000)
    with pytest.raises(Refusal) as caught:
        read(text.encode())
    assert caught.value.status == 400
    assert len(caught.value.message) <= 2000


def test_shared_memory_of_a_request_is_bounded() -> None:
    """A region may say that it is large without taking any memory: what is read of it is bounded before it is read."""
    huge = 1 << 40
    item = {"name": "x", "datatype": "FP32", "shape": [huge // 16, 4]}
    item["parameters"] = {"shared_memory_region": "r", "shared_memory_byte_size": huge}
    with pytest.raises(Refusal, match="shared memory; allowed") as caught:
        read({"inputs": [item]})
    assert caught.value.status == 413


def test_elements_that_are_neither_text_nor_bytes_are_no_zeros() -> None:
    with pytest.raises(TypeError):
        encode_binary(DATATYPES["BYTES"], np.array([3], object))
