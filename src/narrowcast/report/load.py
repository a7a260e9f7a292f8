"""What a load found, as one HTML page that needs nothing else: no network, no script, no font."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from narrowcast._version import __version__
from narrowcast.measure.load.values import LoadResult, Run
from narrowcast.report import text
from narrowcast.report.load_plots import course, percentiles, search
from narrowcast.report.load_words import (
    batching_words,
    energy_words,
    estimate_words,
    headline,
    holds,
    keys,
    outcome_rows,
    percentile_name,
    probe_words,
)
from narrowcast.report.page import template

__all__ = ["render_load"]

_WIDE, _NARROW = 860, 400

Facts = list[tuple[str, str]]


@dataclass(frozen=True)
class _Row:
    """A percentile: its name, and value and interval of each run."""

    name: str
    cells: list[tuple[str, str]]


def render_load(result: LoadResult) -> str:
    """Return what a load found as a self-contained HTML page.

    Args:
        result: Everything that the page shows.
    """
    run = result.run
    runs = {result.workload.scenario: run, **result.others} if not result.others else result.others
    context: dict[str, Any] = {
        "result": result,
        "headline": headline(result),
        "holds": holds(result),
        "badge": _badge(result),
        "findings": run.findings,
        "keys": keys(result),
        "names": [batching_words(name) for name in runs] if result.others else ["Value"],
        "latencies": _latencies(list(runs.values())),
        "outcomes": outcome_rows(run),
        "failed": any(one.failed for one in run.bins),
        "tries": [_try(probe) for probe in result.probes],
        "details": [
            ("Server and requests", _subject(result)),
            ("The load generator", _client(result)),
            ("This machine", _machine(result)),
        ],
        "version": __version__,
        "created": text.when(result.created),
    }
    marks = _marks(result)
    context |= _both("search", lambda name, width: search(result, name=name, width=width))
    context |= _both("percentiles", lambda name, width: percentiles(runs, result.slo, name=name, width=width))
    if run.counts.ok and len(run.bins) > 1:
        context |= _both("course", lambda name, width: course(run, result.slo, name=name, marks=marks, width=width))
    else:
        context |= {"course_wide": Markup(), "course_narrow": Markup()}
    return template("load.html.j2", text.label, capitalize_first).render(context)


def _badge(result: LoadResult) -> str:
    if result.run.void:
        return "✗ void"
    good, bad = ("recovered", "not recovered") if result.recovery is not None else ("holds", "missed")
    return {True: f"✓ {good}", False: f"✗ {bad}", None: ""}[holds(result)]


def capitalize_first(words: str) -> str:
    """Return words with a capital at their beginning, the rest as it is."""
    return words[:1].upper() + words[1:]


def _both(name: str, draw: Callable[[str, int], str]) -> dict[str, Markup]:
    """Return a picture in two widths."""
    return {
        f"{name}_wide": Markup(draw(f"{name}-wide", _WIDE)),
        f"{name}_narrow": Markup(draw(f"{name}-narrow", _NARROW)),
    }


def _marks(result: LoadResult) -> list[tuple[float, str]]:
    found = result.recovery
    if found is None:
        return []
    end = found.before + found.during
    marks = [(found.before, "overload begins"), (end, "ends")]
    return marks if found.seconds is None else [*marks, (end + found.seconds, "recovered")]


def _latencies(runs: list[Run]) -> list[_Row]:
    rows: list[_Row] = []
    for place, one in enumerate(runs[0].percentiles):
        cells = [estimate_words(run.percentiles[place].estimate, "s") for run in runs]
        rows.append(_Row(percentile_name(one.q), [(value, span or "not supported") for value, span in cells]))
    return [*rows, _Row("mean", [estimate_words(run.mean, "s") for run in runs])]


def _try(probe: Any) -> tuple[str, str, str, str, str]:
    return (
        text.number(probe.rate),
        text.integer(probe.requests),
        text.part(probe.missed.value),
        text.interval(probe.missed.low, probe.missed.high, text.share),
        probe_words(probe),
    )


def _subject(result: LoadResult) -> Facts:
    server, work = result.server, result.workload
    mixed = len(work.batches) > 1
    return [
        ("Server", f"{server.name} {server.version} at {server.url}"),
        ("Connections", server.security or "not encrypted"),
        (
            "Model",
            f"{server.model} {server.model_version}".rstrip() + (f" ({server.platform})" if server.platform else ""),
        ),
        ("Inputs", ", ".join(server.inputs)),
        ("Scenario", work.scenario),
        ("Arrivals", work.arrivals or "closed loop"),
        ("Data", f"{work.data}, seed {work.seed}"),
        ("Encoding", work.encoding),
        *([("Headers", f"{', '.join(work.headers)}; what they hold is not kept")] if work.headers else []),
        (
            "Rows of a request",
            ", ".join(f"{size}" + (f" ({text.share(share)})" if mixed else "") for size, share in work.batches.items()),
        ),
        ("Bytes of a request", ", ".join(text.quantity(size, "bytes") for size in work.bytes)),
        ("Given up after", text.quantity(work.timeout, "s")),
        ("Rows per second", text.quantity(result.run.rows_rate, "")),
        ("Energy", energy_words(result.run.energy)),
    ]


def _client(result: LoadResult) -> Facts:
    run = result.run
    client = run.client
    facts = [
        ("Processes", str(client.processes)),
        ("CPU of the busiest", f"{text.share(client.cpu_share)} of a core"),
        ("Event loop woke up late by", f"{text.quantity(client.lag, 's')} (p99)"),
        ("Connections", f"{client.connections} at most together, {result.workload.connections} allowed"),
    ]
    if run.open:
        late = run.lateness
        facts += [
            (
                "Requests were sent late by",
                f"{text.quantity(late.median, 's')} (median), {text.quantity(late.p99, 's')} (p99), "
                f"{text.quantity(late.longest, 's')} (the latest)",
            ),
            ("Void if p99 of that is above", text.quantity(result.workload.lateness, "s")),
        ]
    if run.unloaded is not None:
        facts.append(("Median from sending to answer", text.quantity(run.unloaded, "s")))
    return facts


def _machine(result: LoadResult) -> Facts:
    found = result.environment
    return [
        ("Processor", found.processor),
        ("Cores", str(found.cores)),
        ("Load average", text.number(found.load)),
        ("System", found.system),
        ("Versions", ", ".join(f"{name} {version}" for name, version in found.versions.items())),
    ]
