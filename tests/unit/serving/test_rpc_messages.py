"""Inference messages: what is read quickly is read as everything else is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_models import spec

from narrowcast.oip.messages import INFERENCE
from narrowcast.serving.limits import Limits
from narrowcast.serving.protocol.requests import InferRequest
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.rpc.tensors import read_message
from narrowcast.serving.shared_memory import SharedMemory
from narrowcast.serving.signature import Signature

SIGNATURE = Signature(
    (spec("x", -1, -1), spec("flags", -1, datatype="BOOL")), (spec("y", -1, 2), spec("z", -1)), batched=True
)
_SIZES = {"FP32": 4, "BOOL": 1, "INT64": 8, "what": 1}

tensors = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["x", "x", "x", "flags", "flags", "other"]),
        "datatype": st.sampled_from(["FP32", "FP32", "FP32", "BOOL", "BOOL", "BOOL", "INT64", "what"]),
        "shape": st.lists(st.integers(-1, 3), max_size=3) | st.sampled_from([[2, 2], [2], [1, 2], [1], [1 << 62, 2]]),
        "extra": st.sampled_from([0, 0, 0, 0, 1, -1]),
    }
)
FITTING = [
    {"name": "x", "datatype": "FP32", "shape": [2, 2], "extra": 0},
    {"name": "flags", "datatype": "BOOL", "shape": [2], "extra": 0},
]


def message(inputs: list[dict[str, Any]], parts: int) -> Any:
    request = INFERENCE["ModelInferRequest"](model_name="m", id="7")
    for item in inputs:
        request.inputs.add(name=item["name"], datatype=item["datatype"], shape=item["shape"])
    for item in inputs[:parts]:
        size = math.prod(max(0, axis) % 100 for axis in item["shape"]) * _SIZES[item["datatype"]]
        request.raw_input_contents.append(b"\1" * max(0, size + item["extra"]))
    return request


def read(request: Any) -> InferRequest | Refusal:
    try:
        return read_message(request, SIGNATURE, Limits(), SharedMemory(allowed=False))
    except Refusal as refusal:
        return refusal


@given(st.lists(tensors, max_size=3) | st.permutations(FITTING), st.integers(0, 9))
def test_a_request_that_names_all_outputs_is_read_as_one_that_names_none(inputs: list[Any], missing: int) -> None:
    """Only the latter can be read the quick way."""
    quick = message(inputs, len(inputs) - (missing == 0))
    general = INFERENCE["ModelInferRequest"].FromString(quick.SerializeToString())
    for output in SIGNATURE.outputs:
        general.outputs.add(name=output.name)
    one, other = read(quick), read(general)
    if isinstance(one, Refusal) or isinstance(other, Refusal):
        assert isinstance(one, Refusal)
        assert isinstance(other, Refusal)
        assert one.status == other.status
        return
    assert (one.id, one.rows, one.priority, one.timeout) == (other.id, other.rows, other.priority, other.timeout)
    assert [wanted.spec for wanted in one.outputs] == [wanted.spec for wanted in other.outputs]
    assert one.inputs.keys() == other.inputs.keys()
    for name, array in one.inputs.items():
        assert array.dtype == other.inputs[name].dtype
        np.testing.assert_array_equal(array, other.inputs[name])


def test_fitting_inputs_are_read() -> None:
    found = read(message(FITTING, 2))
    assert isinstance(found, InferRequest)
    assert found.rows == 2
    assert found.inputs["flags"].tolist() == [True, True]


@pytest.mark.parametrize(
    ("index", "shape", "extra"),
    [(0, [0, 2], 0), (0, [1, 2], 0), (1, [1], 0), (0, [2], 0), (0, [-1, -2], 8), (0, [0, 1 << 62], 0)],
)
def test_shapes_that_do_not_fit_are_refused(index: int, shape: list[int], extra: int) -> None:
    inputs = [dict(item) for item in FITTING]
    inputs[index] |= {"shape": shape, "extra": extra}
    assert isinstance(read(message(inputs, 2)), Refusal)
