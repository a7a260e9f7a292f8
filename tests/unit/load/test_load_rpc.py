"""The gRPC client against planted answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

from narrowcast.errors import ModelError
from narrowcast.load.arrivals import Constant
from narrowcast.load.fleet import Options
from narrowcast.load.rpc import outcome_of_error
from narrowcast.load.session import Asked, Content, Session
from narrowcast.load.target import read_target
from narrowcast.measure.load.records import Outcome
from narrowcast.oip.messages import INFERENCE

ASKED = Asked(seconds=1.0, warmup=0.0, lateness=60.0)


class Planted:
    """A service whose answers follow each other in turn; the first request only asks whether all is well."""

    def __init__(self) -> None:
        self.codes: list[grpc.StatusCode | None] = [None]
        self.seconds = 0.0
        self.requests: list[Any] = []

    def infer(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.requests.append(request)
        time.sleep(self.seconds)
        code = self.codes[len(self.requests) % len(self.codes)]
        if code is not None:
            context.abort(code, "planted")
        return INFERENCE["ModelInferResponse"](model_name="fake")

    def metadata(self, request: Any, context: grpc.ServicerContext) -> Any:
        if request.name != "fake":
            context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        found = INFERENCE["ModelMetadataResponse"](name="fake", platform="none")
        found.inputs.add(name="x", datatype="FP32", shape=[-1, 4])
        return found

    def server(self, request: Any, context: grpc.ServicerContext) -> Any:
        return INFERENCE["ServerMetadataResponse"](name="fake server", version="1")

    def index(self, request: Any, context: grpc.ServicerContext) -> Any:
        found = INFERENCE["RepositoryIndexResponse"]()
        found.models.add(name="fake", state="READY")
        return found


@pytest.fixture
def planted() -> Planted:
    return Planted()


@pytest.fixture
def url(planted: Planted) -> Iterator[str]:
    methods = {
        "ModelInfer": planted.infer,
        "ModelMetadata": planted.metadata,
        "ServerMetadata": planted.server,
        "RepositoryIndex": planted.index,
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            method,
            request_deserializer=INFERENCE[f"{name}Request"].FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
        for name, method in methods.items()
    }
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"grpc://127.0.0.1:{port}"
        server.stop(None).wait()


def counts(session: Session, asked: Asked = ASKED) -> dict[str, int]:
    measured = session.open_loop(Constant(40.0), asked, lambda progress: False)
    assert np.isnan(measured.records["first"]).all()  # gRPC does not tell
    good = measured.records["outcome"] == Outcome.OK
    assert (measured.records["done"][good] >= measured.records["sent"][good]).all()
    return {name: count for name, count in measured.run.counts.model_dump().items() if count and name != "due"}


def test_calls_are_sent_when_they_are_due_and_their_codes_counted(url: str, planted: Planted) -> None:
    with Session(read_target(url), "fake", "", Content(), Options(timeout=5.0)) as session:
        assert session.known.largest_batch is None  # this server has no ModelConfig
        planted.codes = [None, None, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT]
        assert counts(session) == {"ok": 20, "shed": 10, "error": 10}
    message = planted.requests[-1]
    assert message.model_name == "fake"
    assert list(message.inputs[0].shape) == [1, 4]
    assert len(message.raw_input_contents[0]) == 16


def test_calls_end_at_their_deadline(url: str, planted: Planted) -> None:
    with Session(read_target(url), "fake", "", Content(), Options(timeout=0.4)) as session:
        planted.seconds = 1.0
        found = counts(session)
    assert found == {"timeout": 40}


@pytest.mark.parametrize(
    ("details", "outcome"),
    [
        ("failed to connect to all addresses", Outcome.BROKEN),
        ("Socket closed", Outcome.BROKEN),
        ("Connection reset by peer", Outcome.BROKEN),
        ("GOAWAY received", Outcome.BROKEN),
        ("sendmsg: Broken pipe", Outcome.BROKEN),
        ("the queue of the pipeline is full", Outcome.SHED),
    ],
)
def test_a_connection_that_ends_is_not_shed(details: str, outcome: Outcome) -> None:
    assert outcome_of_error(14, details) is outcome
    assert outcome_of_error(8, details) is Outcome.SHED


def test_a_model_that_is_not_there_is_named(url: str) -> None:
    with pytest.raises(ModelError, match="did you mean fake"):
        Session(read_target(url), "fakes", "", Content(), Options())
