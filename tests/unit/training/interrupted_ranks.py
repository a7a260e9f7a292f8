"""Runs of two processes of which one is told to stop; started as a program, which prints what each rank saw.

Arguments: a folder with ``data.npz``, and a port for each run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from narrowcast.training.progress import Silent
from narrowcast.training.reading import validated
from narrowcast.training.run import fit

HELD = ("replicated", "sharded")
RUNS = ("whole", "cut", "again")
STOP = 4  # the step after which rank 1 is told to stop


def net() -> tuple[nn.Module, torch.Tensor]:
    layers = nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4)
    return nn.Sequential(*layers), torch.zeros(2, 1, 4, 4)


class Stops(Silent):
    """Has rank 1 terminated, twice in a moment, as by a launcher that tells a whole machine and then each process."""

    def stepped(self, step: int) -> None:
        if step == STOP and os.environ["RANK"] == "1":
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)


def run(held: str, name: str, place: Path) -> dict[str, Any]:
    """Run, and return how it ended."""
    settings = {
        "network": "py:__main__:net",
        "data": {"train": f"npz:{place / 'data.npz'}", "augment": {"noise": 0.1}},
        "batch": 16,
        "epochs": 3,
        "accumulate": 2,
        "log": 100,  # no step is logged but the last one
        "device": "cpu",
        "doctor": "off",
        "ranks": held,
        "checkpoint": 100,
    }
    out = place / held / ("whole" if name == "whole" else "cut")
    try:
        result = fit(
            validated(settings, "test"), out, resume=name == "again", progress=Stops() if name == "cut" else None
        )
    except KeyboardInterrupt:
        return {"stopped": sorted(path.name for path in (out / "checkpoints").iterdir())}
    return {"steps": result.steps, "sha256": result.sha256}


def work(rank: int, place: Path, ports: list[int]) -> NoReturn:
    seen: dict[str, Any] = {}
    for held in HELD:
        for name in RUNS:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": ports.pop()}
            os.environ.update({key: str(number) for key, number in numbers.items()}, MASTER_ADDR="127.0.0.1")
            seen[f"{held} {name}"] = run(held, name, place)
    (place / f"seen-{rank}.json").write_text(json.dumps(seen))
    os._exit(0)


def main(place: Path, ports: list[int]) -> None:
    children: list[int] = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                work(rank, place, ports)
            finally:
                os._exit(1)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        sys.exit(1)
    print(json.dumps([json.loads((place / f"seen-{rank}.json").read_text()) for rank in range(2)]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), [int(port) for port in sys.argv[2:]])
