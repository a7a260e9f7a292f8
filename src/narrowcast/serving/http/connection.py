"""One client's connection: requests are read, answered in their order, and bounded in size and time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol, cast

import httptools

from narrowcast.serving.http.encoding import compress, decompress
from narrowcast.serving.http.message import Request, Response, refused
from narrowcast.serving.limits import HEADER_OVERHEAD, Limits
from narrowcast.serving.refusals import Refusal

__all__ = ["Connection", "Handler", "Owner"]

#: Answers at once, or promises to.
Handler = Callable[[Request], "Response | asyncio.Future[Response]"]

#: An answer in parts below this size is joined, so that it goes out in one packet.
_JOIN_BELOW = 16 << 10
#: How long what a client still sends after a final answer is read and dropped: closing at once would reset the
#: connection, and the client might never see the answer.
_LINGER_SECONDS = 2.0


class Owner(Protocol):
    """Who keeps the connections."""

    limits: Limits
    handler: Handler
    loop: asyncio.AbstractEventLoop

    def opened(self, connection: Connection) -> bool:
        """Take note of a new connection; return whether it may stay."""
        ...

    def closed(self, connection: Connection) -> None:
        """Take note of the end of a connection."""
        ...

    def refused(self, refusal: Refusal) -> None:
        """Take note of a request that could not be read as far as the handler."""
        ...

    def failed(self, error: BaseException) -> None:
        """Take note of an error that nobody meant."""
        ...


class _Pending:
    """A request whose answer is due: at the head of the queue it is written as soon as it is there."""

    __slots__ = ("future", "keep_alive", "request", "response")

    def __init__(self, request: Request, keep_alive: bool, outcome: Response | asyncio.Future[Response]) -> None:
        self.request = request
        self.keep_alive = keep_alive
        self.response = outcome if isinstance(outcome, Response) else None
        self.future = None if isinstance(outcome, Response) else outcome


class Connection(asyncio.Protocol):
    """One client's connection.

    A client that stops sending has gone away, as far as anybody can tell: what it asked for is cancelled.

    Attributes:
        deadline: Time of the loop at which :meth:`expire` is due, or None while the server owes an answer.
    """

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._limits = owner.limits
        self._most_header_bytes = owner.limits.header_bytes
        self._parser = httptools.HttpRequestParser(self)
        self._pending: deque[_Pending] = deque()
        self._reading = False  # between the first byte of a request and its last
        self._in_headers = True
        self._ended = False  # no request is read any more
        self._paused = False
        self._reset()
        self.deadline: float | None = None

    def _reset(self) -> None:
        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._header_bytes = 0
        self._watched: bool | None = None  # whether the deadline is that of headers, or of a body
        self._body: list[bytes] = []
        self._body_bytes = 0

    # asyncio ----------------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.deadline = self._owner.loop.time() + self._limits.header_seconds
        if not self._owner.opened(self):
            self._finish(Refusal(503, "the server has as many connections as it allows", retry_after=1))

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        try:
            self._parser.feed_data(data)
            if self._reading:
                self._watch(len(data))
            elif not self._pending:
                self._rest()
        except httptools.HttpParserUpgrade:
            self._ended = True  # answered already, as if it had not been asked for, and the last answer
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__ or error.__cause__
            if not isinstance(cause, Refusal):
                self._owner.failed(cause or error)
                cause = Refusal(500, "the request could not be read")
            self._finish(cause)
        except httptools.HttpParserError as error:
            self._finish(Refusal(400, f"not an HTTP request: {error}"))
        except Refusal as refusal:
            self._finish(refusal)

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self.deadline = None
        self._cancel_pending()
        self._owner.closed(self)

    def _cancel_pending(self) -> None:
        """Cancel what nobody will be told any more."""
        for pending in self._pending:
            if pending.future is not None:
                pending.future.cancel()
        self._pending.clear()

    def pause_writing(self) -> None:
        self._paused = True
        self._transport.pause_reading()
        self.deadline = self._owner.loop.time() + self._limits.write_seconds

    def resume_writing(self) -> None:
        self._paused = False
        self._transport.resume_reading()
        self._rest()

    # httptools --------------------------------------------------------------------------------------------------------

    def _watch(self, size: int) -> None:
        """Bound the time of a request that has not come whole, and what its headers may still hold back."""
        limits = self._limits
        if self._in_headers:
            self._header_bytes += size  # the parser keeps a header to itself until it is complete
            self._check_headers()
        if self._watched is not self._in_headers:
            self._watched = self._in_headers
            seconds = limits.header_seconds if self._in_headers else limits.body_seconds
            self.deadline = self._owner.loop.time() + seconds

    def on_message_begin(self) -> None:
        if self._ended:
            raise Refusal(400, "a request follows the last one of its connection")
        self._reading = self._in_headers = True

    def on_url(self, url: bytes) -> None:
        self._target += url
        if len(self._target) > self._limits.target_bytes:
            raise Refusal(414, f"the request target is longer than {self._limits.target_bytes} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        self._header_bytes += len(name) + len(value) + HEADER_OVERHEAD
        if self._header_bytes > self._most_header_bytes:
            self._check_headers()
        headers = self._headers
        headers[name] = value if name not in headers else headers[name] + b"," + value

    def _check_headers(self) -> None:
        if self._header_bytes > self._most_header_bytes:
            raise Refusal(431, f"the headers take more than {self._limits.header_bytes} bytes")

    def on_headers_complete(self) -> None:
        self._in_headers = False
        length = self._headers.get(b"content-length")
        if length is not None and int(length) > self._limits.body_bytes:
            raise Refusal(413, f"the body is larger than {self._limits.body_bytes} bytes")
        if b"expect" in self._headers and not self._pending:
            if self._headers[b"expect"].lower() != b"100-continue":
                raise Refusal(417, "the only expectation known is 100-continue")
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.body_bytes:
            raise Refusal(413, f"the body is larger than {self._limits.body_bytes} bytes")
        self._body.append(body)

    def on_message_complete(self) -> None:
        self._reading = False
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        request = Request(self._parser.get_method(), self._target, self._headers, body)
        keep_alive = self._parser.should_keep_alive() and b"upgrade" not in self._headers
        self._ended = not keep_alive
        self._reset()
        outcome = self._outcome(request)
        if isinstance(outcome, Response) and not self._pending:
            self._write(request, outcome, keep_alive)
        else:
            self._await(_Pending(request, keep_alive, outcome))

    # answers ----------------------------------------------------------------------------------------------------------

    def _outcome(self, request: Request) -> Response | asyncio.Future[Response]:
        """Return what the handler says; whatever goes wrong is an answer too."""
        try:
            if b"content-encoding" in request.headers:
                encoding = request.headers[b"content-encoding"]
                request.body = decompress(encoding, request.body, self._limits.decompressed_bytes)
            return self._owner.handler(request)
        except Refusal as refusal:
            self._owner.refused(refusal)
            return refused(refusal)
        except Exception as error:
            return self._unmeant(error)

    def _await(self, pending: _Pending) -> None:
        """Put an answer that is not there yet, or has others before it, into its turn."""
        if pending.future is not None:
            pending.future.add_done_callback(lambda _: self._ready(pending))
        self.deadline = None
        self._pending.append(pending)
        if len(self._pending) >= self._limits.pipelined:
            self._transport.pause_reading()

    def _unmeant(self, error: BaseException) -> Response:
        self._owner.failed(error)
        return refused(Refusal(500, "the server made a mistake; its log says more"))

    def _ready(self, pending: _Pending) -> None:
        """Take the answer of a future, and write all answers whose turn has come."""
        assert pending.future is not None
        if self._transport.is_closing() or pending not in self._pending:
            return
        if pending.future.cancelled():
            pending.response = refused(Refusal(503, "the request was cancelled"))
        elif (error := pending.future.exception()) is None:
            pending.response = pending.future.result()
        else:
            pending.response = refused(error) if isinstance(error, Refusal) else self._unmeant(error)
        full = len(self._pending) >= self._limits.pipelined
        while self._pending and (response := self._pending[0].response) is not None:
            head = self._pending.popleft()
            self._write(head.request, response, head.keep_alive)
        if full and not self._paused and not self._transport.is_closing():
            self._transport.resume_reading()
        self._rest()

    def _write(self, request: Request, response: Response, keep_alive: bool) -> None:
        if b"accept-encoding" in request.headers:
            response = compress(request, response)
        keep_alive = keep_alive and not response.close
        head, size = response.head(keep_alive=keep_alive)
        if request.method == b"HEAD":
            self._transport.write(head)
        elif size < _JOIN_BELOW:
            self._transport.write(b"".join((head, *response.body)))
        else:
            self._transport.writelines((head, *response.body))
        if not keep_alive:
            self._end()

    def _rest(self) -> None:
        """Wait for the next request, unless one is being read or an answer is due."""
        if not self._pending and not self._reading and not self._ended and not self._paused:
            self.deadline = self._owner.loop.time() + self._limits.idle_seconds

    def _finish(self, refusal: Refusal) -> None:
        """Refuse what cannot be read any further; answers that are due still go first."""
        if self._ended:
            return
        refusal.close = True
        self._owner.refused(refusal)
        self._ended = True
        self._reading = False
        request, response = Request(b"GET", b"", {}, b""), refused(refusal)
        if self._pending:
            self._pending.append(_Pending(request, False, response))
        else:
            self._write(request, response, False)

    def _end(self) -> None:
        """Say that no more will be sent, and drop what still comes for a moment."""
        self._ended = True
        self._cancel_pending()
        if not self._transport.is_closing():
            self._transport.write_eof()
            self.deadline = self._owner.loop.time() + _LINGER_SECONDS

    # time -------------------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether an answer is due."""
        return bool(self._pending)

    def expire(self) -> None:
        """End a connection whose client took too long."""
        if self._ended or self._paused:
            self._transport.abort()
        elif self._reading:
            self._finish(Refusal(408, "the request took too long to arrive"))
        else:
            self._transport.close()

    def abort(self) -> None:
        """Drop the connection as it is."""
        self._transport.abort()

    def retire(self) -> None:
        """Close the connection when nothing is due on it any more."""
        if self._pending:
            self._pending[-1].keep_alive = False
            self._ended = True
        elif not self._ended:
            self._transport.close()
