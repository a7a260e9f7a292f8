"""NVIDIA's load generator, unchanged, against the server; where it is installed."""

from __future__ import annotations

import csv
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from serving_models import function, spec

from narrowcast.serving.catalogue import Hosting
from narrowcast.serving.scheduling.queue import Batching
from narrowcast.serving.scheduling.scheduler import Settings
from narrowcast.serving.signature import Signature
from narrowcast.serving.workers.sources import Placement

_INSTALLED = Path(__file__).parents[3] / "benchmarks" / "perf_analyzer.work" / "perf_analyzer"
PROGRAM = str(_INSTALLED) if _INSTALLED.exists() else shutil.which("perf_analyzer")
TEXTS = Signature((spec("t", -1, 2, datatype="BYTES"),), (spec("t", -1, 2, datatype="BYTES"),), batched=True)

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        PROGRAM is None, reason="perf_analyzer is not here; benchmarks/install_perf_analyzer.sh gets it"
    ),
]


@pytest.fixture(scope="module")
def running(serve_once: Any) -> Any:
    sources = {"double": function(), "texts": function(lambda inputs: inputs, TEXTS)}
    hosting = Hosting(Placement.INLINE, settings=Settings(Batching(8)))
    return serve_once(sources, hosting=hosting, grpc_port=0, shared_memory=True)


@pytest.mark.parametrize("model", ["double", "texts"])
@pytest.mark.parametrize(
    "options",
    [
        ["-i", "http"],
        ["-i", "http", "--input-tensor-format=json", "--output-tensor-format=json"],
        ["-i", "http", "--async", "--shared-memory=system"],
        ["-i", "grpc"],
        ["-i", "grpc", "--async", "--streaming"],
        ["-i", "grpc", "--shared-memory=system"],
        ["-i", "grpc", "-b", "4"],
    ],
    ids=lambda options: " ".join(options[1:]),
)
def test_it_measures(running: Any, options: list[str], model: str, tmp_path: Path) -> None:
    address = running.grpc_address if "grpc" in options else running.address
    found = tmp_path / "found.csv"
    command = [PROGRAM, "-m", model, "-u", address, *options, "--concurrency-range", "2", "-f", str(found)]
    # One window of requests, however much they vary: what is tested is that they succeed and are counted.
    command += ["--measurement-mode", "count_windows", "--measurement-request-count", "50", "-s", "999", "-r", "10"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    rows = list(csv.DictReader(found.read_text().splitlines()))
    assert float(rows[0]["Inferences/Second"]) > 0
    assert float(rows[0]["Server Compute Infer"]) >= 0, "it read the statistics"
