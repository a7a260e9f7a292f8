"""What the log says, in both forms, and that it never makes the server wait."""

from __future__ import annotations

import io
import json
import logging
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from serving_models import function, request

from narrowcast.errors import ConfigError
from narrowcast.serving.catalogue import Hosting
from narrowcast.serving.scheduling.statistics import Statistics
from narrowcast.serving.watching import logs
from narrowcast.serving.watching.events import fields
from narrowcast.serving.watching.logs import LOG_STYLES, RequestLog, logging_to, read_log_style
from narrowcast.serving.watching.overload import OverloadLog
from narrowcast.serving.workers.sources import Placement

_log = logging.getLogger("narrowcast.tests")
#: Ends a line, moves the cursor, is a C1 control sequence, turns the writing round, separates lines, is DEL.
NASTY = "a\r\nb\x1b[2Jc\x9b1md\u202ee\u2028f\x7fg"


def written(style: str, *messages: Any, **more: Any) -> list[str]:
    stream = io.StringIO()
    with logging_to(LOG_STYLES[style], stream):
        for message in messages:
            _log.info(message, **more)
    return stream.getvalue().splitlines()


def test_a_json_line_says_everything() -> None:
    (line,) = written("json", "model net is ready", extra=fields("model_ready", model="net", version="3"))
    document = json.loads(line)
    moment = datetime.fromisoformat(document.pop("time"))
    assert abs(moment.timestamp() - time.time()) < 60
    assert document == {
        "level": "info",
        "logger": "narrowcast.tests",
        "event": "model_ready",
        "message": "model net is ready",
        "model": "net",
        "version": "3",
    }


@pytest.mark.parametrize("style", ["text", "json"])
def test_what_controls_a_terminal_is_escaped(style: str) -> None:
    (line,) = written(style, NASTY)
    assert line.isprintable()
    if style == "json":
        assert json.loads(line)["message"] == NASTY
    (line,) = written(style, "", extra=fields("odd", value=NASTY))
    assert line.isprintable()


@pytest.mark.parametrize("style", ["text", "json"])
def test_an_exception_is_told(style: str) -> None:
    stream = io.StringIO()
    with logging_to(LOG_STYLES[style], stream):
        try:
            raise ValueError(NASTY)
        except ValueError:
            _log.exception("it failed")
    lines = stream.getvalue().splitlines()
    assert all(line.isprintable() for line in lines)
    if style == "json":
        (line,) = lines
        assert "ValueError" in json.loads(line)["exception"]
    else:
        assert "it failed" in lines[0]
        assert lines[1].startswith("    Traceback")
        assert any(line.startswith("    ValueError: a") for line in lines)


@pytest.mark.parametrize(
    ("style", "heard"),
    [("quiet", ["warning"]), ("events", ["event", "warning"]), ("json-events", ["event", "warning"])],
)
def test_levels(style: str, heard: list[str]) -> None:
    stream = io.StringIO()
    with logging_to(LOG_STYLES[style], stream):
        _log.debug("detail")
        _log.info("event")
        _log.warning("warning")
        logging.getLogger("elsewhere").info("not ours")
    assert [word for word in ("detail", "event", "warning", "not ours") if word in stream.getvalue()] == heard
    assert _log.getEffectiveLevel() == logging.WARNING, "the level is as it was before"


def test_an_unknown_style_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'jsno' is unknown\nAllowed: .*json"):
        read_log_style("jsno")


# requests -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    text = io.StringIO()
    with logging_to(LOG_STYLES["json"], text):
        yield text


def lines(stream: io.StringIO, count: int) -> list[dict[str, Any]]:
    """Return the lines of requests, when there are so many."""
    end = time.monotonic() + 20
    while True:
        found = [json.loads(line) for line in stream.getvalue().splitlines() if '"request"' in line]
        if len(found) >= count:
            assert len(found) == count
            return found
        assert time.monotonic() < end, found
        time.sleep(0.01)


def test_each_request_has_a_line(serve: Any, stream: io.StringIO) -> None:
    def fail(inputs: Any) -> Any:
        raise ArithmeticError("no")

    running = serve({"scale": function(), "bad": function(fail)}, observers=(RequestLog(),))
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    running.infer("scale", request(123456.0, id="mine"), traceparent=parent)
    running.ask("GET", "/v2/health/ready")
    running.ask("GET", "/v2/models/none/ready")
    running.infer("bad", request(1.0))
    running.server._api.draining = True
    running.infer("scale", request(1.0))
    first, unknown, failed, shed = lines(stream, 4)
    assert (first["level"], first["event"], first["logger"]) == ("info", "request", "narrowcast.serving.requests")
    assert (first["request_id"], first["trace_id"]) == ("mine", "0af7651916cd43dd8448eb211c80319c")
    assert (first["protocol"], first["method"], first["target"]) == ("http", "POST", "/v2/models/scale/infer")
    assert (first["model"], first["version"], first["rows"], first["status"]) == ("scale", "1", 1, 200)
    assert 0 < first["compute_ms"] <= first["total_ms"]
    assert "reason" not in first
    assert "123456" not in stream.getvalue(), "no contents of tensors"
    assert (unknown["level"], unknown["status"], unknown["reason"]) == (
        "info",
        404,
        "model 'none' is not found: unknown",
    )
    assert (failed["level"], failed["status"]) == ("error", 500)
    assert "ArithmeticError" in failed["reason"] or "no" in failed["reason"]
    assert (shed["level"], shed["status"]) == ("warning", 503)
    assert "ending" in shed["reason"]


def test_a_line_of_a_request_for_people(serve: Any) -> None:
    text = io.StringIO()
    with logging_to(LOG_STYLES["text"], text):
        running = serve({"scale": function()}, observers=(RequestLog(),))
        running.infer("scale", b"{", X_Request_Id="r1")
        running.stop()
    (line,) = [line for line in text.getvalue().splitlines() if " request " in line]
    assert "request request_id=r1 protocol=http method=POST target=/v2/models/scale/infer model=scale" in line
    assert " status=400 " in line
    assert 'reason="the request is not JSON' in line


# never in the way -----------------------------------------------------------------------------------------------------


class Stuck(io.StringIO):
    """A stream whose reader stands still until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Event()
        self.go = threading.Event()

    def write(self, text: str) -> int:
        self.begun.set()
        assert self.go.wait(20)
        return super().write(text)


def test_a_reader_that_stands_still_costs_lines_and_no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_MOST_LINES", 5)
    stream = Stuck()
    with logging_to(LOG_STYLES["json"], stream):
        _log.info("first")
        assert stream.begun.wait(20)
        for number in range(20):
            _log.info("number %d", number)
        stream.go.set()
        end = time.monotonic() + 20
        while "number 4" not in stream.getvalue():
            assert time.monotonic() < end
            time.sleep(0.005)
        _log.info("last")
    said = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["message"] for line in said] == [
        "first",
        *(f"number {number}" for number in range(5)),
        "15 lines of the log were dropped: its reader is too slow",
        "last",
    ]
    assert (said[-2]["event"], said[-2]["lines"], said[-2]["level"]) == ("log_dropped", 15, "warning")


def test_shedding_is_said_once_in_a_while(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    running = serve({"scale": function()}, hosting=Hosting(Placement.INLINE))
    statistics: Statistics = running.server.catalogue.find("scale").scheduler.statistics
    log = OverloadLog(running.server.catalogue)

    def look(now: float) -> list[str]:
        caplog.clear()
        log.look(now)
        return [record.getMessage() for record in caplog.records]

    assert look(0.0) == []
    for _ in range(3):
        statistics.reject("queue_full")
    statistics.expired += 1
    assert look(1.0) == ["model scale version 1 refused 4 requests: queue_full 3, expired 1"]
    assert caplog.records[0].__dict__["event"] == "shed"
    assert caplog.records[0].__dict__["values"] == {"model": "scale", "version": "1", "queue_full": 3, "expired": 1}
    statistics.reject("deadline")
    assert look(2.0) == []
    statistics.reject("deadline")
    assert look(11.5) == ["model scale version 1 refused 2 requests: deadline 2"]
    assert look(30.0) == []
