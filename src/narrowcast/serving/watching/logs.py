"""The log: events, and a line for each request, as text or as JSON.

It is the standard library's logging. Lines are made and written by a thread of their own, from a bounded queue: a reader
of the log that stands still costs lines, which are counted, and never time or memory of the server.
"""

from __future__ import annotations

import json
import logging
import sys
import unicodedata
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from queue import SimpleQueue
from typing import Any, TextIO

from narrowcast.errors import ConfigError, choices
from narrowcast.serving.watching.events import fields
from narrowcast.serving.watching.records import RequestRecord

__all__ = ["LOG_STYLES", "JsonLines", "LogStyle", "RequestLog", "TextLines", "logging_to", "read_log_style"]

_requests = logging.getLogger("narrowcast.serving.requests")

#: Lines that may wait for the thread that writes them.
_MOST_LINES = 10_000
#: Statuses that say that the server could not, and not that the client was wrong.
_OVERLOAD = frozenset((429, 503, 504, 507))


@dataclass(frozen=True)
class LogStyle:
    """What is logged, and how.

    Attributes:
        json: Whether each line is a JSON object.
        requests: Whether each request has a line.
        level: Events below this level of the standard library are left out.
    """

    json: bool = False
    requests: bool = False
    level: int = logging.INFO


LOG_STYLES = {
    "quiet": LogStyle(level=logging.WARNING),
    "events": LogStyle(),
    "text": LogStyle(requests=True),
    "json": LogStyle(json=True, requests=True),
    "json-events": LogStyle(json=True),
}


def read_log_style(name: str) -> LogStyle:
    """Return the style of that name.

    Raises:
        ConfigError: There is none.
    """
    style = LOG_STYLES.get(name)
    if style is None:
        raise ConfigError(f"log {name!r} is unknown", allowed=choices(name, LOG_STYLES))
    return style


class RequestLog:
    """An observer that logs each request, but for reading calls that succeed: probes come every second.

    The lines go to the logger ``narrowcast.serving.requests``, wherever the program sends that. They hold no contents of
    tensors.
    """

    def ended(self, record: RequestRecord) -> None:
        """Log a request: at level INFO, WARNING where the server could not, ERROR where it or a model made a mistake."""
        status = record.status
        if record.routine:
            return
        level = logging.INFO
        if status >= 500 or status == 429:
            level = logging.WARNING if status in _OVERLOAD else logging.ERROR
        if _requests.isEnabledFor(level):
            _requests.log(level, "", extra=fields("request", **_values(record)))


def _values(record: RequestRecord) -> dict[str, str | float]:
    """Return what a line says of a request; what is not known of it is left out."""
    values: dict[str, str | float] = {
        "request_id": record.request_id,
        "trace_id": record.trace_id,
        "protocol": record.protocol,
        "method": record.method,
        "target": record.target,
        "model": record.model,
        "version": record.version,
        "rows": record.rows,
    }
    known = {name: value for name, value in values.items() if value}
    known["status"] = record.status
    if record.job is not None:
        known |= {"queue_ms": _ms(record.queue_ns), "compute_ms": _ms(record.compute_ns)}
    known["total_ms"] = _ms(record.total_ns)
    return known | {"reason": record.reason} if record.reason else known


def _ms(ns: int) -> float:
    return round(ns * 1e-6, 3)


# lines ----------------------------------------------------------------------------------------------------------------


class JsonLines(logging.Formatter):
    """One JSON object on one line, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _when(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.__dict__.get("event", "message"),
        }
        message = record.getMessage()
        if message:
            line["message"] = message
        line |= record.__dict__.get("values", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line).replace("\x7f", "\\u007f")


class TextLines(logging.Formatter):
    """One line for people; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        words = record.getMessage()
        if not words:
            values: dict[str, object] = record.__dict__.get("values", {})
            pairs = (f"{name}={json.dumps(value) if ' ' in str(value) else value}" for name, value in values.items())
            words = " ".join((record.__dict__.get("event", "message"), *pairs))
        line = f"{_when(record)} {record.levelname:7} {_escaped(words)}"
        if record.exc_info:
            trace = self.formatException(record.exc_info).splitlines()
            line = "\n    ".join((line, *map(_escaped, trace)))
        return line


def _when(record: logging.LogRecord) -> str:
    """Return the time of a line in UTC, as RFC 3339 has it."""
    moment = datetime.fromtimestamp(record.created, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


def _escaped(text: str) -> str:
    """Return a text on one line; what controls a terminal or turns its writing round is escaped."""
    if text.isprintable():
        return text
    return "".join(
        mark if unicodedata.category(mark) not in _UNPRINTED or mark == " " else mark.encode("unicode_escape").decode()
        for mark in text
    )


#: Categories of Unicode: control, format (bidirectional marks among them), surrogate, line and paragraph separators.
_UNPRINTED = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))


# the thread -----------------------------------------------------------------------------------------------------------


class _Feeder(QueueHandler):
    """Puts records into a queue that never has too many; those that are left out are counted, and said later."""

    def __init__(self, queue: SimpleQueue[Any]) -> None:
        super().__init__(queue)
        self._lines = queue
        self._dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Return the record as it is: the thread is one of this process, and makes the line."""
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        if self._lines.qsize() >= _MOST_LINES:
            self._dropped += 1
            return
        if self._dropped:
            note = logging.makeLogRecord(
                {
                    "name": __name__,
                    "levelno": logging.WARNING,
                    "levelname": "WARNING",
                    "msg": "%d lines of the log were dropped: its reader is too slow",
                    "args": (self._dropped,),
                    **fields("log_dropped", lines=self._dropped),
                }
            )
            self._dropped = 0
            self._lines.put_nowait(note)
        self._lines.put_nowait(record)


@contextmanager
def logging_to(style: LogStyle, stream: TextIO | None = None) -> Generator[None]:
    """Write what the program logs, in a style, while the block runs; all lines are written when it has ended.

    Args:
        style: How. Loggers other than narrowcast's are heard from WARNING on.
        stream: Where to; standard error if None.
    """
    target = logging.StreamHandler(sys.stderr if stream is None else stream)
    target.setFormatter(JsonLines() if style.json else TextLines())
    queue: SimpleQueue[Any] = SimpleQueue()
    feeder, listener = _Feeder(queue), QueueListener(queue, target)
    root, ours = logging.getLogger(), logging.getLogger("narrowcast")
    before = ours.level
    root.addHandler(feeder)
    ours.setLevel(style.level)
    logging.captureWarnings(capture=True)
    listener.start()
    try:
        yield
    finally:
        logging.captureWarnings(capture=False)
        root.removeHandler(feeder)
        ours.setLevel(before)
        listener.stop()
