"""A request as it was read, and an answer as it will be written."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING

import orjson

from narrowcast.serving.refusals import Refusal

if TYPE_CHECKING:
    from narrowcast.serving.watching.records import RequestRecord

__all__ = ["JSON", "Body", "Request", "Response", "json_response", "refused"]

Body = bytes | bytearray | memoryview
JSON = b"application/json"


class Request:
    """One request.

    Attributes:
        method: For example ``b"POST"``.
        target: Path and query as they were sent.
        headers: Values by lower-case name; a header that came twice has its values joined by commas.
        body: The body, decompressed.
        record: What is remembered of it, where somebody watches.
    """

    __slots__ = ("body", "headers", "method", "record", "target")

    def __init__(self, method: bytes, target: bytes, headers: dict[bytes, bytes], body: bytes) -> None:
        self.method = method
        self.target = target
        self.headers = headers
        self.body = body
        self.record: RequestRecord | None = None


@dataclass(slots=True)
class Response:
    """One answer.

    Attributes:
        status: HTTP status.
        body: Parts of the body, written one after the other without joining large ones; views are views of bytes.
        content_type: Its media type.
        headers: More headers, names and values.
        close: Whether the connection ends with this answer.
    """

    status: int = 200
    body: Sequence[Body] = ()
    content_type: bytes = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()
    close: bool = False

    def head(self, *, keep_alive: bool) -> tuple[bytes, int]:
        """Return status line and headers as they go to the socket, and the number of bytes of the body."""
        size = sum(map(len, self.body))
        head = b"%b%d\r\n" % (_heads.start(self.status, self.content_type), size)
        for name, value in self.headers:
            head += b"%b: %b\r\n" % (name, value)
        return head + (b"\r\n" if keep_alive else b"Connection: close\r\n\r\n"), size


def json_response(document: object, status: int = 200) -> Response:
    """Return an answer that holds a JSON document."""
    return Response(status, (orjson.dumps(document),))


def refused(refusal: Refusal) -> Response:
    """Return the answer to a refused request."""
    response = json_response({"error": refusal.message}, refusal.status)
    if refusal.retry_after is not None:
        response.headers = ((b"Retry-After", b"%d" % max(1, math.ceil(refusal.retry_after))),)
    response.close = refusal.close
    return response


_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


@dataclass
class _Heads:
    """What answers of a kind begin with, up to the length of the body; the Date header is formatted once a second."""

    second: int = -1
    known: dict[tuple[int, bytes], bytes] = field(default_factory=dict[tuple[int, bytes], bytes])

    def start(self, status: int, content_type: bytes) -> bytes:
        second = int(time.time())
        if second != self.second:
            self.second = second
            self.known.clear()
        start = self.known.get((status, content_type))
        if start is None:
            date = formatdate(second, usegmt=True).encode()
            start = b"%bDate: %b\r\nContent-Type: %b\r\nContent-Length: " % (_STATUS_LINES[status], date, content_type)
            self.known[status, content_type] = start
        return start


_heads = _Heads()
