"""Dynamic against static batching: two servers of our own, loaded in turns under the same bound.

Servers are started by the command line, as a user would, because this package knows no server.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import numpy as np

from narrowcast.errors import UserError
from narrowcast.load.arrivals import Poisson
from narrowcast.load.running import Load, workload_of
from narrowcast.load.scenarios import Answer, measure
from narrowcast.load.sender import Progress
from narrowcast.load.session import Measured, Session, Watch
from narrowcast.load.target import read_target
from narrowcast.measure.environment import environment
from narrowcast.measure.load.records import Records
from narrowcast.measure.load.summary import missed
from narrowcast.measure.load.values import Finding, LoadResult, Run, Slo
from narrowcast.measure.statistics import bootstrap_median

__all__ = ["KINDS", "compare_batching", "serving", "void_findings"]

#: Kinds of batching, the first compared with the second.
KINDS = ("dynamic", "static")
#: Runs of each at the rate that it holds, in turns.
_ROUNDS = 5
_END_SECONDS = 40.0


@dataclass(frozen=True)
class _Side:
    """One of the servers, connected, and what the search found of it."""

    session: Session
    answer: Answer


def compare_batching(
    place: Path, model: str, options: Sequence[str], load: Load, watch: Watch
) -> tuple[LoadResult, Records]:
    """Return the goodput of dynamic batching beside that of static batching, each at the largest rate that holds the bound.

    Args:
        place: An artifact, or a folder of models.
        model: Which one.
        options: Of ``narrowcast serve``, for both servers.
        load: What is asked: the server scenario with a bound.
        watch: Who is told how far it is.

    Raises:
        UserError: A server does not start, or holds the bound at no rate.
    """
    asked = load.settings.asked
    with ExitStack() as open_sides:
        sides: dict[str, _Side] = {}
        for kind in KINDS:
            url = open_sides.enter_context(serving(place, (*options, "--batching", kind)))
            session = Session(read_target(url), model, "", load.content, load.options, asked.seed)
            open_sides.enter_context(session)
            named = Watch(lambda name, kind=kind: watch.stage(f"{kind} batching, {name}"), watch.tick)
            sides[kind] = _Side(session, measure(session, load.settings, named))
            if sides[kind].answer.measured.interrupted:
                raise KeyboardInterrupt
        rounds, voided = _rounds(sides, load, watch)
        first = sides[KINDS[0]]
        chosen = rounds[KINDS[0]][-1]
        result = LoadResult(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            server=first.session.server(),
            workload=workload_of(first.session, load, "Poisson, each at the largest rate that holds the bound"),
            slo=asked.slo,
            run=chosen.run.model_copy(
                update={"findings": (*(one for one in chosen.run.findings if not one.void), *voided)}
            ),
            others={kind: rounds[kind][-1].run for kind in KINDS},
            gain=bootstrap_median(np.array([_goodput(one) / _goodput(other) for one, other in _pairs(rounds)])),
            protocol=(
                "dynamic against static batching: two servers of one artifact with equal options, the largest rate that holds "
                f"the bound sought for each, then {_ROUNDS} rounds of {asked.seconds:g} s of both at both rates in turns; the "
                "gain is the median of the ratios of goodput round by round, each at the larger rate that it held there, its "
                "interval a bootstrap over rounds"
            ),
            environment=environment(),
        )
    return result, chosen.records


def _rounds(sides: dict[str, _Side], load: Load, watch: Watch) -> tuple[dict[str, list[Measured]], list[Finding]]:
    """Return runs of both sides, in turns, each at the largest rate of the two that it holds there, and what voids any.

    The searches came one after the other, and the machine may have been busier in one of them; so both sides are run at both
    rates.

    Raises:
        UserError: One holds the bound at no rate, so that it has no goodput under it.
    """
    for kind, side in sides.items():
        if side.answer.confirmed is None:
            raise UserError(
                f"{kind} batching holds {load.settings.asked.slo} at no rate that was tried",
                next_step="allow more: --slo, or a shorter --delay among --serve",
            )

    def report(progress: Progress) -> bool:
        watch.tick(progress)
        return False

    rates = sorted({side.answer.confirmed for side in sides.values() if side.answer.confirmed is not None})
    found: dict[tuple[str, float], list[Measured]] = {(kind, rate): [] for rate in rates for kind in sides}
    for number in range(_ROUNDS):
        for (kind, rate), runs in found.items():
            watch.stage(f"round {number + 1} of {_ROUNDS}: {kind} batching, {rate:.4g} requests/s")
            asked = replace(load.settings.asked, seed=load.settings.asked.seed + 1000 + number)
            runs.append(sides[kind].session.open_loop(Poisson(rate), asked, report))
            if runs[-1].interrupted:
                raise KeyboardInterrupt
    slo = load.settings.asked.slo
    assert slo is not None
    chosen = {kind: found[kind, _held([found[kind, rate] for rate in rates], rates, slo)] for kind in sides}
    return chosen, void_findings(found)


def void_findings(rounds: Mapping[tuple[str, float], Sequence[Measured]]) -> list[Finding]:
    """Return what voids a round, whichever it is, since all of them have a part in the answer.

    Args:
        rounds: Runs by kind of batching and rate.
    """
    return [
        finding.model_copy(update={"words": f"round {number} of {kind} batching at {rate:.4g}/s: {finding.words}"})
        for (kind, rate), runs in rounds.items()
        for number, one in enumerate(runs, 1)
        for finding in one.run.findings
        if finding.void
    ]


def _held(runs: list[list[Measured]], rates: list[float], slo: Slo) -> float:
    """Return the largest rate at which all runs together hold the bound; the smallest where none does."""
    allowed = 1 - slo.percentile / 100
    held = [
        rate
        for rate, several in zip(rates, runs, strict=True)
        if np.concatenate([missed(one.counted, slo.seconds) for one in several]).mean() <= allowed
    ]
    return max(held, default=rates[0])


def _pairs(rounds: dict[str, list[Measured]]) -> list[tuple[Run, Run]]:
    return [(one.run, other.run) for one, other in zip(*(rounds[kind] for kind in KINDS), strict=True)]


def _goodput(run: Run) -> float:
    assert run.goodput is not None
    return max(run.goodput.value, 1e-9)


@contextmanager
def serving(place: Path, options: Sequence[str]) -> Generator[str]:
    """Start ``narrowcast serve`` on a free port, and yield its URL; it ends with the block.

    Raises:
        UserError: It does not start.
    """
    ports = ("--port", "0", "--grpc-port", "-1", "--metrics-port", "-1")
    command = [sys.executable, "-m", "narrowcast", "serve", str(place), *ports, "--log", "quiet", "--json", *options]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
        assert process.stdout is not None
        try:
            yield _listening(process.stdout, said, place)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def _listening(out: IO[str], errors: IO[str], place: Path) -> str:
    """Return where a server listens, from the JSON document that it prints first."""
    text = ""
    for line in out:
        text += line
        if line.rstrip() == "}":
            break
    document = json.loads(text) if text else {}
    if "listening" in document:
        return document["listening"]["http"]
    errors.seek(0)
    why = document.get("error", {}).get("message") or errors.read().strip()[-500:] or "it says nothing"
    raise UserError(f"narrowcast serve {place} does not start: {why}")
