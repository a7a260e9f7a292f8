"""What is measured: a rate, a number of streams, or the largest rate that holds a bound.

Source of the names: V. J. Reddi et al., "MLPerf Inference Benchmark", ISCA 2020, section III (single-stream, multi-stream,
server, offline).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from narrowcast.errors import NarrowcastError, RuntimeFailedError, UserError
from narrowcast.load.arrivals import Arrivals, Poisson
from narrowcast.load.fleet import Report
from narrowcast.load.search import Rules, Trial, find_largest
from narrowcast.load.session import Asked, Measured, Session, Watch
from narrowcast.load.stress import stress
from narrowcast.measure.load.progress import Progress
from narrowcast.measure.load.summary import missed
from narrowcast.measure.load.values import Finding, Probe, Recovery, Slo
from narrowcast.measure.statistics import Estimate

__all__ = ["Answer", "Guard", "Scenario", "Settings", "measure", "most_missed", "told"]

#: Requests that a try of the search sends at the least for each one that may miss the bound: 1,000 for p99.
_MISSES = 10
#: Misses over what a whole try may have, after which it is ended.
_SPARE = 10
#: Seconds of the closed loop that says where the search begins.
_GLANCE = 2.0
#: What a stress test is meant to bring about, so that nobody has to be told.
_WANTED = ("drift", "behind", "unsupported")


class Scenario(StrEnum):
    """What is measured."""

    RATE = "rate"
    CLOSED = "closed"
    SINGLE_STREAM = "single-stream"
    MULTI_STREAM = "multi-stream"
    SERVER = "server"
    OFFLINE = "offline"
    STRESS = "stress"


@dataclass(frozen=True)
class Settings:
    """A scenario and its numbers.

    Attributes:
        scenario: Which one.
        asked: What is asked of each run.
        arrivals: Of the fixed rate.
        rate: Where the search begins, or the capacity that a stress test takes for granted; None: found out.
        concurrency: Streams of a closed loop.
        group: Requests of a multi-stream query.
        overload: Rate of the overload, as a multiple of capacity.
    """

    scenario: Scenario
    asked: Asked
    arrivals: Arrivals | None = None
    rate: float | None = None
    concurrency: int = 1
    group: int = 1
    overload: float = 2.0


@dataclass(frozen=True)
class Answer:
    """What a scenario found; see `narrowcast.measure.load.values.LoadResult`."""

    measured: Measured
    arrivals: str
    protocol: str
    probes: tuple[Probe, ...] = ()
    largest: Estimate | None = None
    confirmed: float | None = None
    recovery: Recovery | None = None
    notes: tuple[str, ...] = field(default=())


def measure(session: Session, settings: Settings, watch: Watch) -> Answer:
    """Return what a scenario finds of a server."""
    return _SCENARIOS[settings.scenario](session, settings, watch)


def told(watch: Watch) -> Report:
    """Return a report of progress that never ends a run."""

    def report(progress: Progress) -> bool:
        watch.tick(progress)
        return False

    return report


def _rate(session: Session, settings: Settings, watch: Watch) -> Answer:
    assert settings.arrivals is not None
    watch.stage(f"open loop, {settings.arrivals}")
    measured = session.open_loop(settings.arrivals, settings.asked, told(watch))
    return Answer(measured, str(settings.arrivals), f"open loop, {_counted(settings.asked)}")


def _closed(session: Session, settings: Settings, watch: Watch) -> Answer:
    streams, group = settings.concurrency, settings.group
    watch.stage(f"closed loop, {streams * group} under way")
    measured = session.closed_loop(streams, group, settings.asked, told(watch))
    words = {
        Scenario.CLOSED: f"capacity test: closed loop of {streams} streams, which wait when the server does; its latencies "
        "say nothing about a load that does not wait",
        Scenario.SINGLE_STREAM: "single-stream: the next request is sent when the last one is answered",
        Scenario.MULTI_STREAM: f"multi-stream: queries of {group} requests sent together, the next when all are answered; "
        "latency is the query's",
        Scenario.OFFLINE: f"offline: all requests are there from the beginning and {streams} are kept under way; its "
        "throughput counts, its latencies do not",
    }[settings.scenario]
    return Answer(measured, "", f"{words}; {_counted(settings.asked)}")


def _counted(asked: Asked) -> str:
    return f"{asked.seconds:g} s after {asked.warmup:g} s of warm-up"


def _server(session: Session, settings: Settings, watch: Watch) -> Answer:
    asked = settings.asked
    slo = asked.slo
    assert slo is not None
    allowed = 1 - slo.percentile / 100
    first = settings.rate
    if first is None:
        glance = _glance(session, settings, watch)
        if glance.interrupted:
            return _interrupted(glance, ())
        first = _first_rate(glance)
    runs: list[tuple[float, Measured]] = []
    probes: list[Probe] = []

    def run(rate: float, seed: int) -> Trial:
        watch.stage(f"try {len(runs) + 1}: {rate:.4g} requests/s")
        # Enough requests for the percentile, but not more than five times the time that was asked for.
        seconds = min(max(asked.seconds, _MISSES / allowed / rate), 5 * asked.seconds)
        guard = Guard(slo.seconds, asked.warmup, most_missed(slo, rate * seconds), watch)
        measured = session.open_loop(Poisson(rate), replace(asked, seconds=seconds, seed=seed), guard)
        runs.append((rate, measured))
        if measured.interrupted:
            raise KeyboardInterrupt
        if not measured.run.counts.ok and measured.run.counts.broken:
            raise UserError(f"no request had an answer at {rate:.4g} requests/s, since no connection was left")
        void = any(finding.kind == "late" for finding in measured.run.findings)
        return Trial(missed(measured.counted, slo.seconds), void, guard.ended)

    try:
        found = find_largest(run, first, Rules(allowed), asked.seed, probes)
    except KeyboardInterrupt:
        if not runs:
            raise
        return _interrupted(runs[-1][1], tuple(probes))
    except (UserError, RuntimeFailedError) as error:  # the server or a sender has died
        if not runs:
            raise
        return _cut_off(runs[-1][1], tuple(probes), error)
    chosen = found.confirmed if found.confirmed is not None else min(rate for rate, _ in runs)
    measured = next(measured for rate, measured in reversed(runs) if rate == chosen)
    limit = found.limit
    notes = (
        ()
        if limit is None
        else (f"the search ended at {limit:.4g} requests/s, which the load generator could not send",)
    )
    protocol = (
        f"server: Poisson arrivals in an open loop; {len(found.probes)} tries of at least {asked.seconds:g} s each after "
        f"{asked.warmup:g} s of warm-up; rates doubled, then halved to within 5%, the answer tried again with other arrivals; "
        "the estimate is where an isotonic fit of all tries crosses the bound, its interval a bootstrap over their stretches"
    )
    return Answer(measured, str(Poisson(chosen)), protocol, found.probes, found.largest, found.confirmed, notes=notes)


def _interrupted(last: Measured, probes: tuple[Probe, ...]) -> Answer:
    words = f"server: the search was interrupted; this is its last run, after {len(probes)} whole tries"
    return Answer(replace(last, interrupted=True), "Poisson", words, probes)


def _cut_off(last: Measured, probes: tuple[Probe, ...], error: NarrowcastError) -> Answer:
    words = f"server: the search came to an end too early; this is its last run, after {len(probes)} whole tries"
    gone = Finding(kind="gone", void=True, words=f"the search came to an end too early: {error.what}")
    run = last.run.model_copy(update={"findings": (gone, *last.run.findings)})
    return Answer(replace(last, run=run), "Poisson", words, probes)


def _glance(session: Session, settings: Settings, watch: Watch) -> Measured:
    watch.stage("a glance at a single stream")
    glance = replace(settings.asked, seconds=_GLANCE, warmup=min(0.5, settings.asked.warmup))
    return session.closed_loop(1, 1, glance, told(watch))


def _first_rate(glance: Measured) -> float:
    """Return half the rate of a single stream: low enough for nearly every server."""
    rate = glance.run.rate
    return max(1.0, rate.value / 2) if rate is not None else 1.0


def most_missed(slo: Slo, requests: float) -> float:
    """Return how many of so many requests may miss a bound before it is certain that it does not hold."""
    may_miss = (1 - slo.percentile / 100) * requests
    return may_miss + 3 * math.sqrt(may_miss) + _SPARE


class Guard:
    """Ends a try when it has missed the bound so often that the rest of it cannot mend that.

    Args:
        bound: On latency, in seconds.
        warmup: Seconds that do not count.
        most: Requests that may miss it.
        watch: Who is told of progress.
    """

    def __init__(self, bound: float, warmup: float, most: float, watch: Watch) -> None:
        self._bound = bound
        self._warmup = warmup
        self._most = most
        self._watch = watch
        self._missed = 0
        self.ended = False

    def __call__(self, progress: Progress) -> bool:
        self._watch.tick(progress)
        # What ended after the last report, and lasted no longer than this, was due after the warm-up for certain.
        longest = progress.since - self._warmup
        self._missed += sum(self._bound < latency <= longest for latency in progress.latencies)
        self._missed += sum(lasted <= longest for lasted in progress.failures)
        self.ended = self.ended or self._missed > self._most
        return self.ended


def _stress(session: Session, settings: Settings, watch: Watch) -> Answer:
    measured, recovery, words = stress(session, settings.asked, settings.rate, settings.overload, watch, told(watch))
    if recovery is None:
        return Answer(measured, "Poisson", words)
    others = tuple(one for one in measured.run.findings if one.kind not in _WANTED)
    measured = replace(measured, run=measured.run.model_copy(update={"findings": others}))
    arrivals = f"Poisson, {recovery.normal:.4g}/s, then {recovery.overload:.4g}/s, then {recovery.normal:.4g}/s"
    return Answer(measured, arrivals, words, recovery=recovery)


_SCENARIOS: dict[Scenario, Callable[[Session, Settings, Watch], Answer]] = {
    Scenario.RATE: _rate,
    Scenario.CLOSED: _closed,
    Scenario.SINGLE_STREAM: _closed,
    Scenario.MULTI_STREAM: _closed,
    Scenario.OFFLINE: _closed,
    Scenario.SERVER: _server,
    Scenario.STRESS: _stress,
}
