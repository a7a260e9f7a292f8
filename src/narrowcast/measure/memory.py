"""Peak memory of a process that does nothing but serve one graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from narrowcast.errors import RuntimeFailedError
from narrowcast.recipes.target import Target
from narrowcast.runtimes import get_runtime

__all__ = ["PeakMemory", "peak_memory"]

RUNS = 5
TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of resident memory: at most, and how much of it came with loading and running the graph."""

    peak: int
    added: int


def peak_memory(graph: Path, inputs: Path, target: Target) -> PeakMemory:
    """Return the peak resident memory of a fresh process that loads a graph and runs it a few times.

    Args:
        graph: An ONNX file.
        inputs: An .npz file with one batch of inputs by name.
        target: Runtime, threads and batch size.

    Raises:
        RuntimeFailedError: The process failed.
    """
    arguments = [sys.executable, "-m", __name__, str(graph), str(inputs), target.model_dump_json()]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RuntimeFailedError(f"measuring the memory of {graph.name} failed: {last[0]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return PeakMemory(found["peak"], found["peak"] - found["idle"])


def _resident(field: str) -> int:
    """Return a memory field of this process in bytes (VmHWM is the peak, VmRSS the present)."""
    for line in Path(f"/proc/{os.getpid()}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeFailedError(f"/proc/self/status has no field {field}", next_step="memory is measured on Linux only")


def _main(graph: str, inputs: str, target_text: str) -> None:
    target = Target.model_validate_json(target_text)
    runtime = get_runtime(target.runtime)
    runtime.version()  # imports the runtime, which is not what is measured
    with np.load(inputs, allow_pickle=False) as archive:
        batch = {name: archive[name] for name in archive.files}
    idle = _resident("VmRSS")
    session = runtime.load(Path(graph), threads=target.threads, batch=target.batch)
    for _ in range(RUNS):
        session.run(batch)
    print(json.dumps({"peak": _resident("VmHWM"), "idle": idle}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
