"""Whether a run can be believed: senders in time, a client with time to spare, a server in a steady state."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from narrowcast.measure.load.estimates import worth
from narrowcast.measure.load.values import Finding, Run, Slo
from narrowcast.measure.statistics import drift

__all__ = ["BUSY", "SENT_IN_TIME", "findings"]

Floats = NDArray[np.float64]

#: Share of the requests that has to be sent within the lateness bound.
SENT_IN_TIME = 0.99
#: Share of a core from which on a sender is said to be saturated.
BUSY = 0.9
#: Share of a core from which on a sender is late by its own work.
_OWN_WORK = 0.7
#: Change of the median latency over a run, as a share of it, from which on it is said.
_DRIFT = 0.1
#: Share of the offered rate that a server that keeps up answers well.
_KEPT_UP = 0.95
#: Stretches that a trend is looked for in.
_STRETCHES = 40
#: Independent values that a percentile needs for each one that is slower: 368 for p99.
_SLOWER = 3.68


def findings(run: Run, latencies: Floats, lateness: float, slo: Slo | None) -> Iterator[Finding]:
    """Yield what a reader has to know before believing the numbers of a run.

    Args:
        run: The run, without findings.
        latencies: Of good answers in seconds, in the order of time.
        lateness: Seconds that 99 % of the requests had to be sent within; says nothing in a closed loop.
        slo: The bound on latency.
    """
    yield from _sending(run, lateness)
    yield from _answers(run)
    yield from _steadiness(run, latencies)
    yield from _support(run, latencies, slo)


def _sending(run: Run, lateness: float) -> Iterator[Finding]:
    client = run.client
    busy = f"the busiest sender used {client.cpu_share:.0%} of a core"
    if run.open and run.lateness.p99 > lateness:
        words = (
            f"requests were sent late: 1% of them by more than {_ms(run.lateness.p99)}, where {_ms(lateness)} is allowed, "
            f"and the latest by {_ms(run.lateness.longest)}"
        )
        if client.waited:
            why = f"{client.waited} found all {client.connections} connections busy: allow more with --connections"
        elif client.cpu_share > _OWN_WORK:
            why = f"{busy}: lower the rate, or send with more --processes"
        else:
            why = f"{busy}, so other programs kept the processor from it: use an idle machine, or allow it with --lateness"
        yield Finding(kind="late", void=True, words=f"{words}; {why}")
    if client.cpu_share > BUSY:
        words = f"the load generator was saturated: {busy}"
        yield Finding(
            kind="saturated",
            void=False,
            words=words if run.open else f"{words}; the server can do at least what was measured, and perhaps more",
        )


def _answers(run: Run) -> Iterator[Finding]:
    counts = run.counts
    if not counts.ok:
        yield Finding(kind="unanswered", void=True, words=f"none of {counts.due} requests had a good answer")
        return
    kinds = {"shed": counts.shed, "timed out": counts.timeout, "refused": counts.error, "broken": counts.broken}
    failed = ", ".join(f"{count} {name}" for name, count in kinds.items() if count)
    if failed:
        words = f"of {counts.due} requests {failed}; latencies are of the {counts.ok} good answers alone"
        yield Finding(kind="failures", void=False, words=words)


def _steadiness(run: Run, latencies: Floats) -> Iterator[Finding]:
    if run.open and run.rate is not None and run.rate.high < _KEPT_UP * run.offered and run.counts.ok:
        words = f"the server fell behind: {run.offered:.4g} requests/s were offered, {run.rate.value:.4g} answered well"
        yield Finding(kind="behind", void=False, words=words)
    if len(latencies) >= 8 * 4:
        parts = np.array_split(latencies, min(_STRETCHES, len(latencies) // 4))
        change = drift(np.array([np.median(part) for part in parts]))
        if abs(change) > _DRIFT:
            way = "rose" if change > 0 else "fell"
            words = f"not stationary: the median latency {way} by {abs(change):.0%} of itself over the run"
            hint = (
                "a longer --warmup may help" if change < 0 else "the offered rate may be above what the server can do"
            )
            yield Finding(
                kind="drift", void=False, words=f"{words}; {hint if run.open or change < 0 else 'run it longer'}"
            )


def _support(run: Run, latencies: Floats, slo: Slo | None) -> Iterator[Finding]:
    if slo is None or not len(latencies):
        return
    found = next(one for one in run.percentiles if one.q == slo.percentile)
    if found.estimate is None:
        count = worth(latencies, slo.percentile)
        need = 100 * _SLOWER / (100 - slo.percentile)
        words = f"{len(latencies)} good answers are worth about {count:.0f} independent ones, and p{slo.percentile:g} needs "
        longer = f"{need:.0f}: a run of {math.ceil(run.seconds * need / count * 1.2)} s should do"
        yield Finding(kind="unsupported", void=False, words=words + longer)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
