"""The gRPC client against planted answers."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from planted_grpc import Planted, serving

from narrowcast.errors import ModelError
from narrowcast.load.arrivals import Constant
from narrowcast.load.fleet import Options
from narrowcast.load.rpc import outcome_of_error
from narrowcast.load.session import Asked, Content, Session
from narrowcast.load.target import read_target
from narrowcast.measure.load.records import Outcome

ASKED = Asked(seconds=1.0, warmup=0.0, lateness=60.0)


@pytest.fixture
def planted() -> Planted:
    return Planted()


@pytest.fixture
def url(planted: Planted) -> Iterator[str]:
    with serving(planted) as where:
        yield where


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
