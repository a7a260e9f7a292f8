"""Planted records of requests, and results made of them."""

from __future__ import annotations

import numpy as np

from narrowcast.measure.environment import environment
from narrowcast.measure.load.records import Outcome, Records, empty_records
from narrowcast.measure.load.summary import Span, summarise
from narrowcast.measure.load.values import Client, Energy, LoadResult, Run, ServerRecord, Slo, Workload

__all__ = ["CLIENT", "EVIL", "NO_ENERGY", "records", "result", "run"]

CLIENT = Client(processes=1, cpu_share=0.3, lag=1e-3, connections=4, waited=0)
NO_ENERGY = Energy(joules={}, per_request=None, unavailable="unavailable: this machine has no energy counter")
EVIL = "<script>alert(1)</script>\x1b[31m"


def records(size: int = 4000, rate: float = 400.0, *, late: float = 0.0) -> Records:
    """Return requests that took 10 to 20 ms, evenly spread, of which each hundredth was shed."""
    made = empty_records(size)
    made["intended"] = np.arange(size) / rate
    made["sent"] = made["intended"] + late
    made["done"] = made["sent"] + np.random.default_rng(0).uniform(0.01, 0.02, size)
    made["status"], made["outcome"], made["rows"] = 200, Outcome.OK, 2
    made["status"][50::100], made["outcome"][50::100] = 503, Outcome.SHED
    return made


def run(made: Records, slo: Slo | None = None, *, client: Client = CLIENT, concurrency: int | None = None) -> Run:
    return summarise(made, Span(1.0, 10.0, 0.005, concurrency), client, NO_ENERGY, slo)


def result(measured: Run, **fields: object) -> LoadResult:
    known: dict[str, object] = {
        "created": "2026-01-01T00:00:00+00:00",
        "server": ServerRecord(
            url="http://127.0.0.1:1",
            name=EVIL,
            version="1",
            extensions=(),
            model=EVIL,
            model_version="",
            platform="",
            inputs=("x FP32[-1,4]",),
        ),
        "workload": Workload(
            scenario="rate",
            arrivals="Poisson, 400/s",
            encoding="binary",
            data="random",
            batches={2: 1.0},
            bytes=(151,),
            timeout=10.0,
            connections=512,
            seed=0,
            lateness=0.005,
        ),
        "slo": Slo(percentile=95, seconds=0.05),
        "run": measured,
        "protocol": "open loop",
        "environment": environment(),
    }
    return LoadResult.model_validate(known | fields)
