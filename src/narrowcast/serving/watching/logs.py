"""The log: events, and a line for each request, as text or as JSON.

It is the standard library's logging. Lines are written by a thread of its own, some times a second: a reader of the log
that stands still costs lines, which are counted, and never time or memory of the server.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import unicodedata
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

import orjson

from narrowcast.errors import ConfigError, choices
from narrowcast.serving.watching.events import fields
from narrowcast.serving.watching.records import RequestRecord

__all__ = ["LOG_STYLES", "JsonLines", "LogStyle", "RequestLog", "TextLines", "logging_to", "read_log_style"]

_requests = logging.getLogger("narrowcast.serving.requests")

#: Lines that may wait for the thread that writes them.
_MOST_LINES = 10_000
#: How often they are written.
_PERIOD_SECONDS = 0.05
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
            line = logging.LogRecord(_requests.name, level, "", 0, "", None, None)  # who logs it need not be found out
            line.__dict__ |= fields("request", **_values(record))
            _requests.handle(line)


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
        quick = orjson.dumps(line).decode()
        # What is not ASCII could turn writing round or control a terminal; the quick way would leave it as it is.
        if quick.isascii() and "\x7f" not in quick:
            return quick
        return json.dumps(line, separators=(",", ":")).replace("\x7f", "\\u007f")


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


class _Waiting(logging.Handler):
    """Makes lines, keeps them until somebody takes them, and counts those that are too many."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[str] = deque()
        self._dropped = 0

    def createLock(self) -> None:  # noqa: N802  the standard library's name
        """Do without a lock: to append to a deque is atomic."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._lines) >= _MOST_LINES:
            self._dropped += 1
            return
        if self._dropped:
            self._lines.append(self.format(_dropped(self._dropped)))
            self._dropped = 0
        self._lines.append(self.format(record))

    def take(self) -> Iterator[str]:
        """Yield the lines that wait, the oldest first, and forget them."""
        while self._lines:
            yield self._lines.popleft() + "\n"


def _dropped(lines: int) -> logging.LogRecord:
    words, said = "%d lines of the log were dropped: its reader is too slow", fields("log_dropped", lines=lines)
    level = logging.WARNING
    known = {
        "name": __name__,
        "levelno": level,
        "levelname": logging.getLevelName(level),
        "msg": words,
        "args": (lines,),
    }
    return logging.makeLogRecord(known | said)


class _Writer(threading.Thread):
    """Writes the lines that wait, all of them at once, some times a second.

    To be woken for each line would cost the server more than the line itself: two threads that take turns at the
    interpreter.
    """

    def __init__(self, waiting: _Waiting, stream: TextIO) -> None:
        super().__init__(name="narrowcast-log", daemon=True)
        self._waiting = waiting
        self._stream = stream
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(_PERIOD_SECONDS):
            self._write()
        self._write()

    def _write(self) -> None:
        text = "".join(self._waiting.take())
        if text:
            # Whoever read the log has gone: there is nobody to tell, and the server goes on.
            with suppress(OSError, ValueError):
                self._stream.write(text)
                self._stream.flush()

    def end(self) -> None:
        """Write what still waits, and end."""
        self._ended.set()
        self.join()


@contextmanager
def logging_to(style: LogStyle, stream: TextIO | None = None) -> Generator[None]:
    """Write what the program logs, in a style, while the block runs; all lines are written when it has ended.

    Args:
        style: How. Loggers other than narrowcast's are heard from WARNING on.
        stream: Where to; standard error if None.
    """
    waiting = _Waiting()
    waiting.setFormatter(JsonLines() if style.json else TextLines())
    writer = _Writer(waiting, sys.stderr if stream is None else stream)
    root, ours = logging.getLogger(), logging.getLogger("narrowcast")
    before = ours.level
    root.addHandler(waiting)
    ours.setLevel(style.level)
    logging.captureWarnings(capture=True)
    writer.start()
    try:
        yield
    finally:
        logging.captureWarnings(capture=False)
        root.removeHandler(waiting)
        ours.setLevel(before)
        writer.end()
