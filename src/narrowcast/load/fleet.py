"""Sender processes and what they send together."""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from time import monotonic
from types import TracebackType
from typing import Self

import numpy as np

from narrowcast.errors import RuntimeFailedError, UserError
from narrowcast.load.encoding import Request
from narrowcast.load.frames import Frame, pack, receive
from narrowcast.load.sender import ClosedJob, OpenJob
from narrowcast.load.target import Target
from narrowcast.measure.load.progress import Progress
from narrowcast.measure.load.records import RECORD, Records, in_order
from narrowcast.measure.load.values import Client

__all__ = ["Fleet", "FleetRun", "Options", "Report"]

#: Told how far a run is; says whether it may end early.
Report = Callable[[Progress], bool]

#: Seconds from the order to send until the first request is due.
_LEAD = 0.15
_END_SECONDS = 5.0
_PROGRESS = tuple(field.name for field in fields(Progress))


@dataclass(frozen=True)
class Options:
    """How requests are sent.

    Attributes:
        processes: Processes that send.
        connections: The most that all of them may have open together.
        timeout: Seconds after which a request is given up.
    """

    processes: int = 1
    connections: int = 512
    timeout: float = 10.0


@dataclass(frozen=True)
class FleetRun:
    """What a run left: records in order, how the senders fared, when they stopped, and whether somebody ended it early."""

    records: Records
    client: Client
    end: float
    interrupted: bool


class Fleet:
    """Sender processes, which keep their connections from one run to the next.

    Args:
        target: The server.
        requests: Encoded requests; jobs name them by their place.
        options: How to send.
    """

    def __init__(self, target: Target, requests: Sequence[Request], options: Options) -> None:
        self._target = target
        self._senders = [_Process() for _ in range(options.processes)]
        setup = pack(
            {
                "target": target.document(),
                "connections": max(1, options.connections // options.processes),
                "timeout": options.timeout,
                "lengths": [len(request.payload) for request in requests],
                "rows": [request.rows for request in requests],
                "bodies": [request.body for request in requests],
            },
            b"".join(request.payload for request in requests),
        )
        for sender in self._senders:
            sender.socket.sendall(setup)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sender in self._senders:
            sender.end()

    def run(self, job: OpenJob | ClosedJob, report: Report) -> FleetRun:
        """Return what became of a job's requests; ctrl-C ends the run early, and a second one is not held up.

        Args:
            job: What to send.
            report: Called a few times a second; the run ends early when it returns true.

        Raises:
            UserError: The server takes no connection.
            RuntimeFailedError: A sender process has ended.
        """
        parts = list(_parts(job, len(self._senders)))
        busy = self._senders[: len(parts)]
        for sender, frame in zip(busy, parts, strict=True):
            sender.socket.sendall(frame)
        for document, _ in self._collect(busy, report):
            if document["kind"] == "failed":
                raise UserError(f"the server at {self._target} takes no connection: {document['why']}")
        start = monotonic() + _LEAD
        for sender in busy:
            sender.socket.sendall(pack({"kind": "go", "start": start}))
        try:
            answers = self._collect(busy, report)
        except KeyboardInterrupt:
            _stop(busy)
            return _gathered(self._collect(busy, report), interrupted=True)
        return _gathered(answers, interrupted=False)

    def _collect(self, busy: Sequence[_Process], report: Report) -> list[Frame]:
        """Return an answer of each process that has not given one yet, and report the progress of all meanwhile.

        Raises:
            RuntimeFailedError: One has ended.
        """
        latest: dict[_Process, Progress] = {}
        stopped = False
        with selectors.DefaultSelector() as selector:
            for sender in busy:
                if sender.answer is None:
                    selector.register(sender.socket, selectors.EVENT_READ, sender)
            while selector.get_map():
                for key, _ in selector.select():
                    sender: _Process = key.data
                    document, blob = sender.next()
                    if document["kind"] != "progress":
                        sender.answer = document, blob
                        selector.unregister(sender.socket)
                        continue
                    latest[sender] = Progress(*(document[name] for name in _PROGRESS))
                    if report(_together(latest)) and not stopped:
                        stopped = True
                        _stop(busy)
                    latest[sender] = replace(latest[sender], latencies=(), failures=())  # they have been reported
        return [sender.take() for sender in busy]


def _stop(busy: Sequence[_Process]) -> None:
    for sender in busy:
        sender.socket.sendall(pack({"kind": "stop"}))


def _gathered(answers: Sequence[Frame], *, interrupted: bool) -> FleetRun:
    """Return what all processes left as one run."""
    documents = [document for document, _ in answers]
    client = Client(
        processes=len(documents),
        cpu_share=max(document["cpu_share"] for document in documents),
        lag=max(document["lag"] for document in documents),
        connections=sum(document["connections"] for document in documents),
        waited=sum(document["waited"] for document in documents),
    )
    records = in_order(_apart([np.frombuffer(blob, RECORD) for _, blob in answers]))
    return FleetRun(records, client, max(document["end"] for document in documents), interrupted)


def _apart(parts: list[Records]) -> list[Records]:
    """Return records whose queries have numbers of their own."""
    found: list[Records] = []
    first = 0
    for part in parts:
        mine = part.copy()
        mine["query"] += first
        first = int(mine["query"].max(initial=first - 1)) + 1
        found.append(mine)
    return found


def _parts(job: OpenJob | ClosedJob, processes: int) -> list[bytes]:
    """Return a job in as many parts as there are processes, as frames; each n-th request goes to one of n."""
    if isinstance(job, ClosedJob):
        count = min(processes, job.streams)
        shares = [job.streams // count + (place < job.streams % count) for place in range(count)]
        jobs: list[OpenJob | ClosedJob] = [
            replace(job, streams=share, kinds=np.roll(job.kinds, -place)) for place, share in enumerate(shares)
        ]
    else:
        jobs = [OpenJob(job.due[place::processes], job.kinds[place::processes], job.end) for place in range(processes)]
    return [_frame(one) for one in jobs]


def _frame(job: OpenJob | ClosedJob) -> bytes:
    if isinstance(job, OpenJob):
        about = {"kind": "open", "due": len(job.due), "end": job.end}
        return pack(about, job.due.tobytes() + job.kinds.tobytes())
    about = {"kind": "closed", "due": 0, "end": job.end, "streams": job.streams, "group": job.group}
    return pack(about, job.kinds.tobytes())


def _together(latest: dict[_Process, Progress]) -> Progress:
    parts = list(latest.values())
    return Progress(
        seconds=max(part.seconds for part in parts),
        due=sum(part.due for part in parts),
        ok=sum(part.ok for part in parts),
        failed=sum(part.failed for part in parts),
        latencies=tuple(latency for part in parts for latency in part.latencies),
        failures=tuple(seconds for part in parts for seconds in part.failures),
        since=min(part.since for part in parts),
    )


class _Process:
    """A sender process and the socket to it."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        self.answer: Frame | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "narrowcast.load.child", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=os.environ | {"GRPC_VERBOSITY": "NONE"},
        )
        theirs.close()

    def next(self) -> Frame:
        """Return the next thing that the process says.

        Raises:
            RuntimeFailedError: It has ended.
        """
        frame = receive(self.socket)
        if frame is None:
            raise RuntimeFailedError("a sender process has ended", next_step="look at its message above")
        return frame

    def take(self) -> Frame:
        """Return the answer that has come."""
        assert self.answer is not None
        answer, self.answer = self.answer, None
        return answer

    def end(self) -> None:
        """Close the socket, at which the process ends."""
        self.socket.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
