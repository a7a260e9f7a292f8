"""What is remembered of one request while it is answered, and who is told when it has ended.

Nothing of this exists unless somebody watches: a handler is wrapped by :class:`Watched` only then, and what answers
requests merely notes which job is theirs.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Sequence
from typing import Protocol

from narrowcast.serving.catalogue import ServedVersion
from narrowcast.serving.http.connection import Handler
from narrowcast.serving.http.message import Request, Response, refused
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.scheduling.queue import Job

__all__ = ["CLIENT_CLOSED", "Observer", "RequestRecord", "Watched"]

#: An identifier that can be written into a header and a line of a log as it is.
_ID = re.compile(r"[!-~]{1,128}")
#: A trace's context, version 00 (W3C Trace Context, 3.2.2); other versions begin alike.
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")
_HEADERS = tuple((name, name.encode()) for name in ("x-request-id", "traceparent", "tracestate"))
_MOST_TARGET = 256
#: What a status means that the protocol does not name: the client went away before its answer.
CLIENT_CLOSED = 499


class RequestRecord:
    """One request.

    Attributes:
        protocol: ``http`` or ``grpc``.
        method: HTTP method, or the name of the call; empty where the request could not be read.
        target: HTTP target, or the full name of the call.
        request_id: What the request is called in logs: what the client calls it if that can be printed, or a new name.
        trace_id: The trace that it belongs to, 32 hexadecimal digits, or empty.
        context: Headers that carry the trace's context, by lower-case name.
        model: Name of the model that was asked, empty until it is known.
        version: Its version.
        rows: Rows of the batch axis.
        begun: When it was read, in nanoseconds of the monotonic clock.
        ended: When its answer was there, on the same clock.
        status: HTTP status of the answer; calls of gRPC have the one that their status stands for.
        reason: Why it got no result.
        job: Its way through the scheduler, if it came so far.
    """

    __slots__ = (
        *("begun", "context", "ended", "job", "method", "model", "protocol", "reason", "request_id", "rows"),
        *("status", "target", "trace_id", "version"),
    )

    def __init__(self, protocol: str, method: str, target: str, headers: dict[str, str]) -> None:
        self.begun = time.monotonic_ns()
        self.ended = 0
        self.protocol = protocol
        self.method = method
        self.target = target[:_MOST_TARGET]
        self.context = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        found = _TRACEPARENT.fullmatch(self.context.get("traceparent", ""))
        self.trace_id = found[1] if found else ""
        self.request_id = _identifier(headers.get("x-request-id", ""))
        self.model = self.version = self.reason = ""
        self.rows = self.status = 0
        self.job: Job | None = None

    def found(self, served: ServedVersion) -> None:
        """Note which model was asked."""
        self.model, self.version = served.name, served.version

    def read(self, client_id: str, rows: int) -> None:
        """Note what the client calls the request, and its size."""
        self.rows = rows
        self.request_id = self.request_id or _identifier(client_id)

    def end(self, status: int, reason: str = "") -> None:
        """Note how the request ended."""
        self.ended = time.monotonic_ns()
        self.status, self.reason = status, reason
        self.request_id = self.request_id or self.trace_id or f"{random.getrandbits(64):016x}"

    @property
    def routine(self) -> bool:
        """Whether nobody would miss it in a log: it only read something, and got it, as probes do every second."""
        return self.status < 400 and self.method in ("GET", "HEAD")

    @property
    def total_ns(self) -> int:
        """From the request's last byte to its answer."""
        return self.ended - self.begun

    @property
    def queue_ns(self) -> int:
        """Time in the queue; all of it where the request never ran."""
        job = self.job
        return 0 if job is None else (job.begun or job.ended or self.ended) - job.arrived

    @property
    def compute_ns(self) -> int:
        """From the start to the end of the batch that it was part of."""
        job = self.job
        return (job.ended or self.ended) - job.begun if job is not None and job.begun else 0


class Observer(Protocol):
    """Who is told of requests that have ended; in the event loop, so it must be quick."""

    def ended(self, record: RequestRecord) -> None: ...


def _identifier(text: str) -> str:
    return text if _ID.fullmatch(text) else ""


class Watched:
    """A handler that tells observers how each request ended, and answers with its name in ``X-Request-Id``.

    Args:
        handler: Answers the requests.
        observers: Are told, in this order.
    """

    def __init__(self, handler: Handler, observers: Sequence[Observer]) -> None:
        self._handler = handler
        self._observers = observers

    def __call__(self, request: Request) -> Response | asyncio.Future[Response]:
        """Answer a request; what is refused is answered too, and not raised."""
        headers = {name: value.decode("latin-1") for name, key in _HEADERS if (value := request.headers.get(key))}
        target = request.target[:_MOST_TARGET].decode("latin-1")
        record = request.record = RequestRecord("http", request.method.decode(), target, headers)
        try:
            outcome = self._handler(request)
        except Exception as error:
            return self._failed(record, error)
        return self._finish(record, outcome) if isinstance(outcome, Response) else self._later(record, outcome)

    def refused(self, refusal: Refusal) -> None:
        """Tell of a request that could not be read as far as the handler; of what it was nothing is known."""
        self._finish(RequestRecord("http", "", "", {}), Response(refusal.status), refusal.message)

    def _finish(self, record: RequestRecord, response: Response, reason: str = "") -> Response:
        record.end(response.status, reason)
        for observer in self._observers:
            observer.ended(record)
        response.headers = (*response.headers, (b"X-Request-Id", record.request_id.encode()))
        return response

    def _failed(self, record: RequestRecord, error: BaseException) -> Response:
        """Return the answer to a request that failed.

        Raises:
            BaseException: The error itself where nobody meant it: who reads the requests knows what to do then.
        """
        if isinstance(error, Refusal):
            return self._finish(record, refused(error), error.message)
        self._finish(record, Response(500), f"{type(error).__name__}: {error}")
        raise error

    def _later(self, record: RequestRecord, inner: asyncio.Future[Response]) -> asyncio.Future[Response]:
        """Return the future of the answer that clients get; who cancels it cancels the request."""
        outer: asyncio.Future[Response] = inner.get_loop().create_future()

        def settle(inner: asyncio.Future[Response]) -> None:
            if inner.cancelled():
                self._finish(record, Response(CLIENT_CLOSED), "the client went away")
                outer.cancel()
                return
            error = inner.exception()
            try:
                response = self._finish(record, inner.result()) if error is None else self._failed(record, error)
            except Exception as unmeant:
                outer.set_exception(unmeant)
            else:
                outer.set_result(response)

        inner.add_done_callback(settle)
        outer.add_done_callback(lambda outer: inner.cancel() if outer.cancelled() else None)
        return outer
