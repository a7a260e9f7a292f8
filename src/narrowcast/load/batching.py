"""Dynamic batching against static batching and none: servers of our own, loaded in turns under the same bound.

Servers are started by the command line, as a user would, because this package knows no server.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from narrowcast.errors import RuntimeFailedError, UserError
from narrowcast.load.arrivals import Poisson
from narrowcast.load.running import Load, workload_of
from narrowcast.load.scenarios import Guard, most_missed, told
from narrowcast.load.search import verdict
from narrowcast.load.session import Asked, Measured, Session, Watch
from narrowcast.load.stairs import Compared, Stair, Step, compare_steps
from narrowcast.load.target import read_target
from narrowcast.measure.environment import environment
from narrowcast.measure.load.estimates import share
from narrowcast.measure.load.records import Records, empty_records
from narrowcast.measure.load.summary import missed
from narrowcast.measure.load.values import Finding, LoadResult, Probe, Slo

__all__ = ["KINDS", "Side", "compare_batching", "options_of", "serving", "void_findings"]

#: Kinds of batching, the first compared with the others.
KINDS = ("dynamic", "static", "none")
#: Rounds, in each of which each kind is tried once; of so many at the least it has to be known whether the bound held.
_ROUNDS, _FEWEST = 12, 8
#: Streams and seconds of the closed loop that says where a kind begins, and the share of its rate that it begins at.
_STREAMS, _GLANCE, _BEGIN = 32, 1.0, 0.5
#: Requests of a try at the least for each one that may miss the bound, for as long as three times the seconds asked for.
_MISSES, _LONGEST = 1, 3
_END_SECONDS = 40.0


@dataclass
class Side:
    """One of the servers, connected, and what was seen of it.

    Attributes:
        kind: How it batches.
        session: The connection.
        stair: The rate to try next.
        steps: Tries that count.
        probes: All tries.
        runs: Of the tries that count.
    """

    kind: str
    session: Session
    stair: Stair
    steps: list[Step] = field(default_factory=list[Step])
    probes: list[Probe] = field(default_factory=list[Probe])
    runs: list[Measured] = field(default_factory=list[Measured])

    @property
    def chosen(self) -> Measured:
        """The run at the largest rate that held the bound no more often than not did; the lowest where none held."""
        known = list(zip(self.steps, self.runs, strict=True))
        held = [pair for pair in known if pair[0].held]
        if not held:
            return min(known, key=lambda pair: pair[0].rate)[1]
        middle = sorted(held, key=lambda pair: pair[0].rate)
        return middle[(len(middle) - 1) // 2][1]


def compare_batching(
    place: Path, model: str, options: Sequence[str], load: Load, watch: Watch
) -> tuple[LoadResult, Records]:
    """Return the goodput of dynamic batching beside that of static batching and of none, all under the same bound.

    Args:
        place: An artifact, or a folder of models.
        model: Which one.
        options: Of ``narrowcast serve``, for all servers.
        load: What is asked: the server scenario with a bound.
        watch: Who is told how far it is.

    Raises:
        UserError: A server does not start, or batching says nothing about the model.
    """
    with ExitStack() as open_sides:
        sides: list[Side] = []
        for kind in KINDS:
            url = open_sides.enter_context(serving(place, options_of(kind, options)))
            session = Session(read_target(url), model, "", load.content, load.options, load.settings.asked.seed)
            open_sides.enter_context(session)
            _check_batching(session, kind)
            sides.append(Side(kind, session, Stair(_first_rate(session, kind, load, watch))))
        ended = _rounds(sides, load, watch)
        return _result(sides, load, ended), _records(sides)


def options_of(kind: str, options: Sequence[str]) -> list[str]:
    """Return what ``narrowcast serve`` is given for a kind of batching; what is said last counts."""
    if kind == "none":
        alone = ("--batching", "dynamic", "--max-batch", "1", "--delay", "0", "--preferred", "")
        return [*(one for one in options if one != "--pad"), *alone]
    return [*options, "--batching", kind]


def _check_batching(session: Session, kind: str) -> None:
    """Make sure that a server batches as it was started to.

    Raises:
        UserError: It does not.
    """
    largest = session.known.largest_batch
    if largest == 0 and kind != "none":
        raise UserError(
            f"model {session.known.model!r} has no batch axis, so that batching makes no difference",
            allowed="a model whose first axis is open",
        )
    if kind == "none" and largest not in (0, 1, None):
        raise UserError(
            f"model {session.known.model!r} has batches of {largest} rows by settings of its own, whatever --serve says",
            next_step="take them out of its serving.json",
        )


def _first_rate(session: Session, kind: str, load: Load, watch: Watch) -> float:
    if load.settings.rate is not None:
        return load.settings.rate
    watch.stage(f"{kind} batching: its capacity in a closed loop of {_STREAMS}")
    asked = replace(load.settings.asked, seconds=_GLANCE, warmup=min(0.3, load.settings.asked.warmup))
    streams = min(_STREAMS, load.options.connections)
    glance = session.closed_loop(streams, 1, asked, told(watch))
    if glance.interrupted:
        raise KeyboardInterrupt
    return max(1.0, _BEGIN * glance.run.rate.value) if glance.run.rate is not None else 1.0


def _rounds(sides: Sequence[Side], load: Load, watch: Watch) -> Finding | None:
    """Try all sides in turns, and return what ended that early.

    Raises:
        KeyboardInterrupt: Before anything was measured.
    """
    try:
        for number in range(_ROUNDS):
            turn = number % len(sides)  # who comes first changes
            for side in (*sides[turn:], *sides[:turn]):
                _try(side, number, load, watch)
    except KeyboardInterrupt:
        if not all(side.runs for side in sides):
            raise
        words = f"interrupted after {min(len(side.runs) for side in sides)} of {_ROUNDS} rounds"
        return Finding(kind="interrupted", void=False, words=words)
    except (UserError, RuntimeFailedError) as error:  # a server or a sender has died
        if not all(side.runs for side in sides):
            raise
        return Finding(kind="gone", void=True, words=f"it came to an end too early: {error.what}")
    return None


def _try(side: Side, number: int, load: Load, watch: Watch) -> None:
    """Run a side at its rate, and once more where the load generator failed."""
    slo = load.settings.asked.slo
    assert slo is not None
    for again in range(2):
        rate = side.stair.rate
        watch.stage(f"round {number + 1} of {_ROUNDS}: {side.kind} batching, {rate:.4g} requests/s")
        asked = _asked(load.settings.asked, slo, rate, 2 * number + again)
        guard = Guard(slo.seconds, asked.warmup, most_missed(slo, rate * asked.seconds), watch)
        measured = side.session.open_loop(Poisson(rate), asked, guard)
        if measured.interrupted:
            raise KeyboardInterrupt
        probe, held = _judged(measured, slo, rate, ended=guard.ended)
        side.probes.append(probe.model_copy(update={"kind": side.kind}))
        if probe.verdict != "void":
            side.steps.append(Step(number, rate, held))
            side.runs.append(measured)
            side.stair.take(held)
            return


def _asked(asked: Asked, slo: Slo, rate: float, number: int) -> Asked:
    needed = _MISSES / (1 - slo.percentile / 100) / rate
    seconds = min(max(asked.seconds, needed), _LONGEST * asked.seconds)
    return replace(asked, seconds=seconds, seed=asked.seed + number)


def _judged(measured: Measured, slo: Slo, rate: float, *, ended: bool) -> tuple[Probe, bool]:
    """Return a try, and whether the bound held in it."""
    late = any(finding.kind == "late" for finding in measured.run.findings)
    lost = missed(measured.counted, slo.seconds)
    found = share(lost)
    held = not ended and bool(len(lost)) and found.value <= 1 - slo.percentile / 100
    said = "void" if late else verdict(found, 1 - slo.percentile / 100, ended=ended)
    return Probe(rate=rate, requests=len(lost), missed=found, verdict=said), held


def _result(sides: Sequence[Side], load: Load, ended: Finding | None) -> LoadResult:
    asked = load.settings.asked
    first = sides[0]
    compared = compare_steps({side.kind: side.steps for side in sides}) if all(side.steps for side in sides) else None
    interrupted = ended is not None and ended.kind == "interrupted"
    told = [*([] if ended is None else [ended]), *([] if interrupted else void_findings(sides, asked.slo))]
    run = first.chosen.run if first.runs else None
    if run is None:
        raise UserError(
            "the load generator kept its times in no try of dynamic batching, so that there is nothing to compare",
            next_step="use an idle machine, or allow more with --lateness",
        )
    found = compared or Compared({}, {})
    return LoadResult(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        server=first.session.server(),
        workload=workload_of(first.session, load, "Poisson, each at the rates that it is sought at"),
        slo=asked.slo,
        run=run.model_copy(update={"findings": (*(one for one in run.findings if not one.void), *told)}),
        others={side.kind: side.chosen.run for side in sides if side.runs},
        probes=tuple(probe for side in sides for probe in side.probes),
        goodputs=found.rates,
        gains=found.ratios,
        protocol=(
            f"{', '.join(KINDS[:-1])} batching and none: servers of one artifact with otherwise equal options; "
            f"{_ROUNDS} rounds in "
            f"which each is tried once, Poisson arrivals for at least {asked.seconds:g} s after {asked.warmup:g} s of warm-up, "
            "its rate raised when the bound held and lowered when it was missed; goodput is the rate at which a try holds "
            "the bound as often as not (isotonic fit), ratios are taken within the same rounds, intervals come from a "
            "bootstrap over rounds"
        ),
        environment=environment(),
        interrupted=interrupted,
    )


def void_findings(sides: Sequence[Side], slo: Slo | None) -> list[Finding]:
    """Return why a comparison does not count, if so."""
    found: list[Finding] = []
    for side in sides:
        words = ""
        if len(side.steps) < _FEWEST:
            words = f"the load generator kept its times in {len(side.steps)} of {_ROUNDS} rounds of {side.kind} batching alone"
        elif not any(step.held for step in side.steps):
            words = f"{side.kind} batching holds {slo} at no rate that was tried"
        elif all(step.held for step in side.steps):
            words = f"{side.kind} batching held {slo} at every rate that was tried: more rounds or a larger --rate are needed"
        if words:
            found.append(Finding(kind="undecided", void=True, words=words))
    return found


def _records(sides: Sequence[Side]) -> Records:
    """Return the records of the first side's run that is shown."""
    return sides[0].chosen.records if sides[0].runs else empty_records(0)


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
