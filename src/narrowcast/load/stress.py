"""Load past capacity and back, and how long the server needs to serve as before."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from narrowcast.load.arrivals import Arrivals, Poisson
from narrowcast.load.fleet import Report
from narrowcast.load.session import Asked, Measured, Session, Watch
from narrowcast.measure.load.records import Outcome, Records
from narrowcast.measure.load.summary import Span, summarise
from narrowcast.measure.load.values import Recovery
from narrowcast.measure.statistics import Estimate

__all__ = ["Phases", "recovered_after", "stress"]

Floats = NDArray[np.float64]

#: Streams of the closed loop that finds the capacity, and its seconds.
_STREAMS, _GLANCE = 32, 3.0
#: Load before and after the overload, as a share of capacity.
_NORMAL = 0.5
#: Stretches in a row that have to be as before, and requests of each.
_STRETCHES, _REQUESTS = 5, 20
_DEFINITION = (
    f"from the end of the overload to when the first of {_STRETCHES} stretches in a row of {_REQUESTS} requests was due, "
    "of each of which the median latency is at most the 95th percentile before the overload, and no more than 5% failed"
)


@dataclass(frozen=True)
class Phases(Arrivals):
    """Poisson arrivals at one rate after the other.

    Attributes:
        parts: Rate and seconds of each phase.
    """

    parts: tuple[tuple[float, float], ...]

    def times(self, seconds: float, rng: np.random.Generator) -> Floats:
        found: list[Floats] = []
        begin = 0.0
        for rate, length in self.parts:
            found.append(begin + Poisson(rate).times(length, rng))
            begin += length
        whole = np.concatenate(found)
        return whole[whole < seconds]


def stress(
    session: Session, asked: Asked, capacity: float | None, overload: float, watch: Watch, report: Report
) -> tuple[Measured, Recovery | None, str]:
    """Return a run with a third of overload in its middle, what became of the server after it, and how it was done.

    Nothing is said of recovery where the run was interrupted, whether in the overload or in the search for capacity.

    Args:
        session: The server.
        asked: What is asked of the run; its seconds are those of all three parts.
        capacity: Good answers per second that the server is known to give; found out by a closed loop unless given.
        overload: Rate of the overload, as a multiple of capacity.
        watch: Who is told of stages.
        report: Who is told of progress.
    """
    if capacity is None:
        watch.stage(f"capacity in a closed loop of {_STREAMS}")
        glance = session.closed_loop(_STREAMS, 1, replace(asked, seconds=_GLANCE, warmup=0.5, slo=None), report)
        if glance.interrupted:
            return glance, None, "stress: interrupted while its capacity was sought; this is the closed loop"
        capacity = max(1.0, glance.run.rate.value if glance.run.rate is not None else 0.0)
    third = asked.seconds / 3
    normal, most = _NORMAL * capacity, overload * capacity
    before = asked.warmup + third
    watch.stage(f"{normal:.4g}, {most:.4g} and {normal:.4g} requests/s")
    phases = Phases(((normal, before), (most, third), (normal, third)))
    measured = session.open_loop(phases, asked, report)
    if measured.interrupted:
        return measured, None, f"stress: interrupted; {_phases(asked, third, overload)} had been planned"
    recovery = Recovery(
        capacity=capacity,
        normal=normal,
        overload=most,
        before=before,
        during=third,
        seconds=recovered_after(measured.records, asked.warmup, before, before + third),
        definition=_DEFINITION,
        accepted=_accepted(measured, asked, before, before + third),
    )
    return measured, recovery, f"stress: {_phases(asked, third, overload)}"


def _phases(asked: Asked, third: float, overload: float) -> str:
    return (
        f"{third:.3g} s at half of the capacity after {asked.warmup:g} s of warm-up, {third:.3g} s at {overload:g} "
        f"times it, {third:.3g} s at half of it again"
    )


def recovered_after(records: Records, warmup: float, begin: float, end: float) -> float | None:
    """Return how long after an overload requests fare as before it, in seconds; None if they do not within the run.

    Args:
        records: Of the run.
        warmup: Seconds that do not count.
        begin: When the overload begins.
        end: When it ends.
    """
    due = records["intended"]
    good = records["outcome"] == Outcome.OK
    latency = np.where(good, records["done"] - due, np.inf)
    normal = latency[(due >= warmup) & (due < begin) & good]
    if not len(normal):
        return None
    usual = float(np.percentile(normal, 95))
    after = np.flatnonzero(due >= end)
    in_a_row = 0
    for place in range(0, len(after) - _REQUESTS + 1, _REQUESTS):
        stretch = after[place : place + _REQUESTS]
        as_before = float(np.median(latency[stretch])) <= usual and float((~good[stretch]).mean()) <= 0.05
        in_a_row = in_a_row + 1 if as_before else 0
        if in_a_row == _STRETCHES:
            first = after[place - (_STRETCHES - 1) * _REQUESTS]
            return float(due[first]) - end
    return None


def _accepted(measured: Measured, asked: Asked, begin: float, end: float) -> Estimate | None:
    """Return the good answers per second during the overload, within the bound where there is one."""
    span = Span(begin, end, asked.lateness)
    run = summarise(measured.records, span, measured.run.client, measured.run.energy, asked.slo)
    return run.rate if asked.slo is None else run.goodput
