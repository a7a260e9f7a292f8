"""One client's connection: requests are read, answered in their order, and bounded in size and time."""

from __future__ import annotations

import asyncio
import fcntl
import sys
import termios
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
#: A part of a body below this size is joined to the one before it: many small ones would take far more than their bytes.
_SMALL_PART = 1 << 10
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

    def __init__(self, request: Request, keep_alive: bool, response: Response | None = None) -> None:
        self.request = request
        self.keep_alive = keep_alive
        self.response = response
        self.future: asyncio.Future[Response] | None = None


class Connection(asyncio.Protocol):
    """One client's connection.

    A client that stops sending has gone away, as far as anybody can tell: what it asked for is cancelled. One that takes no
    answers, or has many due, is not read, and what was read of it already waits until that has changed.

    Attributes:
        deadline: Time of the loop at which :meth:`expire` is due, or None while the server owes an answer.
    """

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._limits = owner.limits
        self._most_header_bytes = owner.limits.header_bytes
        self._parser = httptools.HttpRequestParser(self)
        self._pending: deque[_Pending] = deque()
        self._waiting: deque[_Pending] = deque()  # what the handler has not seen yet
        self._reading = False  # between the first byte of a request and its last
        self._in_headers = True
        self._ended = False  # no request is read any more
        self._paused = False  # the client does not take what is written
        self._unsent = 0
        self._stopped = False  # the client is not read
        self._reset()
        self.deadline: float | None = None

    def _reset(self) -> None:
        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._header_bytes = 0
        self._watched: bool | None = None  # whether the deadline is that of headers, or of a body
        self._body: list[bytes | bytearray] = []
        self._body_bytes = 0
        self._body_seen = 0
        self._held = 0  # what came since the last byte of the body

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

    def eof_received(self) -> None:
        """Let the transport close; what is written already still goes out."""
        self._ended = True
        self._cancel_pending()

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
        self._waiting.clear()

    def pause_writing(self) -> None:
        self._paused = True
        self._unsent = self._not_taken()
        self.deadline = self._owner.loop.time() + self._limits.write_seconds
        self._steer()

    def _not_taken(self) -> int:
        """Return the bytes that the client has not taken: ours, and those that the kernel has for it."""
        kernels = fcntl.ioctl(self._transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return self._transport.get_write_buffer_size() + int.from_bytes(kernels, sys.byteorder)

    def resume_writing(self) -> None:
        self._paused = False
        self.deadline = None
        if self._ended and not self.busy:
            self.deadline = self._owner.loop.time() + _LINGER_SECONDS
        elif self._reading:
            self._bound_reading()
        self._go_on()

    # httptools --------------------------------------------------------------------------------------------------------

    def _watch(self, size: int) -> None:
        """Bound the time of a request that has not come whole, and what the parser may hold back of it."""
        if self._in_headers:
            self._header_bytes += size  # the parser keeps a header to itself until it is complete
            self._check_headers()
        elif self._body_seen == self._body_bytes:
            self._held += size  # what describes chunks, and trailers
            if self._held > self._most_header_bytes:
                raise Refusal(431, f"more than {self._most_header_bytes} bytes came without one of the body")
        else:
            self._body_seen, self._held = self._body_bytes, 0
        if self._watched is not self._in_headers and not self._paused:
            self._bound_reading()

    def _bound_reading(self) -> None:
        self._watched = self._in_headers
        seconds = self._limits.header_seconds if self._in_headers else self._limits.body_seconds
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
        if not self._in_headers:
            return  # a trailer: what was checked, and what others on the way checked, are the headers (RFC 9110, 6.5.1)
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
        parts = self._body
        if len(body) >= _SMALL_PART or not parts:
            parts.append(body)
        elif isinstance(parts[-1], bytearray):
            parts[-1] += body
        else:
            parts.append(bytearray(body))

    def on_message_complete(self) -> None:
        self._reading = False
        body = cast(bytes, self._body[0]) if len(self._body) == 1 else b"".join(self._body)
        request = Request(self._parser.get_method(), self._target, self._headers, body)
        keep_alive = self._keeps_alive()
        self._ended = not keep_alive
        self._reset()
        if self._blocked:
            self._waiting.append(_Pending(request, keep_alive))
            self._steer()
        else:
            self._answer(request, keep_alive)
            self._rest()

    def _keeps_alive(self) -> bool:
        """Whether another request may follow; clients of HTTP/1.0 would have to be told so in its words, and are not."""
        parser = self._parser
        if not parser.should_keep_alive() or parser.should_upgrade():
            return False
        return b"connection" not in self._headers or parser.get_http_version() != "1.0"

    # answers ----------------------------------------------------------------------------------------------------------

    @property
    def _blocked(self) -> bool:
        """Whether the next request has to wait before the handler sees it."""
        return self._paused or bool(self._waiting) or len(self._pending) >= self._limits.pipelined

    def _steer(self) -> None:
        """Read the client, or do not."""
        blocked = self._blocked
        if blocked is not self._stopped and not self._transport.is_closing():
            self._stopped = blocked
            (self._transport.pause_reading if blocked else self._transport.resume_reading)()

    def _answer(self, request: Request, keep_alive: bool) -> None:
        """Let the handler answer, and write the answer if it is there and its turn has come."""
        outcome = self._outcome(request)
        if isinstance(outcome, Response) and not self._pending:
            self._write(request, outcome, keep_alive)
            return
        pending = _Pending(request, keep_alive)
        if isinstance(outcome, Response):
            pending.response = outcome
        else:
            pending.future = outcome
            outcome.add_done_callback(lambda _: self._ready(pending))
        if not self._paused:
            self.deadline = None
        self._pending.append(pending)
        self._steer()

    def _go_on(self) -> None:
        """Write the answers whose turn has come, as far as the client takes them, and hand over what waited for that."""
        pending, waiting = self._pending, self._waiting
        while not self._paused:
            if pending and (response := pending[0].response) is not None:
                head = pending.popleft()
                self._write(head.request, response, head.keep_alive)
            elif waiting and len(pending) < self._limits.pipelined:
                following = waiting.popleft()
                if following.response is None:
                    self._answer(following.request, following.keep_alive)
                else:
                    pending.append(following)
            else:
                break
        self._steer()
        self._rest()

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
        self._go_on()

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
        if not self._reading and not self._ended and not self._paused and not self.busy:
            self.deadline = self._owner.loop.time() + self._limits.idle_seconds

    def _finish(self, refusal: Refusal) -> None:
        """Refuse what cannot be read any further; answers that are due still go first."""
        if self._ended:
            return
        refusal.close = True
        self._owner.refused(refusal)
        self._ended = True
        self._reading = False
        if not self._paused:
            self.deadline = None
        self._waiting.append(_Pending(Request(b"GET", b"", {}, b""), False, refused(refusal)))
        self._go_on()

    def _end(self) -> None:
        """Say that no more will be sent, and drop what still comes for a moment after the client has taken it."""
        self._ended = True
        self._cancel_pending()
        if not self._transport.is_closing():
            self._transport.write_eof()
            if not self._paused:
                self.deadline = self._owner.loop.time() + _LINGER_SECONDS

    # time -------------------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether an answer is due."""
        return bool(self._pending or self._waiting)

    def expire(self) -> None:
        """End a connection whose client took too long."""
        if self._paused and self._not_taken() < self._unsent:
            self.pause_writing()  # it takes its answer, slowly
        elif self._paused or self._transport.is_closing():
            self._transport.abort()
        elif self._reading:
            self._finish(Refusal(408, "the request took too long to arrive"))
        else:
            self._transport.close()  # what is written already may still be on its way
            self.deadline = self._owner.loop.time() + self._limits.write_seconds

    def abort(self) -> None:
        """Drop the connection as it is."""
        self._transport.abort()

    def retire(self) -> None:
        """Close the connection when nothing is due on it any more."""
        due = self._waiting or self._pending
        if due:
            due[-1].keep_alive = False
            self._ended = True
        elif self._reading:
            self._finish(Refusal(503, "the server is ending; send the request to another", retry_after=1))
        elif not self._ended:
            self._transport.close()
