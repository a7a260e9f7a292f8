"""Closed loops for `serving.py`: each connection sends its next request when the answer is there."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Check = Callable[[bytes], None]


@dataclass(frozen=True)
class Rate:
    """What a closed loop saw.

    Attributes:
        rate: Answers per second.
        p50_us: Median time from request to answer, in microseconds.
        cpu_us: Time that the server's processes computed per answer, in microseconds, the kernel's part included.
    """

    rate: float
    p50_us: float
    cpu_us: float


class _Loop(asyncio.Protocol):
    """One connection. The first answer is checked whole; the others must be as long."""

    def __init__(self, request: bytes, check: Check) -> None:
        self.request = request
        self.check = check
        self.times: list[float] = []
        self.length = 0
        self.parts: list[bytes] = []
        self.received = 0
        self.failure: Exception | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.send()

    def send(self) -> None:
        self.sent = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.parts.append(data)
        self.received += len(data)
        if not self.length:
            self.find_length()
        if not self.length or self.received < self.length:
            return
        self.times.append(time.perf_counter() - self.sent)
        try:
            if len(self.times) == 1:
                self.check(b"".join(self.parts))
            assert self.received == self.length, "an answer is longer than the first"
        except Exception as error:
            self.failure = error
            return
        self.parts, self.received = [], 0
        self.send()

    def find_length(self) -> None:
        head, separator, _ = b"".join(self.parts).partition(b"\r\n\r\n")
        if separator:
            lines = (line.lower() for line in head.split(b"\r\n"))
            size = next(line for line in lines if line.startswith(b"content-length:"))
            self.length = len(head) + 4 + int(size.partition(b":")[2])


class _Calls(asyncio.Protocol):
    """A connection of HTTP/2 with calls of gRPC on it, which are the same frames each time, so that the client adds little.

    The first call goes alone, and its answer is checked whole; the others must be as long, which an error never is: it has
    no message. The server is told to keep no table of header fields, so that no block of them depends on those before it.

    Source: RFC 9113, sections 3.4, 4.1 and 6; RFC 7541, section 6.2.2; "gRPC over HTTP2".
    """

    _DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
    _END_STREAM = _ACK = 1
    _END_HEADERS = 4
    _WINDOW = 2**31 - 1
    _FIRST_WINDOW = 65_535  # what either side may send before it is told more

    def __init__(self, path: str, message: bytes, check: Check, calls: int) -> None:
        fields = {":path": path, ":authority": "localhost", "content-type": "application/grpc", "te": "trailers"}
        block = b"\x83\x86" + b"".join(_literal(*field) for field in fields.items())  # POST, http
        data = b"\0" + len(message).to_bytes(4) + message
        assert calls * len(data) < self._FIRST_WINDOW, "requests wait for no window here"
        # The parts of a call's frames that do not depend on the number of its stream.
        self.headers = _frame(self._HEADERS, self._END_HEADERS, 0, block)
        self.data = _frame(self._DATA, self._END_STREAM, 0, data)
        self.check = check
        self.calls = calls
        self.times: list[float] = []
        self.sent: dict[int, float] = {}
        self.received: dict[int, int] = {}
        self.length = 0
        self.first: list[bytes] = []
        self.next = 1
        self.unread = b""
        self.taken = 0
        self.failure: Exception | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        settings = {1: 0, 2: 0, 4: self._WINDOW}  # no header table, no push, large windows of streams
        payload = b"".join(key.to_bytes(2) + value.to_bytes(4) for key, value in settings.items())
        transport.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(self._SETTINGS, 0, 0, payload))
        self.open_window(self._WINDOW - self._FIRST_WINDOW)
        self.send()

    def open_window(self, size: int) -> None:
        self.transport.write(_frame(self._WINDOW_UPDATE, 0, 0, size.to_bytes(4)))

    def send(self) -> None:
        stream = self.next.to_bytes(4)
        self.sent[self.next] = time.perf_counter()
        self.received[self.next] = 0
        self.next += 2
        headers, data = self.headers, self.data
        self.transport.write(b"".join((headers[:5], stream, headers[9:], data[:5], stream, data[9:])))

    def data_received(self, data: bytes) -> None:
        unread = self.unread + data if self.unread else data
        at = 0
        try:
            while len(unread) - at >= 9 and (end := at + 9 + int.from_bytes(unread[at : at + 3])) <= len(unread):
                stream = int.from_bytes(unread[at + 5 : at + 9])
                self.take(unread[at + 3], unread[at + 4], stream, unread[at + 9 : end])
                at = end
        except Exception as error:
            self.failure = error
            self.transport.abort()
        self.unread = unread[at:]

    def take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == self._DATA:
            self.received[stream] += len(payload)
            self.taken += len(payload)
            if self.taken > self._WINDOW // 2:
                self.open_window(self.taken)
                self.taken = 0
        if kind in (self._DATA, self._HEADERS):
            if not self.length:
                self.first.append(payload)
            if flags & self._END_STREAM:
                self.end(stream)
        elif kind in (self._SETTINGS, self._PING) and not flags & self._ACK:
            self.transport.write(_frame(kind, self._ACK, 0, payload if kind == self._PING else b""))
        elif kind in (self._RST_STREAM, self._GOAWAY):
            raise ConnectionError(f"the server ended the call, or the connection: {payload!r}")

    def end(self, stream: int) -> None:
        self.times.append(time.perf_counter() - self.sent.pop(stream))
        length = self.received.pop(stream)
        if not self.length:
            assert length, f"an error and no message: {self.first!r}"
            _, *message, trailers = self.first
            assert b"grpc-status\x010" in trailers, trailers
            self.check(b"".join(message)[5:])
            self.length = length
            for _ in range(self.calls - 1):
                self.send()
        assert length == self.length, f"an answer has {length} bytes, the first {self.length}"
        self.send()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return b"".join((len(payload).to_bytes(3), bytes((kind, flags)), stream.to_bytes(4), payload))


def _literal(name: str, value: str) -> bytes:
    """Return a header field that goes into no table."""
    return b"".join((b"\0", bytes((len(name),)), name.encode(), bytes((len(value),)), value.encode()))


async def http_loop(port: int, request: bytes, check: Check, connections: int, seconds: float, pid: int) -> Rate:
    """Keep some connections busy for some seconds, after a fifth of that time to warm up."""
    return await _closed_loop(port, lambda: _Loop(request, check), connections, seconds, pid)


async def grpc_loop(
    port: int, path: str, request: bytes, check: Check, concurrency: int, seconds: float, pid: int
) -> Rate:
    """Keep some calls of one connection under way for some seconds, after a fifth of that time to warm up."""
    return await _closed_loop(port, lambda: _Calls(path, request, check, concurrency), 1, seconds, pid)


async def _closed_loop(
    port: int, client: Callable[[], _Loop | _Calls], connections: int, seconds: float, pid: int
) -> Rate:
    loop = asyncio.get_running_loop()
    pairs = [await loop.create_connection(client, "127.0.0.1", port) for _ in range(connections)]
    await asyncio.sleep(seconds / 5)
    marks = [len(client.times) for _, client in pairs]
    begun, cpu = time.perf_counter(), cpu_seconds(pid)
    await asyncio.sleep(seconds)
    elapsed, cpu = time.perf_counter() - begun, cpu_seconds(pid) - cpu
    times = [t for (_, client), mark in zip(pairs, marks, strict=True) for t in client.times[mark:]]
    for transport, client in pairs:
        transport.abort()
        if client.failure is not None:
            raise client.failure
    return _rate(times, elapsed, cpu)


def grpcio_loop(port: int, path: str, request: bytes, check: Check, concurrency: int, seconds: float, pid: int) -> Rate:
    """Do as `grpc_loop` does with the library's own client, as users have it: its time is part of the round trip."""
    import grpc

    times: list[float] = []
    ended = threading.Semaphore(0)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(path)
        check(call(request, timeout=20))
        begun, cpu = time.perf_counter(), cpu_seconds(pid)
        end = begun + seconds
        if concurrency == 1:
            while (sent := time.perf_counter()) < end:
                call(request)
                times.append(time.perf_counter() - sent)
        else:

            def send() -> None:
                sent = time.perf_counter()
                if sent >= end:
                    ended.release()
                    return

                def answered(answer: Any) -> None:
                    answer.result()
                    times.append(time.perf_counter() - sent)
                    send()

                call.future(request).add_done_callback(answered)

            for _ in range(concurrency):
                send()
            for _ in range(concurrency):
                assert ended.acquire(timeout=seconds + 20), "a call got no answer"
        return _rate(times, time.perf_counter() - begun, cpu_seconds(pid) - cpu)


def _rate(times: list[float], elapsed: float, cpu: float) -> Rate:
    assert times, "no answer came in time"
    times.sort()
    return Rate(len(times) / elapsed, times[len(times) // 2] * 1e6, cpu / len(times) * 1e6)


def cpu_seconds(pid: int) -> float:
    """Return how long the threads of a process and of its children have computed (Linux)."""
    total = 0.0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            total += int((task / "schedstat").read_text().split()[0]) * 1e-9
            children = (task / "children").read_text().split()
        except FileNotFoundError:
            continue  # the thread has ended
        total += sum(cpu_seconds(int(child)) for child in children)
    return total


def post(target: str, body: bytes, header_length: int | None = None) -> bytes:
    """Return an HTTP request."""
    extra = b"" if header_length is None else b"Inference-Header-Content-Length: %d\r\n" % header_length
    head = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n"
    return head % (target.encode(), extra, len(body)) + body


def binary_post(model: str, name: str, shape: list[int], data: bytes) -> bytes:
    """Return a request with one FP32 tensor as bytes, which asks for bytes."""
    tensor = {"name": name, "shape": shape, "datatype": "FP32", "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return post(f"/v2/models/{model}/infer", head + data, len(head))


def shared_post(model: str, name: str, shape: list[int], region: str, size: int) -> bytes:
    """Return a request whose FP32 tensor lies in a registered region of shared memory; it asks for bytes."""
    place = {"shared_memory_region": region, "shared_memory_byte_size": size}
    tensor = {"name": name, "shape": shape, "datatype": "FP32", "parameters": place}
    document = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    return post(f"/v2/models/{model}/infer", json.dumps(document).encode())
