"""What the load generator costs and how well it keeps time, beside a closed loop on uvloop that does nothing else.

    python benchmarks/load_generator.py [--seconds 4] [--rounds 7] [--out results.json]

A bare HTTP server (asyncio, uvloop, httptools; it answers with a fixed body) runs on the first core, the generators in turn on
another, in each round:

- ``bare``: one connection in a closed loop on uvloop, without a schedule, records or time-outs: about the least that a client
  in Python costs;
- ``closed``: ``narrowcast load --concurrency 1``;
- ``open``: ``narrowcast load`` with Poisson arrivals at each of ``--rates``.

Costs are CPU time (user and system) per request, which other work on the machine changes less than the time that passes; ratios
are medians over rounds. Lateness is from when a request was due to when it was sent, and needs an idle machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httptools
import numpy as np
import uvloop

from narrowcast.load.arrivals import Poisson
from narrowcast.load.http import HttpClient
from narrowcast.load.sender import ClosedJob, OpenJob, Sender, new_loop
from narrowcast.load.target import Target

BODY = b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[1.0,2.0,3.0,4.0]}]}'
REQUEST = b"POST /v2/models/noop/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
ANSWER = b'{"model_name":"noop","outputs":[{"name":"y","datatype":"FP32","shape":[1,4],"data":[1.0,2.0,3.0,4.0]}]}'


class Server(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER))


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def server_on(core: int) -> Iterator[int]:
    process = subprocess.Popen([sys.executable, __file__, "--serve", str(core)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.terminate()
        process.wait(20)


class Bare(asyncio.Protocol):
    count = 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        self.count += 1
        self.transport.write(REQUEST)


async def bare(port: int, seconds: float) -> dict[str, float]:
    transport, loader = await asyncio.get_running_loop().create_connection(Bare, "127.0.0.1", port)
    cpu = time.process_time()
    transport.write(REQUEST)
    await asyncio.sleep(seconds)
    found = {"cpu_us": (time.process_time() - cpu) / loader.count * 1e6, "rate": loader.count / seconds}
    transport.abort()
    return found


async def ours(port: int, job: OpenJob | ClosedJob) -> dict[str, float]:
    client = HttpClient(Target("http", "127.0.0.1", port), [REQUEST], 64, 10.0)
    sender = Sender(client, [1], [len(BODY)])
    await sender.prepare(job)
    cpu = time.process_time()
    sent = await sender.run(job, time.monotonic() + 0.05, lambda progress: None)
    count = len(sent.records)
    assert (sent.records["status"] == 200).all()
    late = sent.records["sent"] - sent.records["intended"]
    await client.close()
    return {
        "cpu_us": (time.process_time() - cpu) / count * 1e6,
        "rate": count / sent.end,
        "late_p50_us": float(np.median(late)) * 1e6,
        "late_p99_us": float(np.percentile(late, 99)) * 1e6,
    }


def one_round(port: int, seconds: float, rates: list[float], seed: int) -> dict[str, dict[str, float]]:
    kinds = np.zeros(1, np.int64)
    found = {"bare": uvloop.run(bare(port, seconds))}
    jobs: dict[str, OpenJob | ClosedJob] = {"closed": ClosedJob(1, 1, kinds, seconds)}
    for rate in rates:
        due = Poisson(rate).times(seconds, np.random.default_rng(seed))
        jobs[f"open {rate:g}/s"] = OpenJob(due, np.zeros(len(due), np.int64), seconds)
    for name, job in jobs.items():
        with asyncio.Runner(loop_factory=new_loop) as runner:
            found[name] = runner.run(ours(port, job))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rates", default="500,2000,4000")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        os.sched_setaffinity(0, {arguments.serve})
        uvloop.run(serve())
        return
    cores = sorted(os.sched_getaffinity(0))
    rates = [float(rate) for rate in arguments.rates.split(",")]
    with server_on(cores[0]) as port:
        os.sched_setaffinity(0, {cores[-1]})
        rounds = [one_round(port, arguments.seconds, rates, seed) for seed in range(arguments.rounds)]
    print(f"load average {os.getloadavg()[0]:.1f}")
    for name in rounds[0]:
        middle = {key: statistics.median(one[name][key] for one in rounds) for key in rounds[0][name]}
        ratio = statistics.median(one[name]["cpu_us"] / one["bare"]["cpu_us"] for one in rounds)
        late = (
            f"  late p50 {middle['late_p50_us']:6.0f} us, p99 {middle['late_p99_us']:6.0f} us" if "open" in name else ""
        )
        print(
            f"{name:12} {middle['rate']:7.0f}/s  {middle['cpu_us']:6.1f} us CPU a request  {ratio:5.2f} of bare{late}"
        )
    if arguments.out:
        arguments.out.write_text(json.dumps({"load": os.getloadavg()[0], "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
