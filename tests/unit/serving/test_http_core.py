"""The HTTP core, spoken to byte by byte."""

from __future__ import annotations

import asyncio
import gzip
import time
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowcast.serving.http.encoding import decompress
from narrowcast.serving.http.message import Request, Response, json_response
from narrowcast.serving.http.server import HttpServer
from narrowcast.serving.limits import Limits
from narrowcast.serving.refusals import Refusal

LIMITS = Limits(target_bytes=200, header_bytes=1000, body_bytes=10_000, decompressed_bytes=20_000)


def echo(request: Request) -> Response:
    return Response(200, (request.method, b" ", request.target, b" ", request.body))


def run(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[Any]],
    handler: Any = echo,
    limits: Limits = LIMITS,
) -> Any:
    """Start a server, talk to it over one connection, and return what the talk returned."""

    async def main() -> Any:
        server = HttpServer(handler, limits)
        port = await server.listen("127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            return await asyncio.wait_for(talk(reader, writer), 20)
        finally:
            writer.close()
            await server.close()

    return asyncio.run(main())


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Read one answer: status, headers and body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    lines = head.split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return int(lines[0].split()[1]), headers, body


def exchange(data: bytes, *, handler: Any = echo, limits: Limits = LIMITS) -> tuple[int, dict[str, str], bytes]:
    """Send bytes and return the first answer."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        writer.write(data)
        return await answer(reader)

    return run(talk, handler, limits)


def post(body: bytes, **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"POST /x HTTP/1.1\r\nHost: x\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body


def test_a_request_in_single_bytes() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        for byte in post(b"body"):
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        return await answer(reader)

    assert run(talk)[2] == b"POST /x body"


def test_a_chunked_body() -> None:
    data = b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nbo\r\n2;ext=1\r\ndy\r\n0\r\n\r\n"
    assert exchange(data)[2] == b"POST /x body"


def test_answers_to_pipelined_requests_keep_their_order() -> None:
    """The first answers last: later answers must wait for it."""
    first: list[asyncio.Future[Response]] = []

    def handler(request: Request) -> Any:
        if request.target == b"/0":
            first.append(asyncio.get_running_loop().create_future())
            return first[0]
        if request.target == b"/9":
            first[0].set_result(Response(200, (b"/0",)))
        return Response(200, (request.target,))

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        writer.write(b"".join(b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % number for number in range(10)))
        return [(await answer(reader))[2] for _ in range(10)]

    assert run(talk, handler) == [b"/%d" % number for number in range(10)]


def test_keep_alive_and_its_end() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        for _ in range(3):
            writer.write(post(b"again"))
            assert (await answer(reader))[0] == 200
        writer.write(post(b"last", Connection="close"))
        last = await answer(reader)
        assert last[1]["connection"] == "close"
        return await reader.read()

    assert run(talk) == b"", "the connection ends after the last answer"


def test_http_1_0_is_closed_unless_asked() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        writer.write(b"GET /x HTTP/1.0\r\n\r\n")
        return (await answer(reader))[2], await reader.read()

    assert run(talk) == (b"GET /x ", b"")


def test_head_has_the_length_and_no_body() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        writer.write(b"HEAD /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return await reader.read()

    head, _, body = run(talk).partition(b"\r\n\r\n")
    assert b"Content-Length: 8" in head
    assert body == b""


def test_a_client_that_asks_first_is_told_to_go_on() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        writer.write(b"POST /x HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"body")
        return await answer(reader)

    assert run(talk)[2] == b"POST /x body"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GET /x HTTP/9.9\r\n\r\n", 400),
        (b"GET /x HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n", 400),
        (b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
        (b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\n", 400),
        (b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 10001\r\n\r\n", 413),
        (b"GET /" + b"x" * 300 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET /x HTTP/1.1\r\n" + b"A: b\r\n" * 30 + b"\r\n", 431),
        (b"GET /x HTTP/1.1\r\nA: " + b"b" * 2000 + b"\r\n\r\n", 431),
        (b"GET /x HTTP/1.1\r\nA: " + b"b" * 2000, 431),
        (b"POST /x HTTP/1.1\r\nHost: x\r\nExpect: magic\r\nContent-Length: 1\r\n\r\n", 417),
        (post(b"body", Content_Encoding="br"), 415),
        (post(b"body", Content_Encoding="gzip"), 400),
        (post(gzip.compress(b"x", mtime=0)[:-3], Content_Encoding="gzip"), 400),
        (post(gzip.compress(b"x", mtime=0) + b"y", Content_Encoding="gzip"), 400),
        (post(gzip.compress(b"x", mtime=0), Content_Encoding="gzip, gzip"), 415),
        (post(gzip.compress(bytes(1_000_000), mtime=0), Content_Encoding="gzip"), 413),
        (post(zlib.compress(bytes(1_000_000)), Content_Encoding="deflate"), 413),
    ],
    ids=lambda value: value[:40].decode("latin-1").split("\r")[0] if isinstance(value, bytes) else str(value),
)
def test_what_cannot_be_read_is_refused(data: bytes, status: int) -> None:
    found, headers, body = exchange(data)
    assert found == status
    assert headers["content-type"] == "application/json"
    assert body.startswith(b'{"error":')


def test_a_body_longer_than_its_length_says_is_no_part_of_the_request() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        writer.write(b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody and more of it\r\n\r\n")
        return await answer(reader), await answer(reader), await reader.read()

    first, second, rest = run(talk)
    assert (first[0], first[2]) == (200, b"POST /x body")
    assert (second[0], rest) == (400, b""), "what follows is no request, and the connection ends"


def test_a_chunked_body_over_the_bound_is_refused_before_its_end() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        writer.write(b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(11):
            writer.write(b"3e8\r\n" + bytes(1000) + b"\r\n")
        return await answer(reader)

    assert run(talk)[0] == 413


def test_an_upgrade_is_answered_as_if_it_had_not_been_asked_for() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        writer.write(b"GET /x HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
        return await answer(reader), await reader.read()

    (status, headers, body), rest = run(talk)
    assert (status, headers["connection"], body, rest) == (200, "close", b"GET /x ", b"")


def test_a_refused_request_ends_the_connection_and_is_answered_once() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        writer.write(b"nonsense\r\n\r\n" + post(b"never read"))
        return await reader.read()

    assert run(talk).count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_bodies_are_decompressed_and_answers_compressed(encoding: str) -> None:
    text = b"abc" * 1000
    packed = {"gzip": gzip.compress(text), "deflate": zlib.compress(text)}[encoding]
    status, headers, body = exchange(post(packed, Content_Encoding=encoding, Accept_Encoding=encoding))
    assert (status, headers["content-encoding"]) == (200, encoding)
    assert {"gzip": gzip.decompress, "deflate": zlib.decompress}[encoding](body) == b"POST /x " + text


def test_bare_deflate_is_understood() -> None:
    stream = zlib.compressobj(wbits=-15)
    assert decompress(b"deflate", stream.compress(b"text") + stream.flush(), 100) == b"text"


@pytest.mark.parametrize("accepted", ["br", "gzip;q=0", "identity", ""])
def test_answers_are_not_compressed_unasked(accepted: str) -> None:
    assert "content-encoding" not in exchange(post(b"body", Accept_Encoding=accepted))[1]


def test_an_error_in_a_handler_is_answered_500_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    def handler(request: Request) -> Response:
        raise ValueError("secret")

    status, _, body = exchange(post(b""), handler=handler)
    assert status == 500
    assert b"secret" not in body
    assert "a request failed" in caplog.text


def test_a_refusal_says_when_to_come_again() -> None:
    def handler(request: Request) -> Response:
        raise Refusal(429, "too many", retry_after=2.4)

    status, headers, _ = exchange(post(b""), handler=handler)
    assert (status, headers["retry-after"]) == (429, "3"), "whole seconds, and not too early"


def test_a_large_answer_arrives_whole() -> None:
    large = memoryview(bytes(range(256)) * 40_000)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        writer.write(post(b""))
        return (await answer(reader))[2]

    assert run(talk, lambda request: Response(200, (b"head", large))) == b"head" + large


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", b""),
        (b"GET /x HTTP/1.1\r\nHost:", b"408"),
        (b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab", b"408"),
    ],
    ids=["nothing", "half a header", "half a body"],
)
def test_slow_clients_are_given_up(sent: bytes, status: bytes) -> None:
    limits = replace(LIMITS, header_seconds=0.2, body_seconds=0.2, idle_seconds=0.2)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        writer.write(sent)
        return await reader.read()

    assert run(talk, limits=limits)[9:12] == status


def test_a_trickle_of_bytes_does_not_keep_a_request_alive() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        writer.write(b"GET /x HTTP/1.1\r\n")
        while not reader.at_eof():
            writer.write(b"A: b\r\n")
            await asyncio.sleep(0.05)
            if writer.transport.is_closing() or reader._buffer:  # type: ignore[attr-defined]
                break
        return await reader.read()

    assert b" 408 " in run(talk, limits=replace(LIMITS, header_seconds=0.3, header_bytes=10**6))


def test_a_client_that_goes_away_cancels_what_it_asked() -> None:
    futures: list[asyncio.Future[Response]] = []

    def handler(request: Request) -> Any:
        futures.append(asyncio.get_running_loop().create_future())
        return futures[-1]

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        writer.write(post(b"") + post(b""))
        while len(futures) < 2:
            await asyncio.sleep(0.01)
        writer.transport.abort()
        end = time.monotonic() + 10
        while not all(future.cancelled() for future in futures) and time.monotonic() < end:
            await asyncio.sleep(0.01)
        return [future.cancelled() for future in futures]

    assert run(talk, handler) == [True, True]


def test_one_connection_too_many_is_told_so() -> None:
    async def main() -> Any:
        server = HttpServer(echo, replace(LIMITS, connections=1))
        port = await server.listen("127.0.0.1", 0)
        _, first = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.sleep(0.05)
        reader, second = await asyncio.open_connection("127.0.0.1", port)
        found = await answer(reader)
        first.close()
        second.close()
        await server.close()
        return found

    assert asyncio.run(main())[0] == 503


def test_pipelining_without_end_is_bounded() -> None:
    """A client that sends and never reads is not read without end either."""
    seen = 0

    def handler(request: Request) -> Any:
        nonlocal seen
        seen += 1
        return asyncio.get_running_loop().create_future()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        for _ in range(200):
            writer.write(post(bytes(5000)))
            await asyncio.sleep(0)
        await asyncio.sleep(0.2)
        return seen

    limits = replace(LIMITS, pipelined=4)
    assert 4 <= run(talk, handler, limits) < 200


def test_json_answers() -> None:
    assert exchange(post(b""), handler=lambda request: json_response({"a": 1}))[2] == b'{"a":1}'


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6),
    st.integers(1, 400),
    st.integers(1, 4),
)
def test_any_bytes_are_answered_or_refused(changes: list[tuple[int, int]], step: int, count: int) -> None:
    """Requests with some bytes changed, in pieces: the answers are whole, and none is a mistake of the server."""
    stream = bytearray(post(b"some body", Accept_Encoding="gzip") * count)
    for place, value in changes:
        stream[place % len(stream)] = value
    stream += b"\r\n\r\n"

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        for at in range(0, len(stream), step):
            writer.write(bytes(stream[at : at + step]))
        return await reader.read()

    limits = replace(LIMITS, header_seconds=0.05, body_seconds=0.05, idle_seconds=0.05)
    said = run(talk, limits=limits)
    while said:
        head, _, said = said.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        assert lines[0].split(b" ")[0] == b"HTTP/1.1"
        assert not lines[0].startswith(b"HTTP/1.1 5"), head
        if lines[0].startswith(b"HTTP/1.1 100"):
            continue
        length = next(int(line.partition(b":")[2]) for line in lines if line.lower().startswith(b"content-length"))
        assert len(said) >= length
        said = said[length:]
