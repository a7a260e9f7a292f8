"""Clients that read slowly or not at all, send in crumbs, or never come to an end."""

from __future__ import annotations

import asyncio
import socket
import tracemalloc
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import uvloop

from narrowcast.serving.http import connection
from narrowcast.serving.http.message import Request, Response
from narrowcast.serving.http.server import HttpServer
from narrowcast.serving.limits import Limits

LIMITS = Limits(header_bytes=1000, body_bytes=10_000_000, pipelined=4)
GET = b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
#: More than the buffers of both sockets hold.
LARGE = bytes(range(256)) * (1 << 16)
LOOPS = pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])

NewLoop = Callable[[], asyncio.AbstractEventLoop]


class Client:
    """A connection with a small buffer, read only when asked."""

    def __init__(self, port: int) -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        self.socket.setblocking(False)
        self.port = port

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def read(self, size: int = 1 << 16) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.socket, size)

    async def read_all(self) -> bytes:
        parts: list[bytes] = []
        while part := await self.read(1 << 20):
            parts.append(part)
        return b"".join(parts)


def run(
    talk: Callable[[Client, HttpServer], Awaitable[Any]],
    handler: Any,
    limits: Limits = LIMITS,
    new_loop: NewLoop = asyncio.new_event_loop,
) -> Any:
    """Start a server, talk to it over one connection, and return what the talk returned."""

    async def main() -> Any:
        server = HttpServer(handler, limits)
        client = Client(await server.listen("127.0.0.1", 0))
        await asyncio.get_running_loop().sock_connect(client.socket, ("127.0.0.1", client.port))
        try:
            return await asyncio.wait_for(talk(client, server), 20)
        finally:
            client.socket.close()
            await server.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(main())


def large(request: Request) -> Response:
    return Response(200, (LARGE,))


def echo(request: Request) -> Response:
    return Response(200, (repr(sorted(request.headers)).encode(), b" ", request.body))


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Wait for a condition, and return whether it came true."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not condition() and loop.time() < end:
        await asyncio.sleep(0.01)
    return condition()


@LOOPS
def test_a_client_that_reads_slowly_gets_its_whole_answer(new_loop: NewLoop) -> None:
    """The bound is on the time without a byte, and not on that of the answer."""

    async def talk(client: Client, server: HttpServer) -> int:
        await client.send(GET)
        size = 0
        for _ in range(12):
            await asyncio.sleep(0.1)
            size += len(await client.read(1 << 20))
            size += len(await client.read(1 << 20))
        while size < len(LARGE) and (part := await client.read(1 << 20)):
            size += len(part)
        return size

    assert run(talk, large, replace(LIMITS, write_seconds=0.5), new_loop) >= len(LARGE)


@LOOPS
def test_the_last_answer_of_a_connection_waits_for_its_reader(new_loop: NewLoop, monkeypatch: Any) -> None:
    """What is dropped for a moment after the last answer is what the client sends, and not what it has not read."""
    monkeypatch.setattr(connection, "_LINGER_SECONDS", 0.1)

    async def talk(client: Client, server: HttpServer) -> bytes:
        await client.send(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        await asyncio.sleep(1.0)
        return await client.read_all()

    assert run(talk, large, new_loop=new_loop).endswith(LARGE)


@LOOPS
@pytest.mark.parametrize("requests", [1, 2, 40])
def test_a_client_that_never_reads_is_given_up(new_loop: NewLoop, requests: int) -> None:
    async def talk(client: Client, server: HttpServer) -> bool:
        await client.send(GET * requests)
        assert await until(lambda: len(server._connections) == 1)
        return await until(lambda: not server._connections, 5)

    assert run(talk, large, replace(LIMITS, write_seconds=0.3), new_loop)


@LOOPS
def test_answers_are_not_made_for_a_client_that_does_not_take_them(new_loop: NewLoop) -> None:
    """However many requests come in one packet."""
    seen = 0

    def handler(request: Request) -> Response:
        nonlocal seen
        seen += 1
        return large(request)

    async def talk(client: Client, server: HttpServer) -> tuple[int, int]:
        await client.send(GET * 20)
        await asyncio.sleep(0.3)
        before, size = seen, 0
        while size < 20 * len(LARGE):
            size += len(await client.read(1 << 20))
        return before, seen

    before, after = run(talk, handler, new_loop=new_loop)
    assert before <= LIMITS.pipelined
    assert after == 20, "all are answered when they are read"


@LOOPS
def test_requests_of_one_packet_wait_for_those_before_them(new_loop: NewLoop) -> None:
    futures: list[asyncio.Future[Response]] = []

    def handler(request: Request) -> Any:
        futures.append(asyncio.get_running_loop().create_future())
        return futures[-1]

    async def talk(client: Client, server: HttpServer) -> list[int]:
        await client.send(GET * 10)
        found: list[int] = []
        while len(found) < 10:
            await until(lambda: len(futures) > len(found))
            await asyncio.sleep(0.02)
            found.append(len(futures) - len(found))
            futures[len(found) - 1].set_result(Response(200, (b"%d" % len(found),)))
            assert b"Content-Length" in await client.read()
        return found

    assert max(run(talk, handler, new_loop=new_loop)) == LIMITS.pipelined


def test_a_request_that_does_not_end_leaves_the_one_before_it_alone() -> None:
    """It is refused in its turn: after an answer that takes longer than its headers may."""

    async def late(request: Request) -> Response:
        await asyncio.sleep(1.2)
        return Response(200, (b"late",))

    async def talk(client: Client, server: HttpServer) -> bytes:
        await client.send(GET + GET[:20])
        return await client.read_all()

    said = run(talk, lambda request: asyncio.ensure_future(late(request)), replace(LIMITS, header_seconds=0.2))
    assert [part[:3] for part in said.split(b"HTTP/1.1 ")[1:]] == [b"200", b"408"]


def test_a_request_that_has_not_come_whole_is_told_of_the_end() -> None:
    async def talk(client: Client, server: HttpServer) -> bytes:
        await client.send(b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab")
        await until(lambda: bool(server._connections))
        await asyncio.sleep(0.1)
        closing = asyncio.ensure_future(server.close())
        said = await client.read_all()
        client.socket.close()
        await closing
        return said

    assert b" 503 " in run(talk, echo)


def test_empty_lines_do_not_keep_a_connection() -> None:
    async def talk(client: Client, server: HttpServer) -> bool:
        sent = 0
        while sent < 3 or (sent < 60 and server._connections):
            await client.send(b"\r\n")
            await asyncio.sleep(0.05)
            sent += 1
        return bool(server._connections)

    assert not run(talk, echo, replace(LIMITS, header_seconds=0.3, idle_seconds=0.3))


def test_trailers_are_no_headers() -> None:
    """Who stands before the server and checks headers lets trailers pass."""

    async def talk(client: Client, server: HttpServer) -> bytes:
        await client.send(CHUNKED + b"2\r\nab\r\n0\r\nAuthorization: Bearer x\r\nContent-Encoding: br\r\n\r\n")
        return await client.read()

    said = run(talk, echo)
    assert b" 200 " in said
    assert b"authorization" not in said
    assert said.endswith(b" ab")


@pytest.mark.parametrize("begin", [b"2\r\nab\r\n0\r\nA: ", b"2;a="], ids=["trailer", "chunk extension"])
def test_what_describes_a_body_is_bounded(begin: bytes) -> None:
    async def talk(client: Client, server: HttpServer) -> bytes:
        await client.send(CHUNKED + begin)
        for _ in range(20):
            await client.send(b"b" * 200)
            await asyncio.sleep(0.02)
        return await client.read()

    assert b" 431 " in run(talk, echo)


def test_a_body_in_crumbs_takes_little_more_than_its_bytes() -> None:
    size = 200_000

    async def talk(client: Client, server: HttpServer) -> tuple[int, bytes]:
        await client.send(CHUNKED)
        tracemalloc.start()
        try:
            for _ in range(size // 2000):
                await client.send(b"2\r\nab\r\n" * 1000)
            (held,) = server._connections
            await until(lambda: held._body_bytes == size)
            used = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        await client.send(b"0\r\n\r\n")
        await asyncio.sleep(0.1)
        said = await client.read(1 << 19)
        while len(said) < size:
            said += await client.read(1 << 19)
        return used, said

    used, said = run(talk, echo)
    assert used < 4 * size
    assert said.endswith(b"ab" * 1000)


@pytest.mark.parametrize(
    "request_",
    [b"GET /x HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n"],
    ids=["HTTP/1.0", "CONNECT"],
)
def test_a_connection_that_cannot_go_on_ends_with_its_answer(request_: bytes) -> None:
    async def talk(client: Client, server: HttpServer) -> bytes:
        await client.send(request_)
        return await client.read_all()

    said = run(talk, echo)
    assert said.count(b"HTTP/1.1 ") == 1
    assert b"Connection: close" in said
