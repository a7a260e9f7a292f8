"""A server that is ready to be loaded: its model is known, requests are encoded, senders are connected."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from narrowcast.load.arrivals import Arrivals
from narrowcast.load.encoding import INFER, Request, encode_grpc, encode_http
from narrowcast.load.fleet import Fleet, FleetRun, Options, Report
from narrowcast.load.inputs import Batches, make_tensors, read_shapes
from narrowcast.load.introduction import Introduction, introduce, try_once
from narrowcast.load.sender import ClosedJob, OpenJob
from narrowcast.load.target import Target
from narrowcast.measure.load.energy import open_meter
from narrowcast.measure.load.progress import Progress
from narrowcast.measure.load.records import Outcome, Records
from narrowcast.measure.load.summary import Span, summarise, window
from narrowcast.measure.load.values import Run, ServerRecord, Slo

__all__ = ["Asked", "Content", "Measured", "Session", "Watch"]

Kinds = NDArray[np.int64]

#: Different kinds of requests in the row that a closed loop goes through.
_ROW = 4096


@dataclass(frozen=True)
class Content:
    """What requests carry.

    Attributes:
        data: ``random``, ``zeros``, an .npz file or the folder of an artifact.
        shapes: Shapes of inputs, as ``[NAME=]1x3x224x224``.
        batches: Rows of a request, and the share of requests with so many.
        encoding: How REST tensors are written; gRPC has raw bytes alone.
    """

    data: str = "random"
    shapes: Sequence[str] = ()
    batches: Batches = field(default_factory=lambda: {1: 1.0})
    encoding: Literal["json", "binary"] = "binary"


@dataclass(frozen=True)
class Asked:
    """What is asked of each run.

    Attributes:
        seconds: Seconds that count.
        warmup: Seconds before them.
        slo: The bound on latency.
        seed: Of arrivals and of the order of requests.
        lateness: Seconds that 99 % of the requests have to be sent within.
    """

    seconds: float = 10.0
    warmup: float = 1.0
    slo: Slo | None = None
    seed: int = 0
    lateness: float = 0.005


@dataclass(frozen=True)
class Watch:
    """Who is told how far things are: the name of each run as it begins, and its progress."""

    stage: Callable[[str], None]
    tick: Callable[[Progress], None]


@dataclass(frozen=True)
class Measured:
    """A run with its records, and whether somebody ended it early."""

    run: Run
    records: Records
    span: Span
    interrupted: bool

    @property
    def counted(self) -> Records:
        """Records of the requests that count."""
        return window(self.records, self.span)


class Session:
    """Sends load of one content to one model.

    Args:
        target: The server.
        model: Name of the model.
        version: Its version; empty for the one that the server chooses.
        content: What requests carry.
        options: How they are sent.
        seed: Of random inputs.

    Raises:
        UserError: Nobody answers, or somebody who does not speak the protocol.
        ModelError: The server has no such model.
        DataError: The content does not fit the model.
    """

    def __init__(
        self, target: Target, model: str, version: str, content: Content, options: Options, seed: int = 0
    ) -> None:
        self.target = target
        self.known = introduce(target, model, version)
        self.content = content
        self.requests = _encode(target, self.known, content, seed)
        try_once(target, INFER, self.requests[0].payload, self.known.inputs)
        self._fleet = Fleet(target, self.requests, options)
        self._meter = open_meter(local=target.local)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._fleet.__exit__(kind, error, trace)

    def server(self) -> ServerRecord:
        """Return the server and the model as they introduced themselves."""
        known = self.known
        return ServerRecord(
            url=str(self.target),
            security=self.target.access.words() if self.target.secured else "",
            name=known.server,
            version=known.version,
            extensions=known.extensions,
            model=known.model,
            model_version=known.model_version,
            platform=known.platform,
            inputs=tuple(map(str, known.inputs)),
        )

    def open_loop(self, arrivals: Arrivals, asked: Asked, report: Report) -> Measured:
        """Return a run whose requests are sent when they are due."""
        rng = np.random.default_rng(asked.seed)
        end = asked.warmup + asked.seconds
        due = arrivals.times(end, rng)
        job = OpenJob(due, self._kinds(len(due), rng), end)
        return self._measured(job, asked, None, report)

    def closed_loop(self, streams: int, group: int, asked: Asked, report: Report) -> Measured:
        """Return a run in which each of several streams sends a query of ``group`` requests when it has its last answer."""
        rng = np.random.default_rng(asked.seed)
        job = ClosedJob(streams, group, self._kinds(_ROW, rng), asked.warmup + asked.seconds)
        return self._measured(job, asked, streams * group, report)

    def _measured(self, job: OpenJob | ClosedJob, asked: Asked, concurrency: int | None, report: Report) -> Measured:
        self._meter.start()
        left: FleetRun = self._fleet.run(job, report)
        good = int((left.records["outcome"] == Outcome.OK).sum())
        # What ends before its warm-up does has nothing that counts; a sliver of time keeps rates finite.
        bound = math.inf if asked.slo is None else asked.slo.seconds
        span = Span(asked.warmup, max(left.end, asked.warmup + 1e-3), asked.lateness, concurrency, bound)
        run = summarise(left.records, span, left.client, self._meter.spent(good), asked.slo)
        return Measured(run, left.records, span, left.interrupted)

    def _kinds(self, count: int, rng: np.random.Generator) -> Kinds:
        """Return which request each one is, in the shares of the batch sizes."""
        rows = np.array([request.rows for request in self.requests])
        shares = np.array([self.content.batches[size] / int((rows == size).sum()) for size in rows.tolist()])
        return rng.choice(len(rows), count, p=shares)


def _encode(target: Target, known: Introduction, content: Content, seed: int) -> list[Request]:
    tensors = make_tensors(known, content.batches, content.data, read_shapes(content.shapes, known.inputs), seed)
    return [
        encode_grpc(known, one, rows)
        if target.grpc
        else encode_http(target, known, one, rows, binary=content.encoding == "binary")
        for rows, variants in tensors.items()
        for one in variants
    ]
