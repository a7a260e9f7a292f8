"""The end of a server as clients of gRPC see it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from serving_models import Gate, function

from narrowcast.oip.messages import INFERENCE
from narrowcast.serving.catalogue import Hosting
from narrowcast.serving.scheduling.queue import Batching
from narrowcast.serving.scheduling.scheduler import Settings
from narrowcast.serving.workers.sources import Placement

HOSTING = Hosting(Placement.THREAD, 1, Settings(Batching(1)))


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def channels() -> Iterator[list[grpc.Channel]]:
    found: list[grpc.Channel] = []
    yield found
    for channel in found:
        channel.close()


def calls(channels: list[grpc.Channel], running: Any) -> tuple[Any, Any]:
    """The calls that infer and that ask whether the server is ready."""
    channels.append(grpc.insecure_channel(running.grpc_address))
    infer, ready = (
        channels[-1].unary_unary(
            f"/inference.GRPCInferenceService/{name}",
            request_serializer=INFERENCE[f"{name}Request"].SerializeToString,
            response_deserializer=INFERENCE[f"{name}Response"].FromString,
        )
        for name in ("ModelInfer", "ServerReady")
    )
    return infer, lambda: ready(INFERENCE["ServerReadyRequest"]()).ready


def message(value: float) -> Any:
    request = INFERENCE["ModelInferRequest"](model_name="gate")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(np.full(4, value, np.float32).tobytes())
    return request


def wait_for(condition: Any) -> None:
    pause = threading.Event()
    for _ in range(4000):
        if condition():
            return
        pause.wait(0.005)
    raise AssertionError("it never came to pass")


def test_what_is_under_way_is_finished_and_the_rest_is_told(
    serve: Any, gate: Gate, channels: list[grpc.Channel]
) -> None:
    running = serve({"gate": function(gate)}, hosting=HOSTING, grpc_port=0)
    infer, ready = calls(channels, running)
    first, second = infer.future(message(1)), infer.future(message(2))
    assert gate.entered.acquire(timeout=20)
    wait_for(lambda: running.server.catalogue.find("gate").scheduler.pending == 1)
    assert ready()
    stopping = threading.Thread(target=running.stop)
    stopping.start()
    wait_for(lambda: not ready())
    with pytest.raises(grpc.RpcError) as caught:
        infer(message(3))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "the server is ending" in str(caught.value.details())
    for _ in range(2):
        gate.open.release()
    assert [len(found.result(20).raw_output_contents) for found in (first, second)] == [1, 1]
    stopping.join(20)
    assert sorted(gate.ran) == [[1.0], [2.0]]


def test_what_is_not_finished_within_the_grace_is_told_and_not_reset(
    serve: Any, gate: Gate, channels: list[grpc.Channel]
) -> None:
    running = serve({"gate": function(gate)}, hosting=HOSTING, grpc_port=0, grace=0.2)
    infer, _ = calls(channels, running)
    waiting = [infer.future(message(number)) for number in range(3)]
    assert gate.entered.acquire(timeout=20)
    wait_for(lambda: running.server.catalogue.find("gate").scheduler.pending == 2)
    running.stop()
    gate.open.release()
    for call in waiting:
        assert call.exception(20).code() is grpc.StatusCode.UNAVAILABLE
        assert "the server is ending" in str(call.exception().details()), "an answer, and no connection that broke"
