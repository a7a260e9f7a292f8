"""What a load found, on a terminal: the answer first, then what to doubt, then the numbers."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from narrowcast.measure.load.values import LoadResult, Run
from narrowcast.report import text
from narrowcast.report.load_words import (
    about,
    batching_words,
    energy_words,
    estimate_words,
    headline,
    holds,
    outcome_rows,
    percentile_name,
    probe_words,
)
from narrowcast.report.screen import QUIET, Say, new_table, sayer

__all__ = ["render_load_terminal"]


def render_load_terminal(result: LoadResult, console: Console) -> None:
    """Print what a load found; symbols go where the terminal has no Unicode.

    Args:
        result: What was found.
        console: Where to print.
    """
    say = sayer(console)
    mark, style = {True: ("✓", "green"), False: ("✗", "red"), None: ("–", "yellow")}[holds(result)]
    console.print(say(f"{mark} {headline(result)}", f"bold {style}"))
    console.print(say(about(result), QUIET))
    for finding in result.run.findings:
        console.print(
            say(f"{'Void' if finding.void else 'Note'}: {finding.words}", "red" if finding.void else "yellow")
        )
    if not result.others:
        console.print(_latencies(result.run, say))
    console.print(_outcomes(result.run, say))
    for name, run in result.others.items():
        console.print(say(f"{batching_words(name)} at {text.quantity(run.offered, '/s')}", "bold"))
        console.print(_latencies(run, say))
    if result.gains:
        console.print(_gains(result, say))
    if result.probes:
        console.print(_probes(result, say))
    for line in _facts(result):
        console.print(Padding(say(line, QUIET), (0, 0, 0, 0)))


def _latencies(run: Run, say: Say) -> Table:
    table = new_table()
    for name in ("latency", "", "95% interval"):
        table.add_column(name, justify="right" if not name else "left", no_wrap=True)
    for one in run.percentiles:
        value, span = estimate_words(one.estimate, "s")
        table.add_row(say(percentile_name(one.q)), say(value), say(span or "not supported by so few answers", QUIET))
    value, span = estimate_words(run.mean, "s")
    table.add_row(say("mean"), say(value), say(span, QUIET))
    return table


def _outcomes(run: Run, say: Say) -> Table:
    table = new_table()
    table.add_column("requests")
    table.add_column("", justify="right")
    table.add_column("share", justify="right")
    for words, count, share in outcome_rows(run):
        table.add_row(say(words), say(count), say(share, QUIET))
    return table


def _gains(result: LoadResult, say: Say) -> Table:
    table = new_table()
    for name in ("goodput", "", "95% interval", "gain", "95% interval"):
        table.add_column(name, justify="right" if name in ("", "gain") else "left", no_wrap=True)
    for name, found in result.goodputs.items():
        value, span = estimate_words(found, "/s")
        gain = result.gains.get(name)
        ratio = ("", "") if gain is None else (text.ratio(gain.value), text.interval(gain.low, gain.high, text.ratio))
        table.add_row(say(batching_words(name)), say(value), say(span, QUIET), say(ratio[0]), say(ratio[1], QUIET))
    return table


def _probes(result: LoadResult, say: Say) -> Table:
    table = new_table()
    for name in ("rate", "requests", "missed", "95% interval", "verdict"):
        table.add_column(name, justify="left" if name == "verdict" else "right", no_wrap=True)
    styles = {"held": "green", "missed": "red", "unclear": "yellow", "void": QUIET}
    for probe in result.probes:
        table.add_row(
            say(text.number(probe.rate)),
            say(text.integer(probe.requests)),
            say(text.part(probe.missed.value)),
            say(
                text.interval(probe.missed.low, probe.missed.high, lambda value, extra: text.share(value, extra)), QUIET
            ),
            say(probe_words(probe), styles[probe.verdict]),
        )
    return table


def _facts(result: LoadResult) -> Iterator[str]:
    run = result.run
    value, span = estimate_words(run.rate, "/s")
    offered = f", {text.quantity(run.offered, '/s')} offered" if run.open else ""
    yield f"throughput  {value} ({span}){offered}; {text.quantity(run.rows_rate, 'rows/s')}"
    if run.goodput is not None and result.slo is not None:
        value, span = estimate_words(run.goodput, "/s")
        yield f"goodput     {value} ({span}) within {text.quantity(result.slo.seconds, 's')}"
    if result.recovery is not None:
        yield f"recovery    {result.recovery.definition}"
    if result.server.security:
        yield f"connection  {result.server.security}"
    client = run.client
    late = f"; sent late by {text.quantity(run.lateness.p99, 's')} (p99)" if run.open else ""
    yield (
        f"client      {client.processes} process{'es' if client.processes > 1 else ''}, {text.share(client.cpu_share)} of a "
        f"core, {client.connections} connections, loop lag {text.quantity(client.lag, 's')} (p99){late}"
    )
    yield f"energy      {energy_words(run.energy)}"
    yield f"protocol    {result.protocol}; intervals are at 95% and allow for requests that wait for each other"
