"""What a load found in words: for the terminal and the page alike."""

from __future__ import annotations

from narrowcast.measure.load.values import Energy, LoadResult, Probe, Run, Slo
from narrowcast.measure.statistics import Estimate
from narrowcast.report import text

__all__ = [
    "Key",
    "about",
    "batching_words",
    "energy_words",
    "estimate_words",
    "headline",
    "holds",
    "keys",
    "outcome_rows",
    "percentile_name",
    "probe_words",
]

#: Name, value and detail of a number.
Key = tuple[str, str, str]

_OUTCOMES = {
    "ok": "good answers",
    "shed": "shed, for overload",
    "timeout": "timed out",
    "error": "refused otherwise",
    "broken": "broken, without an answer",
    "cut": "cut off by the interruption",
}


def holds(result: LoadResult) -> bool | None:
    """Return whether the bound holds, or the server recovered; None without one, interrupted, or where noise leaves it open."""
    if result.interrupted:
        return None
    if result.run.void:
        return False
    if result.gains:
        return None
    if result.workload.scenario == "server":
        return result.confirmed is not None
    if result.recovery is not None:
        return result.recovery.seconds is not None
    if result.slo is None or result.run.within is None:
        return None
    wanted = result.slo.percentile / 100
    return None if result.run.within.low < wanted <= result.run.within.high else result.run.within.low >= wanted


def headline(result: LoadResult) -> str:
    """Return the answer in a sentence."""
    run, slo = result.run, result.slo
    if result.interrupted:
        return _interrupted(result)
    if run.void:
        return f"Void: {next(finding.words for finding in run.findings if finding.void)}."
    if result.gains:
        return _gain(result)
    if result.workload.scenario == "server":
        return _largest(result)
    if result.recovery is not None:
        if result.recovery.seconds is None:
            return (
                f"At {_rate(result.recovery.overload)} the server was overloaded, and did not recover within the run."
            )
        return (
            f"The server recovers within {text.quantity(max(result.recovery.seconds, 1e-3), 's')} of an overload of "
            f"{_rate(result.recovery.overload)}."
        )
    if not run.open:
        answered = _rate(run.rate.value) if run.rate else text.MISSING
        if result.workload.scenario in ("single-stream", "multi-stream"):
            q = 90.0 if result.workload.scenario == "single-stream" else 99.0
            return f"{_latency(run, q)} for {'a request' if q == 90.0 else 'a query'} after the other, {answered}."
        return f"{answered} with {run.concurrency} requests under way."
    if slo is None or run.within is None:
        return f"{_latency(run, 99.0)} at {_rate(run.offered)}."
    verb = {True: "holds", False: "is missed", None: "may hold or not"}[holds(result)]
    within = text.interval(run.within.low, run.within.high, lambda value, extra: text.share(value, extra))
    return f"{_bound(slo)} {verb} at {_rate(run.offered)}: {within} of the requests are within it."


def _interrupted(result: LoadResult) -> str:
    if result.workload.scenario == "server":
        return "Interrupted before the largest rate was found."
    if result.workload.scenario == "stress":
        return "Interrupted before it could be seen whether the server recovers."
    counts = result.run.counts
    return (
        f"Interrupted: {text.integer(counts.ok)} of {text.integer(counts.due)} requests had a good answer until then."
    )


def _largest(result: LoadResult) -> str:
    assert result.slo is not None
    if result.confirmed is None:
        return f"{_bound(result.slo)} holds at no rate that was tried."
    if result.largest is None:
        return f"{_bound(result.slo)} holds at {_rate(result.confirmed)} at the least; more could not be tried."
    return f"{_bound(result.slo)} holds up to {_rate(result.confirmed)}."


def _gain(result: LoadResult) -> str:
    assert result.slo is not None
    first = next(iter(result.goodputs))
    parts = [
        f"no more goodput beyond noise than {batching_words(name)}"
        if text.tie(gain.low, gain.high)
        else f"{text.ratio(gain.value)} the goodput of {batching_words(name)}"
        for name, gain in result.gains.items()
    ]
    rates = ", ".join(f"{_rate(found.value)} {name}" for name, found in result.goodputs.items())
    return f"{first.capitalize()} batching has {' and '.join(parts)} under {_bound(result.slo)}: {rates}."


def batching_words(kind: str) -> str:
    """Return a kind of batching as people say it."""
    return "no batching" if kind == "none" else f"{kind} batching"


def _bound(slo: Slo) -> str:
    return f"p{slo.percentile:g} ≤ {text.quantity(slo.seconds, 's')}"


def _rate(value: float) -> str:
    return f"{text.number(value) if value < 1000 else text.integer(value)} requests/s"


def _latency(run: Run, q: float) -> str:
    for one in reversed(run.percentiles):
        if one.q <= q and one.estimate is not None:
            return f"{percentile_name(one.q)} is {text.quantity(one.estimate.value, 's')}"
    return "No percentile of latency is supported by so few answers"


def percentile_name(q: float) -> str:
    """Return p99 for 99."""
    return f"p{q:g}"


def estimate_words(found: Estimate | None, unit: str) -> tuple[str, str]:
    """Return an estimate and its interval; dashes where there is none."""
    if found is None:
        return text.MISSING, ""
    return text.quantity(found.value, unit), text.interval(
        found.low, found.high, lambda value, extra: text.quantity(value, unit, extra)
    )


def about(result: LoadResult) -> str:
    """Return who was asked what, on a line."""
    server, work = result.server, result.workload
    rows = ", ".join(
        f"{size}" + (f" ({text.share(share)})" if len(work.batches) > 1 else "") for size, share in work.batches.items()
    )
    name = f"{server.model} {server.model_version}".rstrip()
    who = f"{name} on {server.name or 'a server'} {server.version}".rstrip()
    sizes = " to ".join(text.quantity(size, "bytes") for size in sorted({min(work.bytes), max(work.bytes)}))
    return f"{who} at {server.url}; {work.data} inputs, batch {rows}, {work.encoding}, {sizes} a request"


def keys(result: LoadResult) -> list[Key]:
    """Return the numbers that matter most."""
    run, found = result.run, list[Key]()
    if result.gains:
        for name, gain in result.gains.items():
            span = text.interval(gain.low, gain.high, text.ratio)
            found.append((f"Goodput, over {batching_words(name)}", text.ratio(gain.value), span))
        for name, goodput in result.goodputs.items():
            value, span = estimate_words(goodput, "/s")
            found.append((f"Goodput, {batching_words(name)}", value, span))
        return found
    if result.largest is not None:
        value, span = estimate_words(result.largest, "/s")
        found.append(("Largest rate", value, f"{span}, where an isotonic fit of all tries crosses the bound"))
    elif run.rate is not None:
        value, span = estimate_words(run.rate, "/s")
        found.append(
            ("Good answers", value, f"{span}; {text.quantity(run.offered, '/s')} offered" if run.open else span)
        )
    for q in (50.0, 99.0):
        one = next(one for one in run.percentiles if one.q == q)
        value, span = estimate_words(one.estimate, "s")
        found.append((f"Latency {percentile_name(q)}", value, span or "not supported by so few answers"))
    if run.goodput is not None and result.slo is not None and len(found) < 4:
        value, span = estimate_words(run.goodput, "/s")
        found.append(("Goodput", value, f"{span}, good answers within {text.quantity(result.slo.seconds, 's')}"))
    return found


def outcome_rows(run: Run) -> list[tuple[str, str, str]]:
    """Return how requests ended: kind, count, and share of those that were due."""
    counts = run.counts.model_dump()
    return [
        (words, text.integer(counts[name]), text.part(counts[name] / counts["due"]) if counts["due"] else text.MISSING)
        for name, words in _OUTCOMES.items()
        if counts[name] or name == "ok"
    ]


def energy_words(energy: Energy) -> str:
    """Return the energy of a request, or why it is not known."""
    if energy.unavailable:
        return energy.unavailable
    total = ", ".join(f"{name} {text.quantity(joules, 'J')}" for name, joules in energy.joules.items())
    each = text.quantity(energy.per_request, "J") if energy.per_request is not None else text.MISSING
    return f"{each} a good answer, idle parts and other programs included ({total})"


def probe_words(probe: Probe) -> str:
    """Return what became of a try."""
    parts = [*([batching_words(probe.kind)] if probe.kind else []), probe.verdict]
    return ", ".join([*parts, *(["confirming"] if probe.confirming else [])])
