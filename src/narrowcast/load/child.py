"""A sender process: ``python -m narrowcast.load.child FD``. It ends when the socket that it is given does.

A process of its own, because whatever else a program does (a terminal that is drawn, garbage that is collected) makes requests
late.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import sys
from dataclasses import asdict
from typing import Any

import numpy as np

from narrowcast.load.client import Client
from narrowcast.load.frames import pack, read
from narrowcast.load.http import HttpClient
from narrowcast.load.sender import ClosedJob, OpenJob, Sender, new_loop
from narrowcast.load.target import Target
from narrowcast.measure.load.progress import Progress

__all__ = ["main"]


def main(descriptor: int) -> None:
    """Serve the process at the other end of a socket until that closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when a run ends
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(_serve(socket.socket(fileno=descriptor)))


async def _serve(connection: socket.socket) -> None:
    stream, answers = await asyncio.open_connection(sock=connection)
    setup = await read(stream)
    if setup is None:
        return
    document, blob = setup
    payloads = np.split(np.frombuffer(blob, np.uint8), np.cumsum(document["lengths"])[:-1])
    client = _client(document, [bytes(payload) for payload in payloads])
    sender = Sender(client, document["rows"], document["bodies"])
    gc.freeze()
    gc.disable()
    frames: asyncio.Queue[Any] = asyncio.Queue()
    listening = asyncio.create_task(_listen(stream, frames, sender))
    while (frame := await frames.get()) is not None:
        job = _job(*frame)
        try:
            await sender.prepare(job)
        except OSError as error:
            answers.write(pack({"kind": "failed", "why": error.strerror or str(error)}))
            continue
        answers.write(pack({"kind": "ready"}))
        if (go := await frames.get()) is None:
            break
        await _run(sender, job, go[0]["start"], answers)
        gc.collect()
    listening.cancel()
    await client.close()
    answers.close()


async def _listen(stream: asyncio.StreamReader, frames: asyncio.Queue[Any], sender: Sender) -> None:
    """Put jobs into a queue; what ends a run is not put, but ends it."""
    while (frame := await read(stream)) is not None:
        if frame[0]["kind"] == "stop":
            sender.stop()
        else:
            await frames.put(frame)
    sender.stop()
    await frames.put(None)


def _client(document: dict[str, Any], payloads: list[bytes]) -> Client:
    target = Target.of(document["target"])
    if target.grpc:
        from narrowcast.load.rpc import GrpcClient

        return GrpcClient(target, payloads, document["connections"], document["timeout"])
    return HttpClient(target, payloads, document["connections"], document["timeout"])


async def _run(sender: Sender, job: OpenJob | ClosedJob, start: float, answers: asyncio.StreamWriter) -> None:
    def report(progress: Progress) -> None:
        answers.write(pack({"kind": "progress"} | asdict(progress)))

    sent = await sender.run(job, start, report)
    about = {field: value for field, value in vars(sent).items() if field != "records"}
    answers.write(pack({"kind": "sent"} | about, sent.records.tobytes()))
    await answers.drain()


def _job(document: dict[str, Any], blob: bytes) -> OpenJob | ClosedJob:
    """Return the job that a document describes; times and kinds are in the bytes."""
    due = np.frombuffer(blob, np.float64, document["due"])
    kinds = np.frombuffer(blob, np.int64, offset=due.nbytes)
    if document["kind"] == "open":
        return OpenJob(due, kinds, document["end"])
    return ClosedJob(document["streams"], document["group"], kinds, document["end"])


if __name__ == "__main__":
    main(int(sys.argv[1]))
