"""Small runs: noisy images of four classes, networks of one's own by reference, and programs that run beside the tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

__all__ = ["TWO_DEVICES", "free_ports", "own_networks", "result_of", "told", "write_images"]

#: Where two processes train together: on the CPU, and on two GPUs where there are as many.
TWO_DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
        ],
    ),
]


def write_images(path: Path, *, size: int = 200, noise: float = 0.5) -> None:
    """Write images ``[size, 1, 4, 4]`` and their labels: four patterns with noise."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, size)
    images = rng.standard_normal((4, 1, 4, 4))[labels] + noise * rng.standard_normal((size, 1, 4, 4))
    np.savez(path, input=images.astype(np.float32), labels=labels)


def own_networks(folder: Path, module: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a module of networks that ``py:MODULE:FUNCTION`` finds, and train on one thread."""
    (folder / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, module, raising=False)
    torch.set_num_threads(1)


def told(folder: str | Path) -> list[dict[str, Any]]:
    """Return a run's log without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "samples_per_s"} for line in lines]


def result_of(program: str, *arguments: object) -> Any:
    """Return what a program beside the tests prints as JSON; it fails with what the program said."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(program)), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
