"""Trains in processes that are killed while they save, and goes on in fresh ones; prints what each saw as JSON.

Every process is a fork of this one, which itself computes nothing: none inherits a random state, a thread or a tensor.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from killed_saves import dies, kill_before
from torch import nn
from torch.nn import functional as F

from narrowcast.training import checkpoint
from narrowcast.training.loss_scale import DynamicScale
from narrowcast.training.policies import precision
from narrowcast.training.random_state import random_state, set_random_state
from narrowcast.training.trainer import Trainer

UPDATES = 9
EVERY = 2  # updates between checkpoints
#: Changes to the disk after which a process is killed: before the first checkpoint is there, and twice later.
KILLS = {"fp32": (12, 26, 47), "bf16-mixed": (12, 26, 47), "bf16-true": (47,), "fp16-mixed": (47,)}
PRECISIONS = {
    "fp32": precision("fp32"),
    "bf16-mixed": precision("bf16-mixed"),
    "bf16-true": precision("bf16-true"),
    "fp16-mixed": precision("fp16-mixed", loss_scale=DynamicScale(initial=2.0**20, interval=2)),
}


class Feed:
    """Batches of a data set in an order that NumPy's global generator draws anew for each pass."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(24, 1, 6, 6, generator=generator)
        self.targets = torch.randint(0, 4, (24,), generator=generator)
        self.state: dict[str, Any] = {"order": np.random.permutation(24), "place": 0}

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.state["place"] == 24:
            self.state = {"order": np.random.permutation(24), "place": 0}
        rows = self.state["order"][self.state["place"] : self.state["place"] + 4]
        self.state["place"] += 4
        return self.inputs[rows], self.targets[rows]


def build(name: str) -> tuple[Trainer, Feed]:
    torch.manual_seed(5)
    np.random.seed(6)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 4)
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=UPDATES + 1)
    return Trainer(
        model, optimizer, F.cross_entropy, precision=PRECISIONS[name], schedule=schedule, clip_norm=1.0, accumulate=2
    ), Feed()


def train(name: str, folder: Path) -> dict[str, Any]:
    """Train from the last checkpoint to the end; return from where, and all losses, scales and weights, to the last bit."""
    trainer, feed = build(name)
    found = checkpoint.load_latest(folder)
    start = 0
    if found is not None:
        trainer.load_state_dict(found.state["trainer"])
        feed.state = found.state["feed"]
        set_random_state(found.state["random"])
        start = found.step
    seen: list[Any] = []
    while trainer.steps < UPDATES:
        info = trainer.step(next(feed))
        seen.append([trainer.steps, info.loss.hex(), info.scale, info.skipped])
        if info.updated and trainer.steps % EVERY == 0:
            state = {"trainer": trainer.state_dict(), "feed": feed.state, "random": random_state()}
            checkpoint.save(folder, state, step=trainer.steps)
    weights = {key: value.double().reshape(-1).tolist() for key, value in trainer.model.state_dict().items()}
    return {"start": start, "seen": seen, "weights": weights}


def alone(work: Callable[[], dict[str, Any]], place: Path) -> dict[str, Any]:
    """Return what work returns in a process of its own."""
    answer = place / "answer.json"
    if dies(lambda: answer.write_text(json.dumps(work()))):
        raise RuntimeError("the process was killed")
    return json.loads(answer.read_text())


def interrupted(name: str, kill: int, place: Path) -> dict[str, Any]:
    """Train in a process that is killed, and go on in another."""
    folder = place / f"{name}-{kill}"

    def doomed() -> None:
        kill_before(kill)
        train(name, folder)

    killed = dies(doomed)
    return {"killed": killed, **alone(lambda: train(name, folder), place)}


def main(place: Path) -> None:
    torch.set_num_threads(1)
    print(
        json.dumps(
            {
                name: {
                    "straight": alone(lambda name=name: train(name, place / name), place),
                    "interrupted": [interrupted(name, kill, place) for kill in KILLS[name]],
                }
                for name in PRECISIONS
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
