"""What a load run found, as values that are printed, written as JSON and drawn."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from narrowcast.artifacts.manifest import Environment
from narrowcast.measure.statistics import Estimate

__all__ = [
    "Bin",
    "Client",
    "Counts",
    "Energy",
    "Finding",
    "Lateness",
    "LoadResult",
    "Percentile",
    "Probe",
    "Recovery",
    "Run",
    "ServerRecord",
    "Slo",
    "Workload",
]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Slo(_Value):
    """A bound on latency: that percentile of all requests is at most so many seconds; requests without answer miss it."""

    percentile: float
    seconds: float

    def __str__(self) -> str:
        return f"p{self.percentile:g} of at most {self.seconds * 1e3:g} ms"


class Percentile(_Value):
    """A percentile of latency in seconds; no estimate where the sample does not support one."""

    q: float
    estimate: Estimate | None


class Counts(_Value):
    """How requests ended; see `narrowcast.measure.load.records.Outcome`."""

    due: int
    ok: int
    shed: int
    timeout: int
    error: int
    broken: int
    cut: int


class Bin(_Value):
    """A stretch of the run.

    Attributes:
        start: Seconds after the start of the run.
        offered: Requests that were due in it, per second.
        ok: Good answers that came in it, per second.
        failed: Requests that ended otherwise in it, per second.
        median: Of the latency of the good answers of requests due in it, in seconds; None without any.
        slow: The 99th percentile of the same where there are at least 100, else the slowest.
    """

    start: float
    offered: float
    ok: float
    failed: float
    median: float | None
    slow: float | None


class Client(_Value):
    """How the load generator itself fared.

    Attributes:
        processes: Processes that sent.
        cpu_share: CPU time of the busiest one, as a share of a core.
        lag: 99th percentile of how late its event loop woke up, in seconds.
        connections: Connections that were open together at most.
        waited: Requests that found all connections busy.
    """

    processes: int
    cpu_share: float
    lag: float
    connections: int
    waited: int


class Lateness(_Value):
    """Seconds from when requests were due to when they were sent: the load generator's own delay."""

    median: float
    p99: float
    longest: float


class Finding(_Value):
    """Something that a reader has to know before believing the numbers; a run with a void one does not count."""

    kind: Literal[
        "late",
        "saturated",
        "drift",
        "behind",
        "unanswered",
        "unsupported",
        "failures",
        "interrupted",
        "insecure",
        "gone",
        "undecided",
    ]
    void: bool
    words: str


class Energy(_Value):
    """Energy of the devices with a counter, idle parts and other programs included.

    Attributes:
        joules: By counter.
        per_request: All of them together, by good answer; None where there is no counter or no answer.
        unavailable: Why there is no counter; empty where there is one.
    """

    joules: dict[str, float]
    per_request: float | None
    unavailable: str = ""


class Run(_Value):
    """One stretch of load at one setting; times in seconds, rates per second.

    Attributes:
        open: Whether requests were sent when they were due (open loop), or when an answer had come (closed loop).
        offered: Rate of the requests that were due.
        concurrency: Requests under way together, in a closed loop.
        warmup: Seconds at the start that do not count.
        seconds: Seconds that count.
        counts: How the requests of these seconds ended.
        statuses: Answers by status.
        rate: Good answers per second.
        rows_rate: Rows of good answers per second.
        goodput: Good answers within the bound per second; None without a bound.
        within: Share of all requests with a good answer within the bound; None without a bound.
        mean: Of the latency of good answers.
        percentiles: Of the same.
        curve: The same at many percentiles, as far as the sample supports them.
        unloaded: Median from the sending of a request to its answer: what a client that waits for itself would report.
        bins: The course of the run, warm-up included.
        lateness: Of the requests; they were sent when they were due only in an open loop.
        client: How the load generator fared.
        findings: What to know before believing this.
        energy: What it took.
    """

    open: bool
    offered: float
    concurrency: int | None
    warmup: float
    seconds: float
    counts: Counts
    statuses: dict[str, int]
    rate: Estimate | None
    rows_rate: float
    goodput: Estimate | None
    within: Estimate | None
    mean: Estimate | None
    percentiles: tuple[Percentile, ...]
    curve: tuple[Percentile, ...]
    unloaded: float | None
    bins: tuple[Bin, ...]
    lateness: Lateness
    client: Client
    findings: tuple[Finding, ...]
    energy: Energy

    @property
    def void(self) -> bool:
        """Whether the numbers do not count."""
        return any(finding.void for finding in self.findings)


class Probe(_Value):
    """One try of the search for the largest rate.

    Attributes:
        rate: Requests per second that were offered.
        requests: How many.
        missed: Share of them that missed the bound, with its interval.
        verdict: Whether the bound held; ``unclear`` where noise leaves it open, ``void`` where the client failed.
        confirming: Whether it was repeated to confirm the answer.
        kind: Of batching, where kinds are compared.
    """

    rate: float
    requests: int
    missed: Estimate
    verdict: Literal["held", "missed", "unclear", "void"]
    confirming: bool = False
    kind: str = ""


class Recovery(_Value):
    """What happened when the load went past capacity and came back.

    Attributes:
        capacity: Good answers per second that a closed loop had before.
        normal: Rate before and after, per second.
        overload: Rate in between.
        before: Seconds of normal load, warm-up included; then overload begins.
        during: Seconds of overload.
        seconds: From the end of the overload to the first moment from which on requests fare as before it; None if that
            never came.
        definition: How that moment is found.
        accepted: Goodput during the overload.
    """

    capacity: float
    normal: float
    overload: float
    before: float
    during: float
    seconds: float | None
    definition: str
    accepted: Estimate | None


class ServerRecord(_Value):
    """The server and the model as they introduced themselves.

    Attributes:
        url: Where it is.
        security: How its connections were secured; empty for not at all.
        name: Of the server.
        version: Of the server.
        extensions: Of the protocol.
        model: Its name.
        model_version: That was asked for; empty where the server chose.
        platform: That the model is for.
        inputs: Of the model.
    """

    url: str
    security: str = ""
    name: str
    version: str
    extensions: tuple[str, ...]
    model: str
    model_version: str
    platform: str
    inputs: tuple[str, ...]


class Workload(_Value):
    """What was sent, and how.

    Attributes:
        scenario: Its name.
        arrivals: How requests were spread over time; empty in a closed loop.
        encoding: How tensors were written.
        data: Where they came from.
        batches: Rows of a request, and their share of requests.
        bytes: Of a request's body, for each kind of request.
        timeout: Seconds after which a request was given up.
        connections: The most that were allowed.
        seed: Of everything random.
        lateness: Seconds that 99 % of the requests had to be sent within.
        headers: Names of those that were sent beside the protocol's own; what they hold is not kept.
    """

    scenario: str
    arrivals: str
    encoding: str
    data: str
    batches: dict[int, float]
    bytes: tuple[int, ...]
    timeout: float
    connections: int
    seed: int
    lateness: float
    headers: tuple[str, ...] = ()


class LoadResult(_Value):
    """Everything that a report of a load shows.

    Attributes:
        created: ISO 8601 time.
        server: Who answered.
        workload: What was asked of it.
        slo: The bound; None without one.
        run: The run that the answer stands on.
        others: Other runs by name: of the other kind of batching, for example.
        probes: Tries of the search, in their order.
        largest: The largest rate that held the bound, per second, with its interval; None if none did or it was not sought.
        confirmed: Rate at which the bound was confirmed to hold.
        recovery: Of a stress test.
        goodputs: The largest rate that held the bound, per second, by kind of batching; empty unless kinds are compared.
        gains: How many times the goodput of each other kind of batching the first one has.
        protocol: How the numbers were found, for people.
        environment: Of the load generator; it is the server's too where that is on this machine.
        interrupted: Whether somebody ended it early.
    """

    created: str
    server: ServerRecord
    workload: Workload
    slo: Slo | None
    run: Run
    others: dict[str, Run] = {}
    probes: tuple[Probe, ...] = ()
    largest: Estimate | None = None
    confirmed: float | None = None
    recovery: Recovery | None = None
    goodputs: dict[str, Estimate] = {}
    gains: dict[str, Estimate] = {}
    protocol: str
    environment: Environment
    interrupted: bool = False
