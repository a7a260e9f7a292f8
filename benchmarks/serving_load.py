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


async def http_loop(port: int, request: bytes, check: Check, connections: int, seconds: float, pid: int) -> Rate:
    """Keep some connections busy for some seconds, after a fifth of that time to warm up."""
    loop = asyncio.get_running_loop()
    pairs = [await loop.create_connection(lambda: _Loop(request, check), "127.0.0.1", port) for _ in range(connections)]
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


def grpc_loop(port: int, path: str, request: bytes, check: Check, concurrency: int, seconds: float, pid: int) -> Rate:
    """Keep some calls of one channel under way for some seconds; messages are bytes, so that the client adds little."""
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
