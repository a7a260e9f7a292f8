"""What serving adds to a model: requests per second beside bare servers and beside peers, in the same run.

    python benchmarks/serving.py [overhead] [--rounds 9] [--seconds 1] [--out FILE]
    python benchmarks/serving.py peers      the same load on other servers, each in an environment of its own
    python benchmarks/serving.py models     INT8 EfficientNet-Lite0 beside bare sessions, and what batching gains

``overhead`` and ``peers`` pin each server to the first core and the load to the last. All servers run all the time and are
asked in turn, so that what else the machine does meets all of them alike; quoted are medians over rounds, and medians of
the ratios within a round. The load is a closed loop: each connection sends its next request when the answer is there. The
client sends the same bytes each time, so that it adds little; ``grpcio`` is gRPC's own client, whose time is part of what
it sees. On a machine with other work the ratios and the processor time of each request guide, the rates do not.

The servers are described in `serving_programs.py`, the peers in `peers/serving/`, the models in `serving_models.py`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import uvloop
from serving_load import Check, Rate, binary_post, grpc_loop, grpcio_loop, http_loop, post
from serving_programs import ECHO, LARGE_ELEMENTS

from narrowcast.measure.environment import environment
from narrowcast.oip.messages import INFERENCE

HERE = Path(__file__).parent
SMALL = b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[1.0,2.0,3.0,4.0]}]}'
CONNECTIONS = (1, 32)
OURS = ("inline", "thread", "process")


@dataclass(frozen=True)
class Server:
    """A server that runs: its process, and its ports by protocol."""

    pid: int
    ports: Mapping[str, int]


@dataclass(frozen=True)
class Case:
    """One load on one server.

    Attributes:
        server: Its name.
        load: What is sent, as rows of the table call it; ratios are taken between cases of the same load.
        run: Loads a server for some seconds.
        reference: Server that the ratio is to, or empty for none.
    """

    server: str
    load: str
    run: Callable[[Server, float], Rate]
    reference: str = ""


@contextmanager
def running(command: Sequence[str | Path]) -> Iterator[Server]:
    """Start a server and yield it when it has printed its ports."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(map(str, command))} ended before it answered")
        yield Server(process.pid, json.loads(line))
    finally:
        process.terminate()
        process.wait(30)


def over_http(request: bytes, check: Check, connections: int) -> Callable[[Server, float], Rate]:
    return lambda server, seconds: uvloop.run(
        http_loop(server.ports["http"], request, check, connections, seconds, server.pid)
    )


def over_grpc(path: str, request: bytes, check: Check, concurrency: int) -> Callable[[Server, float], Rate]:
    return lambda server, seconds: uvloop.run(
        grpc_loop(server.ports["grpc"], path, request, check, concurrency, seconds, server.pid)
    )


def over_grpcio(path: str, request: bytes, check: Check, concurrency: int) -> Callable[[Server, float], Rate]:
    return lambda server, seconds: grpcio_loop(
        server.ports["grpc"], path, request, check, concurrency, seconds, server.pid
    )


# Loads ----------------------------------------------------------------------------------------------------------------


def overhead_cases() -> list[Case]:
    """Return the loads on bare servers and on narrowcast."""
    cases: list[Case] = []
    for connections in CONNECTIONS:
        small = over_http(post("/v2/models/noop/infer", SMALL), check_json, connections)
        cases += [Case(name, f"JSON {connections}", small, "bare") for name in ("bare", *OURS)]
    data = np.arange(LARGE_ELEMENTS, dtype=np.float32).tobytes()
    large = over_http(binary_post("large", "x", [1, LARGE_ELEMENTS], data), ends_with(data), 1)
    cases += [Case(name, "600 kB 1", large, "bare") for name in ("bare", *OURS)]
    message = INFERENCE["ModelInferRequest"](model_name="noop")
    message.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    message.raw_input_contents.append(np.arange(1, 5, dtype=np.float32).tobytes())
    request = message.SerializeToString()
    for (client, over), concurrency in product((("gRPC", over_grpc), ("grpcio", over_grpcio)), CONNECTIONS):
        load = f"{client} {concurrency}"
        echo = over(ECHO, request, equals(request), concurrency)
        infer = over("/inference.GRPCInferenceService/ModelInfer", request, check_message, concurrency)
        cases.append(Case("bare-grpc", load, echo))
        cases += [Case(name, load, infer, "bare-grpc") for name in ("inline", "process")]
    return cases


def check_json(answer: bytes) -> None:
    assert answer.startswith(b"HTTP/1.1 200"), answer[:300]
    outputs = json.loads(answer.partition(b"\r\n\r\n")[2])["outputs"]
    assert outputs[0]["data"] == [1.0, 2.0, 3.0, 4.0], outputs


def ends_with(data: bytes) -> Check:
    def check(answer: bytes) -> None:
        assert answer.startswith(b"HTTP/1.1 200"), answer[:300]
        assert answer.endswith(data), "the data came back changed"

    return check


def equals(data: bytes) -> Check:
    def check(answer: bytes) -> None:
        assert answer == data

    return check


def check_message(answer: bytes) -> None:
    response = INFERENCE["ModelInferResponse"].FromString(answer)
    assert np.frombuffer(response.raw_output_contents[0], np.float32).tolist() == [1, 2, 3, 4]


# The run --------------------------------------------------------------------------------------------------------------

Round = dict[tuple[str, str], Rate]


def measure(
    commands: Mapping[str, Sequence[str | Path]], cases: Sequence[Case], rounds: int, seconds: float
) -> list[Round]:
    """Return what each case saw in each round, by server and load."""
    found: list[Round] = []
    with ExitStack() as stack:
        servers = {name: stack.enter_context(running(command)) for name, command in commands.items()}
        for _ in range(rounds):
            found.append({(case.server, case.load): case.run(servers[case.server], seconds) for case in cases})
    return found


def table(cases: Sequence[Case], rounds: Sequence[Round]) -> list[dict[str, object]]:
    """Print a row for each case, and return the rows."""
    rows: list[dict[str, object]] = []
    print(f"{'load':10} {'server':12} {'answers/s':>10} {'p50 us':>9} {'CPU us':>8}  beside")
    for case in cases:
        seen = [found[case.server, case.load] for found in rounds]
        row: dict[str, object] = {"load": case.load, "server": case.server}
        row |= {key: statistics.median(getattr(rate, key) for rate in seen) for key in ("rate", "p50_us", "cpu_us")}
        text = f"{case.load:10} {case.server:12} {row['rate']:10.0f} {row['p50_us']:9.0f} {row['cpu_us']:8.0f}"
        if case.reference not in ("", case.server):
            pairs = [(found[case.server, case.load], found[case.reference, case.load]) for found in rounds]
            row["rate_ratio"] = statistics.median(ours.rate / theirs.rate for ours, theirs in pairs)
            row["added_us"] = statistics.median(ours.p50_us - theirs.p50_us for ours, theirs in pairs)
            row["reference"] = case.reference
            text += f"  {row['rate_ratio']:.2f} of {case.reference}, {row['added_us']:+.0f} us"
        print(text, flush=True)
        rows.append(row)
    return rows


def overhead(arguments: argparse.Namespace) -> dict[str, object]:
    cases = [case for case in overhead_cases() if arguments.only in case.load]
    names = dict.fromkeys(case.server for case in cases)
    core = str(pin())
    commands = {name: [sys.executable, HERE / "serving_programs.py", name, core] for name in names}
    rounds = measure(commands, cases, arguments.rounds, arguments.seconds)
    return {"rows": table(cases, rounds), "rounds": [flat(found) for found in rounds]}


def peers(arguments: argparse.Namespace) -> dict[str, object]:
    from serving_environments import PEERS, python_of

    core = str(pin())
    commands: dict[str, list[str | Path]] = {"inline": [sys.executable, HERE / "serving_programs.py", "inline", core]}
    failed: dict[str, str] = {}
    cases: list[Case] = []
    for connections in CONNECTIONS:
        small = over_http(post("/v2/models/noop/infer", SMALL), check_json, connections)
        cases.append(Case("inline", f"JSON {connections}", small))
    for peer in PEERS:
        python = python_of(peer, arguments.environments)
        if isinstance(python, str):
            failed[peer.name] = python
            print(f"{peer.name} cannot be installed here: {python}", flush=True)
            continue
        commands[peer.name] = [python, HERE / "peers" / "serving" / "start.py", peer.name, core]
        for connections in CONNECTIONS:
            small = over_http(post(peer.target, peer.body), contains(peer.answer), connections)
            cases.append(Case(peer.name, f"JSON {connections}", small, "inline"))
    rounds = measure(commands, cases, arguments.rounds, arguments.seconds)
    return {"rows": table(cases, rounds), "rounds": [flat(found) for found in rounds], "not installed": failed}


def contains(data: bytes) -> Check:
    def check(answer: bytes) -> None:
        assert answer.startswith(b"HTTP/1.1 200"), answer[:300]
        assert data in answer.replace(b" ", b""), answer[-300:]

    return check


def models(arguments: argparse.Namespace) -> dict[str, object]:
    import serving_models

    return serving_models.run(arguments.seconds, arguments.rounds)


def pin() -> int:
    """Pin this process, which is the load, to the last core, and return the first."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    return cores[0]


def flat(found: Round) -> list[dict[str, object]]:
    return [{"server": server, "load": load} | asdict(rate) for (server, load), rate in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"overhead": overhead, "peers": peers, "models": models}
    parser.add_argument("part", nargs="?", choices=parts, default="overhead")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each case in each round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="loads of overhead with this in their name")
    parser.add_argument("--environments", type=Path, default=HERE / "peers.work", help="where peers are installed")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    before = os.getloadavg()[0]
    result = parts[arguments.part](arguments)
    print(f"load average {before:.1f} before, {os.getloadavg()[0]:.1f} at the end")
    if arguments.out:
        about = {"date": datetime.date.today().isoformat(), "part": arguments.part, "seconds": arguments.seconds}
        about |= {"load before": before, "environment": environment().model_dump()}
        arguments.out.write_text(json.dumps(about | result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
