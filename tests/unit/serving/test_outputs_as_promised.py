"""Models whose outputs are not what their signatures say: a 500 that names the output, over both transports."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from serving_models import FOURS, function, request, spec

from narrowcast.serving.protocol.responses import check_output
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.signature import RequestedOutput, Signature

grpcclient = pytest.importorskip("tritonclient.grpc")

TEXTS = Signature((spec("x", -1, 4),), (spec("y", -1, datatype="BYTES"),), batched=True)

#: What a model gives for FP32 [-1, 4], by name, and what is said of it.
WRONG: dict[str, tuple[Any, str]] = {
    "datatype": (np.zeros((1, 4)), "the model gave float64 [1, 4] for output 'y', which is FP32 [-1, 4] (-1: any)"),
    "width": (np.zeros((1, 5), np.float32), "the model gave float32 [1, 5] for output 'y', which is FP32 [-1, 4]"),
    "rank": (np.zeros(4, np.float32), "the model gave float32 [4] for output 'y', which is FP32 [-1, 4]"),
    "list": ([[0.0] * 4], "the model gave no array but list for output 'y', which is FP32 [-1, 4]"),
}


def said_over_grpc(running: Any, model: str) -> str:
    with grpcclient.InferenceServerClient(running.grpc_address) as client:
        given = grpcclient.InferInput("x", [1, 4], "FP32")
        given.set_data_from_numpy(np.zeros((1, 4), np.float32))
        with pytest.raises(grpcclient.InferenceServerException) as caught:
            client.infer(model, [given])
    assert caught.value.status() == "StatusCode.INTERNAL"
    return str(caught.value.message())


@pytest.mark.parametrize("kind", WRONG)
def test_an_output_that_was_not_promised_is_an_error_that_names_it(kind: str, serve: Any) -> None:
    given, said = WRONG[kind]
    running = serve({"m": function(lambda inputs: {"y": given})}, grpc_port=0)
    answer = running.infer("m", request(1))
    assert (answer.status, said in answer.error) == (500, True), answer.body
    assert said in said_over_grpc(running, "m")


def test_an_output_of_another_name_is_an_error_that_names_it(serve: Any) -> None:
    running = serve({"m": function(lambda inputs: {"z": inputs["x"]})}, grpc_port=0)
    said = "the model gave nothing for output 'y', which is FP32 [-1, 4]"
    answer = running.infer("m", request(1))
    assert (answer.status, said in answer.error) == (500, True), answer.body
    assert said in said_over_grpc(running, "m")


@pytest.mark.parametrize("binary", [False, True])
def test_an_element_of_bytes_that_is_no_text_is_an_error_that_names_it(binary: bool, serve: Any) -> None:
    running = serve({"m": function(lambda inputs: {"y": np.array([7], object)}, TEXTS)}, grpc_port=0)
    answer = running.infer("m", request(1, parameters={"binary_data_output": binary}))
    said = "the model gave an element of output 'y' that is no text"
    assert (answer.status, said in answer.error) == (500, True), answer.body
    assert said in said_over_grpc(running, "m")


def test_a_model_that_goes_wrong_after_good_answers_is_found_out(serve: Any) -> None:
    """A shape that was seen to fit is not checked again, but a new one is."""
    widths = iter([4, 4, 3, 4])
    running = serve({"m": function(lambda inputs: {"y": np.zeros((1, next(widths)), np.float32)})})
    assert [running.infer("m", request(1)).status for _ in range(4)] == [200, 200, 500, 200]


def test_what_nobody_asked_for_is_not_looked_at(serve: Any) -> None:
    two = Signature(FOURS.inputs, (*FOURS.outputs, spec("z", -1, 4)), batched=True)
    running = serve({"m": function(lambda inputs: {"y": inputs["x"], "z": np.zeros(3)}, two)})
    assert running.infer("m", request(1, outputs=[{"name": "y"}])).status == 200
    answer = running.infer("m", request(1))
    assert (answer.status, "'z'" in json.loads(answer.body)["error"]) == (500, True)


def test_the_shapes_that_are_remembered_are_bounded() -> None:
    wanted = RequestedOutput(spec("y", -1, 4), binary=True)
    for rows in range(1000):
        check_output(wanted, {"y": np.zeros((rows, 4), np.float32)})
    assert len(wanted.spec.admitted) <= 256
    with pytest.raises(Refusal, match="output 'y'"):
        check_output(wanted, {"y": np.zeros((1, 4, 1), np.float32)})
