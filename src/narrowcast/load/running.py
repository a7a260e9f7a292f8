"""One load from its settings to its result."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from narrowcast.load.fleet import Options
from narrowcast.load.scenarios import Answer, Settings, measure
from narrowcast.load.session import Content, Session, Watch
from narrowcast.load.target import Target
from narrowcast.measure.environment import environment
from narrowcast.measure.load.records import Records
from narrowcast.measure.load.values import Finding, LoadResult, Workload

__all__ = ["Load", "Subject", "run_load", "workload_of"]


@dataclass(frozen=True)
class Subject:
    """A model of a server, and the version that is asked for; empty for the one that the server chooses."""

    target: Target
    model: str
    version: str = ""


@dataclass(frozen=True)
class Load:
    """What is sent, how, and what is measured."""

    settings: Settings
    content: Content
    options: Options


def run_load(subject: Subject, load: Load, watch: Watch) -> tuple[LoadResult, Records]:
    """Return what a load finds of a server, and the records of the run that the answer stands on.

    Args:
        subject: The server and the model.
        load: What is asked.
        watch: Who is told how far it is.

    Raises:
        UserError: Nobody answers, or somebody who does not speak the protocol.
        ModelError: The server has no such model.
        DataError: The content does not fit the model.
    """
    asked = load.settings.asked
    with Session(subject.target, subject.model, subject.version, load.content, load.options, asked.seed) as session:
        answer = measure(session, load.settings, watch)
        measured = answer.measured
        result = LoadResult(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            server=session.server(),
            workload=workload_of(session, load, answer.arrivals),
            slo=asked.slo,
            run=measured.run.model_copy(
                update={"findings": (*_doubts(subject.target), *measured.run.findings, *_findings(answer))}
            ),
            probes=answer.probes,
            largest=answer.largest,
            confirmed=answer.confirmed,
            recovery=answer.recovery,
            protocol=answer.protocol,
            environment=environment(),
            interrupted=measured.interrupted,
        )
    return result, measured.records


def _doubts(target: Target) -> list[Finding]:
    if target.access.checked:
        return []
    words = "INSECURE: the server's certificate was not checked (--insecure), so anybody may have answered"
    return [Finding(kind="insecure", void=False, words=words)]


def _findings(answer: Answer) -> list[Finding]:
    found = [Finding(kind="saturated", void=False, words=note) for note in answer.notes]
    if answer.measured.interrupted:
        found.append(
            Finding(kind="interrupted", void=False, words="interrupted: this is what had been measured until then")
        )
    return found


def workload_of(session: Session, load: Load, arrivals: str) -> Workload:
    """Return what was sent, and how, as a value."""
    return Workload(
        scenario=load.settings.scenario,
        arrivals=arrivals,
        encoding="grpc" if session.target.grpc else load.content.encoding,
        data=load.content.data,
        batches=load.content.batches,
        bytes=tuple(sorted({request.body for request in session.requests})),
        timeout=load.options.timeout,
        connections=load.options.connections,
        headers=tuple(name for name, _ in session.target.access.headers),
        seed=load.settings.asked.seed,
        lateness=load.settings.asked.lateness,
    )
