"""gRPC calls that are cancelled, late, wrong or large, and the health service."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc.model_config_pb2 as triton_config
import tritonclient.grpc.service_pb2 as triton
from serving_models import Gate, doubled, function, spec

from narrowcast.oip.messages import HEALTH, INFERENCE
from narrowcast.serving.catalogue import Hosting
from narrowcast.serving.limits import Limits
from narrowcast.serving.scheduling.queue import Batching
from narrowcast.serving.scheduling.scheduler import Settings
from narrowcast.serving.signature import Signature, Tensors
from narrowcast.serving.workers.sources import Placement

_SERVICE = "/inference.GRPCInferenceService/"
TEXT = Signature((spec("t", -1, datatype="BYTES"),), (spec("t", -1, datatype="BYTES"),), batched=False)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(0.005)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def running(serve: Any, gate: Gate) -> Any:
    sources = {"gate": function(gate), "double": function(doubled), "text": function(lambda inputs: inputs, TEXT)}
    return serve(sources, hosting=Hosting(Placement.THREAD, 1, Settings(Batching(1))), grpc_port=0)


@pytest.fixture
def channel(running: Any) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(running.grpc_address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        yield channel


def call(channel: grpc.Channel, name: str = "ModelInfer") -> Any:
    return channel.unary_unary(
        _SERVICE + name,
        request_serializer=INFERENCE[f"{name}Request"].SerializeToString,
        response_deserializer=INFERENCE[f"{name}Response"].FromString,
    )


def message(model: str, *rows: float, raw: bool = True) -> Any:
    request = INFERENCE["ModelInferRequest"](model_name=model, id="7")
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[len(rows), 4])
    data = np.repeat(np.array(rows, np.float32), 4)
    if raw:
        request.raw_input_contents.append(data.tobytes())
    else:
        tensor.contents.fp32_contents.extend(data.tolist())
    return request


def test_calls_that_are_cancelled_or_late_never_run(running: Any, channel: grpc.Channel, gate: Gate) -> None:
    scheduler = running.server.catalogue.find("gate").scheduler
    infer = call(channel)
    first = infer.future(message("gate", 1))
    assert gate.entered.acquire(timeout=20)
    cancelled = infer.future(message("gate", 2))
    wait_for(lambda: scheduler.pending == 1)
    cancelled.cancel()
    wait_for(lambda: scheduler.pending == 0)
    with pytest.raises(grpc.RpcError) as caught:
        infer(message("gate", 3), timeout=0.1)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_for(lambda: scheduler.pending == 0)
    gate.open.release()
    gate.open.release()
    assert first.result(20).id == "7"
    infer(message("gate", 4))
    assert gate.ran == [[1.0], [4.0]]


def test_contents_of_fields_and_raw_contents_are_the_same(channel: grpc.Channel) -> None:
    answers = [call(channel)(message("double", 2, raw=raw)).raw_output_contents[0] for raw in (True, False)]
    assert answers[0] == answers[1] == np.full(4, 4, np.float32).tobytes()


def test_fields_hold_what_json_cannot(channel: grpc.Channel) -> None:
    request = INFERENCE["ModelInferRequest"](model_name="double")
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    tensor.contents.fp32_contents.extend([np.nan, np.inf, -np.inf, 1])
    expected = np.array([np.nan, np.inf, -np.inf, 2], np.float32)
    np.testing.assert_array_equal(np.frombuffer(call(channel)(request).raw_output_contents[0], np.float32), expected)


def test_texts_in_fields(channel: grpc.Channel) -> None:
    request = INFERENCE["ModelInferRequest"](model_name="text")
    tensor = request.inputs.add(name="t", datatype="BYTES", shape=[2])
    tensor.contents.bytes_contents.extend([b"a", b"\xff"])
    assert call(channel)(request).raw_output_contents[0] == b"\x01\x00\x00\x00a\x01\x00\x00\x00\xff"


def test_a_large_message_goes_both_ways(running: Any, serve: Any) -> None:
    large = Signature((spec("x", -1),), (spec("y", -1),), batched=False)

    def same(inputs: Tensors) -> Tensors:
        return {"y": inputs["x"]}

    server = serve({"large": function(same, large)}, grpc_port=0)
    data = np.arange(5_000_000, dtype=np.float32).tobytes()
    request = INFERENCE["ModelInferRequest"](model_name="large")
    request.inputs.add(name="x", datatype="FP32", shape=[5_000_000])
    request.raw_input_contents.append(data)
    with grpc.insecure_channel(server.grpc_address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        assert call(channel)(request).raw_output_contents[0] == data


def test_a_message_over_the_bound_is_refused(serve: Any) -> None:
    server = serve({"double": function(doubled)}, grpc_port=0, limits=Limits(decompressed_bytes=1000))
    with grpc.insecure_channel(server.grpc_address) as channel:
        assert call(channel)(message("double", 1)).id == "7"
        with pytest.raises(grpc.RpcError) as caught:
            call(channel)(message("double", *[1] * 100))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.raw_input_contents.append(b"more"), "4 bytes belong to no input"),
        (lambda m: m.inputs[0].contents.fp32_contents.append(1), "both contents and raw contents"),
        (lambda m: m.inputs.add(name="y", datatype="FP32", shape=[1]), "too few for input 'y'"),
        (lambda m: m.inputs[0].ClearField("shape"), "takes 4"),
        (lambda m: setattr(m.inputs[0], "datatype", "FP16"), "allowed: FP32"),
        (lambda m: m.inputs[0].shape.insert(0, -1), "no tensor has shape"),
        (lambda m: m.outputs.add(name="z"), "no output 'z'"),
        (lambda m: setattr(m.parameters["sequence_id"], "int64_param", 3), "keeps no sequences"),
        (lambda m: setattr(m.parameters["timeout"], "string_param", "soon"), "'timeout' is 'soon'"),
        (lambda m: setattr(m, "model_version", "9"), "no version '9'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_messages_that_do_not_fit_are_refused(channel: grpc.Channel, change: Callable[[Any], Any], said: str) -> None:
    request = message("double", 1)
    change(request)
    with pytest.raises(grpc.RpcError) as caught:
        call(channel)(request)
    assert said in str(caught.value.details())
    assert caught.value.code() in (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.UNIMPLEMENTED,
    )


def test_health(running: Any, channel: grpc.Channel) -> None:
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=HEALTH["HealthCheckRequest"].SerializeToString,
        response_deserializer=HEALTH["HealthCheckResponse"].FromString,
    )

    def status(service: str) -> int:
        return check(HEALTH["HealthCheckRequest"](service=service)).status

    assert [status(service) for service in ("", "inference.GRPCInferenceService", "double")] == [1, 1, 1]
    with pytest.raises(grpc.RpcError) as caught:
        status("unknown")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    watch = channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=HEALTH["HealthCheckRequest"].SerializeToString,
        response_deserializer=HEALTH["HealthCheckResponse"].FromString,
    )(HEALTH["HealthCheckRequest"](service="double"))
    assert next(watch).status == 1
    running.call(running.server.catalogue.unload("double"))
    assert next(watch).status == 3
    watch.cancel()


def test_messages_are_those_that_clients_were_generated_with() -> None:
    """Every field of ours has the number, the type and the label that NVIDIA's stubs give it."""
    theirs = {**triton.DESCRIPTOR.message_types_by_name, **triton_config.DESCRIPTOR.message_types_by_name}
    ours = INFERENCE["ModelInferRequest"].DESCRIPTOR.file.message_types_by_name
    compared = 0

    def compare(mine: Any, other: Any) -> None:
        nonlocal compared
        for field in mine.fields:
            known = other.fields_by_name[field.name]
            assert (field.number, field.type, field.is_repeated) == (known.number, known.type, known.is_repeated), (
                mine.full_name,
                field.name,
            )
            compared += 1
        for nested in mine.nested_types:
            compare(nested, other.nested_types_by_name[nested.name])
        for enum in mine.enum_types:
            assert dict(values(enum)).items() <= dict(values(other.enum_types_by_name[enum.name])).items()

    def values(enum: Any) -> list[tuple[str, int]]:
        return [(value.name, value.number) for value in enum.values]

    for name, mine in ours.items():
        compare(mine, theirs[name])
    assert compared > 100
    types = INFERENCE["ModelInput"].DESCRIPTOR.fields_by_name["data_type"].enum_type
    assert values(types) == values(triton_config.DESCRIPTOR.enum_types_by_name["DataType"])
