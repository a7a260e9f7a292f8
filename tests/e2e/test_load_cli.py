"""``narrowcast load`` as people call it, against a server whose answers are planted."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from e2e.command import Cli, strict
from unit.load.fake_oip_server import FakeServer, Plan
from unit.load.made_certificates import Authority, server_context

#: No run is void here because the machine is busy.
PATIENT = ("--lateness", "60s", "--warmup", "0.2")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


def test_a_rate_is_measured_written_and_shown(server: FakeServer, cli: Cli, tmp_path: Path) -> None:
    records, html = tmp_path / "run.csv", tmp_path / "run.html"
    written = ("--records", records, "--html", html)
    done = cli(
        "load", server.url, "--model", "fake", "--rate", 100, "--seconds", 1, "--slo", "p50=10s", *PATIENT, *written
    )
    assert done.code == 0, done.err
    assert "p50 ≤ 10.0 s holds" in done.out.replace("\xa0", " ")
    assert "unavailable" in done.out or "good answer," in done.out  # energy
    rows = list(csv.DictReader(records.read_text().splitlines()))
    assert len(rows) == server.requests - 1  # the first request only asks whether all is well
    assert {row["outcome"] for row in rows} == {"ok"}
    assert all(float(row["done"]) >= float(row["first"]) >= float(row["sent"]) for row in rows)
    page = html.read_text()
    assert "under load" in page
    assert "http://www" not in page.replace("http://www.w3.org", "")
    again = cli(
        "load", server.url, "--model", "fake", "--arrivals", f"replay:{records}", "--seconds", 1, *PATIENT, "--json"
    )
    assert strict(again.out)["workload"]["arrivals"] == "replayed from run.csv"


@pytest.mark.parametrize("suffix", ["npz", "jsonl"])
def test_records_have_the_format_of_their_name(server: FakeServer, cli: Cli, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"run.{suffix}"
    asked = ("--model", "fake", "--concurrency", 2, "--seconds", 0.3, *PATIENT)
    done = cli("load", server.url, *asked, "--records", file, "--json")
    counted = strict(done.out)
    assert counted["run"]["open"] is False
    assert "capacity test" in counted["protocol"]
    if suffix == "npz":
        with np.load(file) as found:
            assert len(found["intended"]) == server.requests - 1
            assert found["outcomes"][found["outcome"][0]] == "ok"
    else:
        assert len([json.loads(line) for line in file.read_text().splitlines()]) == server.requests - 1
    assert cli("load", server.url, *asked, "--records", file).code == 2  # it is there already


@pytest.mark.parametrize(
    ("scenario", "words"), [("single-stream", "one"), ("multi-stream", "queries of 8"), ("offline", "32")]
)
def test_closed_scenarios_say_what_they_are(cli: Cli, scenario: str, words: str) -> None:
    with FakeServer(Plan(service=lambda number: 0.001)) as server:
        asked = ("--model", "fake", "--scenario", scenario, "--seconds", 0.5)
        done = cli("load", server.url, *asked, *PATIENT, "--json")
    found = strict(done.out)
    assert done.code == 0
    assert words in found["protocol"]
    assert found["workload"]["scenario"] == scenario
    assert found["run"]["counts"]["ok"] > 50


def test_a_stress_goes_past_capacity_and_back(cli: Cli, tmp_path: Path) -> None:
    html = tmp_path / "stress.html"
    with FakeServer(Plan(service=lambda number: 0.005, places=10)) as server:
        asked = ("--model", "fake", "--scenario", "stress", "--rate", 200, "--seconds", 6, "--overload", 3)
        done = cli("load", server.url, *asked, *PATIENT, "--json", "--html", html)
    found = strict(done.out)
    assert done.code == 0, done.err
    assert found["run"]["counts"]["shed"] > 300
    assert server.largest_queue == 10
    assert found["recovery"]["overload"] == 600
    assert "in a row" in found["recovery"]["definition"]  # whether it recovers is the machine's affair here
    assert "overload begins" in html.read_text()


def test_the_largest_rate_is_sought(cli: Cli, tmp_path: Path) -> None:
    """Above 100 requests/s the queue grows without end, so that the answer lies below it on any machine."""
    html = tmp_path / "server.html"
    with FakeServer(Plan(service=lambda number: 0.01)) as server:
        asked = ("--model", "fake", "--scenario", "server", "--rate", 60, "--seconds", 0.3, "--slo", "p50=150ms")
        done = cli(
            "load",
            server.url,
            *asked,
            "--lateness",
            "60s",
            "--warmup",
            0.1,
            "--timeout",
            "1s",
            "--json",
            "--html",
            html,
        )
    found = strict(done.out)
    assert done.code == 0, done.err
    assert found["confirmed"] is None or found["confirmed"] <= 150
    assert {probe["verdict"] for probe in found["probes"]} <= {"held", "missed", "unclear"}
    assert any(probe["verdict"] == "missed" for probe in found["probes"])
    assert "The search" in html.read_text()


def test_late_senders_void_the_run(cli: Cli) -> None:
    with FakeServer(Plan(service=lambda number: 0.02)) as server:
        asked = (
            "--model",
            "fake",
            "--rate",
            200,
            "--seconds",
            0.5,
            "--connections",
            1,
            "--warmup",
            0,
            "--lateness",
            "1ms",
        )
        done = cli("load", server.url, *asked)
    assert done.code == 1
    assert "Void: requests were sent late" in " ".join(done.out.split())


def test_a_server_without_a_good_answer_voids_the_run(cli: Cli) -> None:
    with FakeServer(Plan(status=lambda number: 503 if number else 200)) as server:
        done = cli("load", server.url, "--model", "fake", "--rate", 50, "--seconds", 0.5, *PATIENT, "--json")
    assert done.code == 1
    assert strict(done.out)["run"]["counts"]["shed"] > 0


def test_an_interruption_writes_what_was_measured(server: FakeServer, tmp_path: Path) -> None:
    records = tmp_path / "run.csv"
    command = [
        sys.executable,
        "-m",
        "narrowcast",
        "load",
        server.url,
        "--model",
        "fake",
        "--rate",
        "100",
        "--seconds",
        "60",
    ]
    process = subprocess.Popen(
        [*command, *PATIENT, "--records", str(records), "--json"], stdout=subprocess.PIPE, env=os.environ, text=True
    )
    try:
        server.wait_for(60)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    found = json.loads(out)
    assert found["interrupted"] is True
    assert found["run"]["counts"]["ok"] > 0
    assert len(records.read_text().splitlines()) > 30


MISTAKES = [
    (["--rate", 0], "--rate 0 is out of range"),
    (["--rate", -5], "--rate -5 is out of range"),
    (["--rate", "nan"], "--rate nan is out of range"),
    ([], "an open loop needs a rate"),
    (["--rate", 5, "--concurrency", 2], "contradict each other"),
    (["--rate", 5, "--scenario", "serverr"], "did you mean server?"),
    (["--scenario", "server"], "needs a bound"),
    (["--scenario", "offline", "--rate", 5], "says nothing about the scenario offline"),
    (["--rate", 5, "--slo", "99=50"], "cannot be read"),
    (["--rate", 5, "--slo", "p99=50"], "duration '50' cannot be read"),
    (["--rate", 5, "--slo", "p99=20s"], "requests are given up after 10 s"),
    (["--concurrency", 8, "--connections", 4], "8 requests under way need more than 4 connections"),
    (["--scenario", "multi-stream", "--connections", 4], "8 requests under way need more than 4 connections"),
    (["--rate", 5, "--timeout", "soon"], "duration 'soon' cannot be read"),
    (["--rate", 5, "--encoding", "xml"], "encoding 'xml' is unknown"),
    (["--rate", 5, "--batch", "0"], "cannot be read"),
    (["--rate", 5, "--batch", "9"], "a batch of 9 rows is more than the model takes"),
    (["--rate", 5, "--records", "run.xls"], "have no format"),
    (["--rate", 5, "--data", "absent.npz"], "do not exist"),
    (["--rate", 5, "--data", "wrong.npz"], "is float64, the model takes FP32"),
    (["--rate", 5, "--input", "y=1x4"], "the model has no input 'y'"),
    (["--rate", 5, "--input", "1x5"], "cannot have the shape"),
    (["--rate", 5, "--serve", "--delay 1"], "--compare-batching"),
    (["--rate", 5, "--insecure"], "talked to without TLS"),
    (["--rate", 5, "--key", "own.key"], "--key says nothing without --cert"),
    (["--rate", 5, "--header", "Authorization"], "cannot be sent"),
    (["--compare-batching", "--slo", "p99=1s"], "starts servers of its own"),
    (["--compare-batching", "--slo", "p99=1s", "--scenario", "stress"], "starts servers of its own"),
]


@pytest.mark.parametrize(
    ("arguments", "said"), MISTAKES, ids=[" ".join(map(str, one)) or "none" for one, _ in MISTAKES]
)
def test_mistakes_are_answered_in_words(server: FakeServer, cli: Cli, arguments: list[object], said: str) -> None:
    np.savez("wrong.npz", x=np.zeros((2, 4)))
    done = cli("load", server.url, "--model", "fake", *arguments)
    assert done.code == 2
    assert said in done.words


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--slo", "p99=1s"], "does not start"),
        ([], "needs a bound"),
        (["--slo", "p99=1s", "--serve", "--delay '5"], "No closing quotation"),
        (["--slo", "p99=1s", "--scenario", "stress"], "contradict each other"),
        (["--slo", "p99=1s", "--version", "3"], "contradict each other"),
        (["--slo", "p99=1s", "--concurrency", 3], "says nothing about the scenario server"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_said(cli: Cli, arguments: list[object], said: str) -> None:
    done = cli("load", "absent", "--model", "fake", "--compare-batching", *arguments)
    assert done.code == 2
    assert said in done.words


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://127.0.0.1", "cannot be read"),
        ("127.0.0.1:8000", "cannot be read"),
        ("http://127.0.0.1:99999", "cannot be read"),
        ("http://[::1:8000", "cannot be read"),
        ("http://a..b:80", "cannot be read"),
        ("http://127.0.0.1:1", "nobody answers"),
        ("grpc://127.0.0.1:1", "nobody answers"),
    ],
)
def test_a_server_that_is_not_there_is_said(cli: Cli, url: str, said: str) -> None:
    done = cli("load", url, "--model", "fake", "--rate", 5)
    assert done.code == 2
    assert said in done.words


def test_a_model_that_is_not_there_has_its_nearest_name(server: FakeServer, cli: Cli) -> None:
    done = cli("load", server.url, "--model", "fakes", "--rate", 5)
    assert done.code == 2
    assert "has no model 'fakes'" in done.words
    assert "did you mean fake?" in done.words


def test_requests_that_the_server_refuses_are_not_sent_again(cli: Cli) -> None:
    with FakeServer(Plan(status=lambda number: 400)) as server:
        done = cli("load", server.url, "--model", "fake", "--rate", 5)
    assert done.code == 2
    assert "refuses the first request (400): planted" in done.words
    assert server.requests == 1


def test_nothing_that_is_kept_holds_a_secret_and_no_check_is_said_loudly(cli: Cli, tmp_path: Path) -> None:
    context = server_context(Authority(tmp_path).certify("server"))
    kept = [tmp_path / "load.html", tmp_path / "load.csv"]
    with FakeServer(Plan(token="Bearer secret-token"), context) as server:
        asked = ("--model", "fake", "--rate", 50, "--seconds", 0.5, *PATIENT, "--insecure", "--force")
        sent = ("--header", "Authorization: Bearer secret-token", "--html", kept[0], "--records", kept[1])
        shown = cli("load", server.url, *asked, *sent)
        machine = cli("load", server.url, *asked, *sent, "--json")
        closed = cli("load", server.url, *asked, "--header", "Authorization: Bearer secret-other")
    assert shown.code == machine.code == 0, shown.err
    assert closed.code == 2
    assert "lets nobody in" in closed.words
    texts = [shown.out, shown.err, machine.out, closed.err, *(file.read_text() for file in kept)]
    assert not [text for text in texts if "secret" in text]
    assert "INSECURE" in shown.out
    assert "INSECURE" in kept[0].read_text()
    found = strict(machine.out)
    assert found["workload"]["headers"] == ["Authorization"]
    assert found["run"]["findings"][0]["kind"] == "insecure"
    assert "NOT checked" in found["server"]["security"]


@pytest.mark.parametrize("machine", [True, False], ids=["json", "text"])
def test_a_full_disk_costs_the_records_and_not_the_answer(
    server: FakeServer, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: bool
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    records, html = tmp_path / "run.csv", tmp_path / "run.html"
    monkeypatch.setattr("narrowcast.measure.load.records.as_csv", lambda kept: "x")
    monkeypatch.setattr("narrowcast.cli.files.NamedTemporaryFile", full)
    asked = ("--model", "fake", "--rate", 50, "--seconds", 0.5, *PATIENT, "--records", records, "--html", html)
    done = cli("load", server.url, *asked, *(["--json"] if machine else []))
    assert done.code == 2
    assert "No space left" in (done.out if machine else done.words)
    assert list(tmp_path.glob("run*")) == []
    if machine:
        found = strict(done.out)
        assert found["run"]["counts"]["ok"] > 0
        assert found["records"] is found["report"] is None
    else:
        assert "requests/s" in done.out


def test_a_server_that_dies_in_the_middle_leaves_what_was_measured(cli: Cli, tmp_path: Path) -> None:
    records = tmp_path / "run.csv"
    with FakeServer() as server:
        server.plan.on_request = lambda number: server.die() if number == 40 else None
        asked = ("--model", "fake", "--rate", 100, "--seconds", 1.5, *PATIENT, "--timeout", "1s")
        done = cli("load", server.url, *asked, "--records", records, "--json")
    counts = strict(done.out)["run"]["counts"]
    assert done.code == 0, done.err
    assert counts["ok"] > 0
    assert counts["broken"] > counts["ok"]
    assert records.read_text().count("broken") >= counts["broken"]


def test_a_search_whose_server_dies_says_so_and_keeps_its_records(cli: Cli, tmp_path: Path) -> None:
    records = tmp_path / "run.csv"
    with FakeServer(Plan(service=lambda number: 0.002)) as server:
        server.plan.on_request = lambda number: server.die() if number == 60 else None
        asked = ("--model", "fake", "--scenario", "server", "--slo", "p50=500ms", "--rate", 40, "--seconds", 0.5)
        done = cli("load", server.url, *asked, *PATIENT, "--timeout", "1s", "--records", records, "--json")
    assert done.code == 1, done.err
    found = strict(done.out)
    assert any(one["kind"] == "gone" and one["void"] for one in found["run"]["findings"])
    assert len(records.read_text().splitlines()) > 10
