"""Records of requests as numbers: rates, latencies, goodput, and the course of the run."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from narrowcast.measure.load.checks import findings
from narrowcast.measure.load.estimates import BLOCKS, mean, quantile, share
from narrowcast.measure.load.records import Outcome, Records
from narrowcast.measure.load.values import Bin, Client, Counts, Energy, Lateness, Percentile, Run, Slo
from narrowcast.measure.statistics import CONFIDENCE, Estimate

__all__ = ["Span", "missed", "summarise", "window"]

Floats = NDArray[np.float64]

_PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
#: Points of the percentile curve for each decade of the share that is slower, and decades.
_POINTS, _DECADES = 6, 5
#: Stretches that the course of a run is cut into.
_BINS = 100
_SLOW = 99.0


@dataclass(frozen=True)
class Span:
    """The seconds of a run: those that warm up, all, and how requests were sent.

    Attributes:
        warmup: Seconds that do not count.
        end: Seconds after the start when the last request was due.
        lateness: Seconds that 99 % of the requests have to be sent within.
        concurrency: Requests under way together, in a closed loop; None in an open one.
        bound: Seconds after which a request has missed, answered or not; infinite without a bound.
    """

    warmup: float
    end: float
    lateness: float
    concurrency: int | None = None
    bound: float = math.inf


def summarise(records: Records, span: Span, client: Client, energy: Energy, slo: Slo | None) -> Run:
    """Return what records say.

    Args:
        records: All of a run, in the order in which requests were due.
        span: What of them counts.
        client: How the load generator fared.
        energy: What the run took.
        slo: The bound on latency.
    """
    counted = window(records, span)
    good = counted[counted["outcome"] == Outcome.OK]
    latencies = query_latencies(counted)
    seconds = span.end - span.warmup
    run = Run(
        open=span.concurrency is None,
        offered=len(counted) / seconds,
        concurrency=span.concurrency,
        warmup=span.warmup,
        seconds=seconds,
        counts=_counts(counted),
        statuses=_statuses(counted),
        rate=_rate(records, span, np.inf),
        rows_rate=_rows(records, span) / seconds,
        goodput=None if slo is None else _rate(_as_queries(records), span, slo.seconds),
        within=None if slo is None else _within(counted, slo.seconds),
        mean=mean(latencies),
        percentiles=tuple(Percentile(q=q, estimate=quantile(latencies, q)) for q in _asked(slo)),
        curve=tuple(_curve(latencies)),
        unloaded=float(np.median(good["done"] - good["sent"])) if len(good) else None,
        bins=tuple(_bins(records, span.end)),
        lateness=_lateness(counted),
        client=client,
        findings=(),
        energy=energy,
    )
    return run.model_copy(update={"findings": tuple(findings(run, latencies, span.lateness, slo))})


def window(records: Records, span: Span) -> Records:
    """Return the records of requests that count: those due after the warm-up.

    What an interruption cut off counts only where it had waited past the bound by then: it has missed it, whatever came later.
    """
    due = records["intended"]
    open_still = (_as_queries(records)["outcome"] == Outcome.CUT) & (span.end - due <= span.bound)
    return records[(due >= span.warmup) & (due < span.end) & ~open_still]


def query_latencies(counted: Records) -> Floats:
    """Return a latency for each query all of whose answers are good, in the order in which they were due.

    It lasts from when the query was due to its last answer.
    """
    queries = _queries(counted)
    good = queries[queries["outcome"] == Outcome.OK]
    return good["done"] - good["intended"]


def missed(counted: Records, bound: float) -> Floats:
    """Return 1 for each query without good answers alone within a bound, 0 for the others, in the order of being due."""
    queries = _queries(counted)
    late = ~((queries["outcome"] == Outcome.OK) & (queries["done"] - queries["intended"] <= bound))
    return late.astype(np.float64)


def _as_queries(records: Records) -> Records:
    """Return records in which each request ends when, and as, the last or the worst of its query does."""
    order = np.argsort(records["query"], kind="stable")
    starts = np.flatnonzero(np.diff(records["query"][order], prepend=-1))
    if len(starts) == len(records):
        return records
    sizes = np.diff(starts, append=len(records))
    found = records.copy()
    for name in ("done", "outcome"):
        found[name][order] = np.repeat(np.maximum.reduceat(records[name][order], starts), sizes)
    return found


def _queries(records: Records) -> Records:
    """Return a record for each query, in the order of being due, whichever process has sent it."""
    firsts = np.unique(records["query"], return_index=True)[1]
    found = _as_queries(records)[firsts]
    return found[np.argsort(found["intended"], kind="stable")]


def _within(counted: Records, bound: float) -> Estimate:
    found = share(missed(counted, bound))
    return Estimate(1 - found.value, 1 - found.high, 1 - found.low, found.samples)


def _asked(slo: Slo | None) -> list[float]:
    return sorted({*_PERCENTILES, *(() if slo is None else (slo.percentile,))})


def _counts(counted: Records) -> Counts:
    ended = Counter(counted["outcome"].tolist())
    return Counts(due=len(counted), **{outcome.name.lower(): ended[outcome] for outcome in Outcome})


def _statuses(counted: Records) -> dict[str, int]:
    found = Counter(counted["status"].tolist())
    return {str(status): count for status, count in sorted(found.items()) if status >= 0}


def _lateness(counted: Records) -> Lateness:
    sent = counted["sent"]
    late = np.where(np.isnan(sent), counted["done"], sent) - counted["intended"]  # never sent: late until given up
    late = late[np.isfinite(late)]
    if not len(late):
        return Lateness(median=0.0, p99=0.0, longest=0.0)
    return Lateness(median=float(np.median(late)), p99=float(np.percentile(late, 99)), longest=float(late.max()))


def _rate(records: Records, span: Span, bound: float) -> Estimate | None:
    """Return the good answers within a bound that came per second, with its interval over stretches of the run."""
    good = (records["outcome"] == Outcome.OK) & (records["done"] - records["intended"] <= bound)
    done = records["done"][good]
    seconds = span.end - span.warmup
    blocks = min(BLOCKS, max(2, int(len(done) / 10)))
    counts = np.histogram(done, blocks, (span.warmup, span.end))[0] / (seconds / blocks)
    middle = float(counts.mean())
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, blocks - 1) * counts.std(ddof=1)) / math.sqrt(blocks)
    return Estimate(middle, max(0.0, middle - half), middle + half, len(done))


def _rows(records: Records, span: Span) -> int:
    done = (records["outcome"] == Outcome.OK) & (records["done"] >= span.warmup) & (records["done"] < span.end)
    return int(records["rows"][done].sum())


def _curve(latencies: Floats) -> list[Percentile]:
    """Return percentiles at equal distances on a log axis of the share that is slower, as far as they are supported."""
    points: list[Percentile] = []
    for step in range(1, _POINTS * _DECADES + 1):
        q = 100 * (1 - 10 ** (-step / _POINTS))
        found = quantile(latencies, q)
        if found is None:
            break
        points.append(Percentile(q=q, estimate=found))
    return points


def _bins(records: Records, end: float) -> list[Bin]:
    edges = np.linspace(0.0, end, min(_BINS, max(4, len(records) // 10)) + 1)
    width = float(edges[1])
    good = records["outcome"] == Outcome.OK
    offered = np.histogram(records["intended"], edges)[0] / width
    ok = np.histogram(records["done"][good], edges)[0] / width
    failed = np.histogram(records["done"][~good & (records["outcome"] != Outcome.CUT)], edges)[0] / width
    mine = records[good]
    cuts = np.searchsorted(mine["intended"], edges)
    bins: list[Bin] = []
    for place in range(len(edges) - 1):
        part = mine[cuts[place] : cuts[place + 1]]
        latencies = part["done"] - part["intended"]
        slow = _SLOW if len(part) >= 100 else 100.0
        bins.append(
            Bin(
                start=float(edges[place]),
                offered=float(offered[place]),
                ok=float(ok[place]),
                failed=float(failed[place]),
                median=float(np.median(latencies)) if len(part) else None,
                slow=float(np.percentile(latencies, slow)) if len(part) else None,
            )
        )
    return bins
