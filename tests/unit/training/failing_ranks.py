"""Two processes of which the second fails alone, each in another way; started as a program.

Arguments: a folder with ``data.npz``, ``cpu`` (gloo) or ``cuda`` (NCCL), and a port for each case. Each process writes how it
ended, and ends.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from narrowcast.training import feeding
from narrowcast.training.distributed import Ranks, replicate
from narrowcast.training.doctor import replay
from narrowcast.training.doctor.watch import Watch
from narrowcast.training.policies import precision
from narrowcast.training.reading import validated
from narrowcast.training.run import fit
from narrowcast.training.sharding import shard
from narrowcast.training.trainer import Trainer

TIMEOUT_S = 600  # far beyond what the tests wait
FAILS_AT = 3  # the call at which rank 1 fails


class Faulty(nn.Module):
    """A network that fails on rank 1, in one of its forward passes."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.error = error
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = torch.relu(self.first(x.flatten(1)))
        if self.error is not None and self.calls == FAILS_AT and os.environ["RANK"] == "1":
            raise self.error
        return self.head(self.second(x))


def healthy() -> tuple[nn.Module, Tensor]:
    return Faulty(), torch.zeros(2, 1, 4, 4)


def asserting() -> tuple[nn.Module, Tensor]:
    return Faulty(AssertionError("planted in the network")), torch.zeros(2, 1, 4, 4)


def crammed() -> tuple[nn.Module, Tensor]:
    return Faulty(torch.OutOfMemoryError("planted in the network")), torch.zeros(2, 1, 4, 4)


def managed(place: Path, device: str, network: str, held: str) -> None:
    """Run a config."""
    settings = {
        "network": f"py:__main__:{network}",
        "data": {"train": f"npz:{place / 'data.npz'}"},
        "batch": 16,
        "epochs": 3,
        "device": device,
        "ranks": held,
    }
    fit(validated(settings, "test"), place / network / held)


def loader(place: Path, device: str) -> None:
    """The data of rank 1 cannot be read."""
    load = feeding.load

    def failing(data: Any, wanted: Any, what: str) -> Any:
        if what == f"batch {FAILS_AT}" and os.environ["RANK"] == "1":
            raise ValueError("planted in the data")
        return load(data, wanted, what)

    feeding.load = failing
    managed(place, device, "healthy", "replicated")


def spread(ranks: Ranks, held: str) -> nn.Module:
    torch.manual_seed(0)
    model = Faulty().to(ranks.device)
    return shard(model, ranks, "fp16-mixed") if held == "sharded" else replicate(model, ranks, "fp16-mixed")


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.float(), targets)


def own_loop(
    device: str,
    held: str,
    loss: Callable[[Any, Any], Tensor] = cross_entropy,
    *,
    calls: int = 0,
    error: Exception | None = None,
    skips: Path | None = None,
) -> Any:
    """Train in a loop of one's own; the last batch but one overflows on rank 1.

    With a file of skips, which rank 0 writes, the device decides, and the doctor hears of it late.
    """
    with Ranks.from_environment(device, timeout_s=TIMEOUT_S) as ranks:
        model = spread(ranks, held)
        late = skips is not None
        optimizer = (
            torch.optim.AdamW(model.parameters(), fused=True) if late else torch.optim.SGD(model.parameters(), lr=0.1)
        )
        policy = precision("fp16-mixed", loss_scale=8.0)
        doctor = Watch(model, optimizer=optimizer, loss=loss, precision=policy, rank=ranks.rank)
        trainer = Trainer(model, optimizer, loss, precision=policy, ranks=ranks, watch=doctor)
        trainer._settles_late = late
        if skips is not None and ranks.rank == 0:
            trainer.ledger.write_to(skips)
        faulty = next(one for one in model.modules() if isinstance(one, Faulty))
        torch.manual_seed(ranks.rank)
        inputs, targets = torch.randn(4, 16).to(ranks.device), torch.randint(0, 4, (4,)).to(ranks.device)
        for number in range(4):
            if number == 3:
                faulty.error, faulty.calls = error, calls
            trainer.step((inputs * 1e6 if number == 3 and ranks.rank == 1 else inputs, targets))
        trainer.step((inputs, targets))
        return {
            "said": [event.sentence for event in doctor.events],
            "steps": trainer.steps,
            "skipped": trainer.skipped,
        }


def loss_alone(device: str) -> None:
    """The loss function fails on rank 1."""
    calls = [0]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == FAILS_AT and os.environ["RANK"] == "1":
            raise ZeroDivisionError("planted in the loss")
        return cross_entropy(outputs, targets)

    own_loop(device, "replicated", loss)


def no_room(device: str) -> Any:
    """Rank 1 sees beforehand that it has no room for a replay of sharded weights."""
    replay.has_room = lambda scene: os.environ["RANK"] != "1"
    return own_loop(device, "sharded")


def amid_replay(device: str) -> None:
    """Rank 1 runs out of memory within a replay of sharded weights."""
    own_loop(device, "sharded", calls=FAILS_AT - 2, error=torch.OutOfMemoryError("planted in the replay"))


def no_ledger(place: Path, device: str) -> None:
    """Rank 0 cannot write down that an update of sharded weights was left out, which all ranks learn at the same time."""
    own_loop(device, "sharded", skips=place / "missing" / "skips.jsonl")


CASES: dict[str, Callable[[Path, str], Any]] = {
    "loader": loader,
    "assertion": lambda place, device: managed(place, device, "asserting", "sharded"),
    "memory": lambda place, device: managed(place, device, "crammed", "replicated"),
    "loss": lambda place, device: loss_alone(device),
    "room": lambda place, device: no_room(device),
    "replay": lambda place, device: amid_replay(device),
    "ledger": no_ledger,
}


def work(case: str, rank: int, place: Path, device: str, port: str) -> NoReturn:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    try:
        seen = {"kind": None, "said": CASES[case](place, device)}
    except Exception as error:
        seen = {"kind": type(error).__name__, "said": str(error)}
    (place / f"{case}-{rank}.json").write_text(json.dumps(seen))
    os._exit(0)


def main(place: Path, device: str, ports: list[str]) -> None:
    children: list[int] = []
    for case, port in zip(CASES, ports, strict=True):
        for rank in range(2):
            child = os.fork()
            if child == 0:
                work(case, rank, place, device, port)
            children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
