"""Senders against a server whose queue is known: what they measure has to be what the queue does."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from fake_oip_server import FakeServer, Plan

from narrowcast.errors import UserError
from narrowcast.load.arrivals import Constant, Poisson
from narrowcast.load.fleet import Options
from narrowcast.load.introduction import introduce
from narrowcast.load.session import Asked, Content, Measured, Session
from narrowcast.load.target import read_target
from narrowcast.measure.load.progress import Progress
from narrowcast.measure.load.records import Outcome
from narrowcast.measure.load.values import Slo

#: Nobody knows how busy the machine is, so that no run is void for being late.
PATIENT = Asked(seconds=2.0, warmup=0.0, lateness=60.0)


def silent(progress: Progress) -> bool:
    return False


Open = Callable[..., Session]


@pytest.fixture
def start() -> Iterator[Open]:
    """Connect to a server; what is connected is closed at the end."""
    sessions: list[Session] = []

    def begin(server: FakeServer, **options: object) -> Session:
        chosen = replace(Options(timeout=5.0), **options)
        sessions.append(Session(read_target(server.url), "fake", "", Content(), chosen))
        return sessions[-1]

    yield begin
    for session in sessions:
        session.__exit__(None, None, None)


def outcomes(measured: Measured) -> dict[str, int]:
    counts = measured.run.counts.model_dump()
    return {name: count for name, count in counts.items() if count and name != "due"}


def test_open_loop_latency_is_that_of_the_queue(start: Open) -> None:
    """M/D/1: the mean wait is load · service / (2 · (1 - load)) (Pollaczek and Khinchine)."""
    service, rate = 0.012, 50.0
    with FakeServer(Plan(service=lambda number: service)) as server:
        measured = start(server).open_loop(Poisson(rate), replace(PATIENT, seconds=4.0, seed=11), silent)
    records = measured.counted
    due, latency = records["intended"], records["done"] - records["intended"]
    free, exact = 0.0, np.empty(len(due))
    for place, moment in enumerate(due):
        free = max(moment, free) + service
        exact[place] = free - moment
    assert (latency >= exact - 1e-6).all()  # no request can have fared better than the queue allows
    assert np.median(latency - exact) < service  # nor was much added to it
    load = rate * service
    theory = service + load * service / (2 * (1 - load))
    assert measured.run.mean is not None
    assert measured.run.mean.low <= theory + np.median(latency - exact) <= measured.run.mean.high


def test_a_stall_is_seen_by_all_requests_that_were_due_in_it(start: Open) -> None:
    """Coordinated omission: a client that waits for the server sends, and sees, almost nothing of its stall."""
    rate, stall = 100.0, 0.8
    with FakeServer(Plan(stall=(0.5, stall))) as server:
        measured = start(server).open_loop(Constant(rate), PATIENT, silent)
    latency = measured.counted["done"] - measured.counted["intended"]
    assert (latency > stall / 2).sum() >= 0.9 * rate * stall / 2
    assert latency.max() >= stall - 2 / rate
    with FakeServer(Plan(stall=(0.5, stall))) as server:
        waiting = start(server).closed_loop(1, 1, PATIENT, silent)
    latency = waiting.counted["done"] - waiting.counted["intended"]
    assert (latency > stall / 2).sum() == 1
    assert not waiting.run.open


def test_waiting_for_a_connection_counts_and_makes_the_run_void(start: Open) -> None:
    with FakeServer(Plan(service=lambda number: 0.02)) as server:
        measured = start(server, connections=2).open_loop(
            Constant(200.0), replace(PATIENT, seconds=0.5, lateness=0.2), silent
        )
    assert server.largest_queue <= 2
    assert measured.run.client.connections == 2
    assert measured.run.client.waited > 10
    late = measured.counted["sent"] - measured.counted["intended"]
    assert np.nanmax(late) > 1.0
    assert measured.run.void
    words = next(finding.words for finding in measured.run.findings if finding.kind == "late")
    assert "all 2 connections busy" in words
    assert any(finding.kind == "behind" for finding in measured.run.findings)


@pytest.mark.parametrize(
    ("plan", "kind"),
    [
        (Plan(status=lambda number: 200 if number % 4 else 503), "shed"),
        (Plan(status=lambda number: 200 if number % 4 else 429), "shed"),
        (Plan(status=lambda number: 200 if number % 4 else 504), "timeout"),
        (Plan(status=lambda number: 200 if number % 4 else 500), "error"),
        (Plan(answers=lambda number: number % 4 != 1), "timeout"),
    ],
    ids=["503", "429", "504", "500", "silence"],
)
def test_what_is_no_good_answer_is_counted_beside_latency(start: Open, plan: Plan, kind: str) -> None:
    good = plan.status
    plan.status = lambda number: 200 if number == 0 else good(number)  # the first request only asks whether all is well
    with FakeServer(plan) as server:
        slo = Slo(percentile=99, seconds=60.0)
        asked = replace(PATIENT, seconds=1.0, slo=slo)
        measured = start(server, timeout=0.6).open_loop(Constant(80.0), asked, silent)
    assert outcomes(measured) == {"ok": 60, kind: 20}
    assert measured.run.within is not None
    assert measured.run.within.value == 0.75
    assert measured.run.curve[-1].estimate is not None
    assert measured.run.curve[-1].estimate.high < 60
    assert any(finding.kind == "failures" for finding in measured.run.findings)


def test_connections_that_break_are_said_and_replaced(start: Open) -> None:
    with FakeServer() as server:
        session = start(server)

        def cut(progress: Progress) -> bool:
            if progress.seconds < 0.5:
                server.call(lambda: [connection.transport.abort() for connection in list(server.connections)])
            return False

        server.plan.service = lambda number: 0.012
        measured = session.open_loop(Constant(100.0), replace(PATIENT, seconds=1.0), cut)
    found = outcomes(measured)
    assert found["broken"] >= 1
    assert found["ok"] + found["broken"] == 100
    assert (measured.records["status"][measured.records["outcome"] == Outcome.BROKEN] == -1).all()


def test_nothing_listens_any_more(start: Open) -> None:
    with FakeServer() as server:
        session = start(server)
    with pytest.raises(UserError, match="takes no connection"):
        session.open_loop(Constant(50.0), PATIENT, silent)


def test_queries_of_several_requests_are_answered_when_all_are(start: Open) -> None:
    with FakeServer(Plan(service=lambda number: 0.008)) as server:
        measured = start(server).closed_loop(1, 4, replace(PATIENT, seconds=1.0), silent)
    assert server.largest_queue == 4
    assert measured.run.mean is not None
    assert measured.run.mean.value >= 0.032  # four, one after the other
    assert len(np.unique(measured.counted["query"])) == measured.run.mean.samples


def test_several_processes_send_one_schedule(start: Open) -> None:
    with FakeServer() as server:
        measured = start(server, processes=2).open_loop(Poisson(200.0), replace(PATIENT, seconds=1.0, seed=5), silent)
        closed = start(server, processes=2).closed_loop(5, 1, replace(PATIENT, seconds=0.5), silent)
    due = Poisson(200.0).times(1.0, np.random.default_rng(5))
    assert measured.records["intended"] == pytest.approx(due, abs=1e-6)
    assert measured.run.client.processes == 2
    assert len(np.unique(measured.records["query"])) == len(due)
    assert closed.run.counts.ok > 0
    assert closed.run.concurrency == 5


def test_one_session_runs_again_after_a_run_that_was_ended_early(start: Open) -> None:
    with FakeServer(Plan(service=lambda number: 0.2)) as server:
        session = start(server)
        ended = session.open_loop(
            Constant(50.0), replace(PATIENT, seconds=30.0), lambda progress: progress.seconds > 0.4
        )
        assert ended.span.end < 20
        assert not ended.interrupted
        assert (ended.records["outcome"] == Outcome.CUT).any()
        server.plan.service = lambda number: 0.0
        server.call(server.forget)
        again = session.open_loop(Constant(50.0), replace(PATIENT, seconds=1.0), silent)
    assert outcomes(again) == {"ok": 50}


def test_an_interruption_keeps_what_was_measured(start: Open) -> None:
    def interrupt(progress: Progress) -> bool:
        if progress.ok:
            os.kill(os.getpid(), signal.SIGINT)
        return False

    with FakeServer() as server:
        measured = start(server).open_loop(Constant(50.0), replace(PATIENT, seconds=60.0), interrupt)
    assert measured.interrupted
    assert 1 <= measured.run.counts.ok < 2000
    assert measured.span.end < 40


@pytest.mark.parametrize(
    ("metadata", "said"), [({"error": "x"}, "does not speak"), (None, "no model 'fake'")], ids=["strange", "absent"]
)
def test_strange_servers_are_named(metadata: dict[str, str] | None, said: str) -> None:
    with FakeServer(Plan(metadata=metadata)) as server, pytest.raises(UserError, match=said):  # type: ignore[arg-type]
        introduce(read_target(server.url), "fake", "")
