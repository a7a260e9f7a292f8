"""A server under load whose models change all the time: failed requests, and whether its memory grows.

    python benchmarks/serving_soak.py [--minutes 20] [--load 0.7] [--operations 100] [--placement thread] [--out FILE]

``narrowcast serve`` runs on the first core, the load on the last. Models are loaded, unloaded, promoted and rolled back at a
constant rate all the time, which takes a good part of the core. First the capacity beside that is measured with a closed loop;
then requests come at a constant rate, a share of it, and latency counts from when a request should have been sent (and once
more from when it went out: a machine that stalls makes the load fall behind). Requests
name no version, and every answer must be that of the version that it says. Unloaded is a model that nobody asks, because a
request of a model that is not there fails rightly. Memory is the proportional set size of the server and its workers, without
pages of files (programs and libraries), which the system takes and gives back as it likes. Its slope is fitted to means of ten
seconds, behind the first fifth of the run, with a 95 % interval.

With ``--placement process`` each load starts a process, which costs most of a second of the one core: choose fewer operations
or a smaller load there. Ends with 1 if a request or an operation failed, or the memory grows beyond the noise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper, numpy_helper
from scipy import stats
from serving_programs import make_artifact

from narrowcast.measure.environment import environment

TOKEN = "soak"
WIDTH = 64
CONNECTIONS = 16
VERSIONS = (1, 2, 3)
BLOCK_SECONDS = 10.0
SAMPLE_SECONDS = 0.5
CAPACITY_SECONDS = 60.0
#: A load that is further behind than this measures the machine, and ends.
LATEST_SECONDS = 10.0


def write_model(folder: Path, factor: float) -> None:
    """Write an artifact that multiplies FP32 [n, 64] by an identity of some cost, and by a factor."""
    folder.mkdir(parents=True)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in ("x", "y")]
    weights = [np.eye(WIDTH, 2048, dtype=np.float32) * np.float32(factor), np.eye(2048, WIDTH, dtype=np.float32)]
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["y"])]
    constants = [numpy_helper.from_array(array, name) for name, array in zip("ab", weights, strict=True)]
    graph = helper.make_graph(nodes, "soak", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    make_artifact(folder)


@contextlib.contextmanager
def serving(repository: Path, placement: str) -> Iterator[tuple[int, int]]:
    """Start a server on the first core and yield its process and port."""
    command = [sys.executable, "-m", "narrowcast", "serve", str(repository), "--placement", placement, "--json"]
    ports = ["--port", "0", "--grpc-port", "-1", "--metrics-port", "-1"]
    core = str(min(os.sched_getaffinity(0)))
    process = subprocess.Popen(
        ["taskset", "-c", core, *command, *ports],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"NARROWCAST_ADMIN_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    try:
        text = ""
        for line in process.stdout:
            text += line
            if line == "}\n":
                break
        if not text:
            raise SystemExit("the server ended before it listened")
        yield process.pid, int(json.loads(text)["listening"]["http"].rpartition(":")[2])
    finally:
        process.terminate()
        process.wait(60)


class TooLateError(Exception):
    """The load cannot keep up."""


class Client:
    """A connection that asks one thing at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, target: str, body: bytes = b"", headers: str = "") -> tuple[int, bytes]:
        """Return status and body of the answer to a POST."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        head = f"POST {target} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in answer.split(b"\r\n") if line.lower().startswith(b"content-length"))
        content = await reader.readexactly(int(length.partition(b":")[2]))
        return int(answer.split(b" ", 2)[1]), content

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


@dataclass
class Seen:
    """What happened.

    Attributes:
        statuses: Requests by what became of them.
        latencies: Seconds from the intended moment of each request that succeeded.
        answered_in: Seconds from the moment that it went out.
        versions: Requests by the version that answered.
        operations: Changes by kind and status.
        memory: Moment and bytes of the server and its workers.
    """

    statuses: Counter[str] = field(default_factory=Counter[str])
    latencies: list[float] = field(default_factory=list[float])
    answered_in: list[float] = field(default_factory=list[float])
    versions: Counter[str] = field(default_factory=Counter[str])
    operations: Counter[str] = field(default_factory=Counter[str])
    memory: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])


BODY = json.dumps({"inputs": [{"name": "x", "shape": [1, WIDTH], "datatype": "FP32", "data": [1.0] * WIDTH}]}).encode()


async def request(client: Client, seen: Seen, intended: float) -> None:
    """Ask once, and check that the answer is that of the version that it names."""
    sent = time.monotonic()
    try:
        status, content = await client.ask("/v2/models/asked/infer", BODY)
    except (OSError, asyncio.IncompleteReadError) as error:
        seen.statuses[type(error).__name__] += 1
        client.close()
        return
    if status != 200:
        seen.statuses[str(status)] += 1
        return
    document = json.loads(content)
    version = document["model_version"]
    right = document["outputs"][0]["data"] == [float(version)] * WIDTH
    seen.statuses["200" if right else "wrong"] += 1
    seen.versions[version] += 1
    now = time.monotonic()
    seen.latencies.append(now - intended)
    seen.answered_in.append(now - sent)


async def capacity(port: int, seconds: float) -> float:
    """Return the requests per second of a closed loop."""
    seen = Seen()
    until = time.monotonic() + seconds

    async def worker() -> None:
        client = Client(port)
        while time.monotonic() < until:
            await request(client, seen, time.monotonic())
        client.close()

    await asyncio.gather(*(worker() for _ in range(CONNECTIONS)))
    assert set(seen.statuses) == {"200"}, seen.statuses
    return seen.statuses["200"] / seconds


async def load(port: int, rate: float, until: float, seen: Seen) -> None:
    """Ask at a constant rate, each connection in its turn."""
    begun = time.monotonic()

    async def worker(number: int) -> None:
        client = Client(port)
        index = number
        while (intended := begun + index / rate) < until:
            late = time.monotonic() - intended
            if late > LATEST_SECONDS:
                raise TooLateError(
                    f"requests go out {late:.0f} s late: the machine has other work, and nothing was measured"
                )
            await asyncio.sleep(max(0.0, -late))
            await request(client, seen, intended)
            index += CONNECTIONS
        client.close()

    await asyncio.gather(*(worker(number) for number in range(CONNECTIONS)))


async def change(port: int, per_minute: float, until: float, seen: Seen, seed: int) -> None:
    """Change what is served at a constant rate."""
    rng = random.Random(seed)
    client = Client(port)
    begun = time.monotonic()
    spare_loaded = True
    answers: Any = {str(max(VERSIONS)): 1.0}
    before: list[Any] = []  # what answered before, as far as the server remembers it
    index = 0
    while (intended := begun + index * 60 / per_minute) < until:
        index += 1
        await asyncio.sleep(max(0.0, intended - time.monotonic()))
        kind = rng.choice(("load", "spare", "promote", "split", "rollback" if before else "promote"))
        target, body = {
            "load": ("asked/load", b""),
            "spare": ("spare/unload" if spare_loaded else "spare/load", b""),
            "promote": (f"asked/versions/{rng.choice(VERSIONS)}/promote", b""),
            "split": ("asked/traffic", json.dumps({"weights": {"1": 1, str(rng.choice(VERSIONS[1:])): 2}}).encode()),
            "rollback": ("asked/rollback", b""),
        }[kind]
        authorised = f"Authorization: Bearer {TOKEN}\r\n"
        status, content = await client.ask(f"/v2/repository/models/{target}", body, authorised)
        seen.operations[f"{kind} {status}"] += 1
        if kind == "spare":
            spare_loaded = not spare_loaded
            continue
        now = json.loads(content).get("traffic")
        if kind == "rollback":
            before.pop()
        elif now != answers:
            before = [*before, answers][-32:]
        answers = now
    client.close()


async def watch(pid: int, until: float, seen: Seen) -> None:
    """Measure the memory of the server and its workers."""
    begun = time.monotonic()
    while time.monotonic() < until:
        seen.memory.append((time.monotonic() - begun, await asyncio.to_thread(memory_of, pid)))
        await asyncio.sleep(SAMPLE_SECONDS)


def memory_of(pid: int) -> int:
    """Return the proportional set size of a process and its children, without pages of files."""
    server = psutil.Process(pid)
    total = 0
    for process in (server, *server.children(recursive=True)):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
            sizes = {name.rstrip(":"): int(size) for name, size, *_ in map(str.split, lines)}
            total += (sizes["Pss_Anon"] + sizes["Pss_Shmem"]) << 10
    return total


@dataclass(frozen=True)
class Slope:
    """How memory changes, in bytes per minute, with the ends of its 95 % interval, from some number of block means."""

    value: float
    low: float
    high: float
    blocks: int


def slope_of(memory: list[tuple[float, int]]) -> Slope:
    """Fit a line to means of blocks, behind the first fifth of the run."""
    times, sizes = (np.array(column, float) for column in zip(*memory, strict=True))
    steady = times > times[-1] / 5
    blocks = ((times[steady] - times[steady][0]) / min(BLOCK_SECONDS, times[-1] / 12)).astype(int)
    means = np.array([sizes[steady][blocks == block].mean() for block in np.unique(blocks)])
    at = np.array([times[steady][blocks == block].mean() for block in np.unique(blocks)]) / 60
    line = stats.linregress(at, means)
    half = float(stats.t.ppf(0.975, len(means) - 2) * line.stderr)
    return Slope(float(line.slope), float(line.slope) - half, float(line.slope) + half, len(means))


async def soak(port: int, pid: int, options: argparse.Namespace) -> tuple[float, Seen]:
    """Change all the time; measure the capacity, then load; return the rate and what happened."""
    seen = Seen()
    first = min(CAPACITY_SECONDS, options.minutes * 20)
    until = time.monotonic() + first + options.minutes * 60
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(change(port, options.operations, until, seen, options.seed))
        rate = options.load * await capacity(port, first)
        tasks.create_task(load(port, rate, until, seen))
        tasks.create_task(watch(pid, until, seen))
    return rate, seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--load", type=float, default=0.7, help="share of the measured capacity")
    parser.add_argument("--operations", type=float, default=100.0, help="changes per minute")
    parser.add_argument("--placement", choices=("thread", "process", "inline"), default="thread")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        for name in ("asked", "spare"):
            for version in VERSIONS:
                write_model(Path(folder) / name / str(version) / "artifact", float(version))
        with serving(Path(folder), options.placement) as (pid, port):
            os.sched_setaffinity(0, {cores[-1]})
            try:
                rate, seen = asyncio.run(soak(port, pid, options))
            except* TooLateError as late:
                raise SystemExit(str(late.exceptions[0])) from None
    return report(options, rate, seen, cores)


def quantiles_of(seconds: list[float]) -> dict[str, float]:
    """Return milliseconds by quantile."""
    return {f"p{q:g}": float(np.quantile(seconds, q / 100)) * 1e3 for q in (50, 99, 99.9)}


def report(options: argparse.Namespace, rate: float, seen: Seen, cores: list[int]) -> int:
    """Print and write what happened; return the exit code."""
    slope = slope_of(seen.memory)
    failed = sum(count for status, count in seen.statuses.items() if status != "200")
    refused = sum(count for kind, count in seen.operations.items() if not kind.endswith(" 200"))
    quantiles, answered = quantiles_of(seen.latencies), quantiles_of(seen.answered_in)
    sizes = [size for _, size in seen.memory]
    document = {
        "protocol": __doc__,
        "minutes": options.minutes,
        "placement": options.placement,
        "offered_per_second": rate,
        "load": options.load,
        "requests": dict(seen.statuses),
        "failed": failed,
        "versions": dict(seen.versions),
        "operations": dict(seen.operations),
        "latency_ms": quantiles,
        "answered_in_ms": answered,
        "memory_mib": {"first": sizes[0] / 2**20, "last": sizes[-1] / 2**20, "most": max(sizes) / 2**20},
        "memory_mib_by_second": [
            [round(at, 1), round(size / 2**20, 2)] for at, size in seen.memory[:: max(1, len(seen.memory) // 240)]
        ],
        "memory_slope_bytes_per_minute": asdict(slope),
        "cores": {"server": cores[0], "load": cores[-1]},
        "environment": environment().model_dump(mode="json"),
    }
    print(f"{rate:.0f} requests/s for {options.minutes:g} min: {dict(seen.statuses)}, {failed} failed")
    print(f"operations: {dict(sorted(seen.operations.items()))}")
    for what, found in (("latency", quantiles), ("answered in", answered)):
        print(f"{what}: " + ", ".join(f"{name} {value:.1f} ms" for name, value in found.items()))
    print(
        f"memory: {sizes[0] / 2**20:.1f} MiB to {sizes[-1] / 2**20:.1f} MiB; slope {slope.value / 2**10:+.0f} KiB/min "
        f"({slope.low / 2**10:+.0f} to {slope.high / 2**10:+.0f}), {slope.blocks} blocks"
    )
    if options.out is not None:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    grows = slope.low > 0
    return int(bool(failed or refused or grows))


if __name__ == "__main__":
    raise SystemExit(main())
