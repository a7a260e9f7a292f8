"""What each of two processes does in the tests of replicas: ``python replicas.py FOLDER RANK``; prints what it saw as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from narrowcast.training import DynamicScale, Loss, Trainer, precision
from narrowcast.training.gradients import Ranks


class Gloo:
    """The ranks of the default group."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def all_finite(self, flag: torch.Tensor) -> torch.Tensor:
        agreed = flag.int()
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
        return agreed.bool()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total


class Faulty(nn.Module):
    """A network whose middle layer can be given a gradient that is not finite."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)
        self.fault = 0.0

    def forward(self, x):
        x = self.second(torch.relu(self.first(x)))
        if self.fault:
            x.register_hook(lambda gradient: gradient + self.fault)
        return self.head(torch.relu(x))


def weighted(outputs: torch.Tensor, targets: torch.Tensor) -> Loss:
    return Loss(cross_entropy(outputs, targets, reduction="sum"), int((targets != -100).sum()))


def data(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(count, 8, generator=torch.Generator().manual_seed(3))
    targets = inputs[:, :3].argmax(1)
    targets[1:5] = -100
    return inputs, targets


def trainer_of(ranks: Ranks | None, policy: str, *, accumulate: int = 2, loss=weighted, **settings) -> Trainer:
    model = Faulty()
    chosen = precision(policy, **settings)
    chosen.prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    called = model if ranks is None else DistributedDataParallel(model, gradient_as_bucket_view=True)
    return Trainer(called, optimizer, loss, precision=chosen, clip_norm=0.5, accumulate=accumulate, ranks=ranks)


def trained(ranks: Ranks | None, policy: str, sizes: list[int], *, flush: bool = False) -> dict:
    """Return losses and weights after two windows of micro-batches of unequal sizes, dealt out to ranks in turn."""
    settings = {"loss_scale": DynamicScale(initial=64.0), "overrides": {"*": "fp32"}} if policy == "fp16-mixed" else {}
    if policy == "bf16-true":
        settings = {"update": "kahan"}
    world, rank = (1, 0) if ranks is None else (ranks.world, ranks.rank)
    windows = 2
    micro = len(sizes) // world // windows
    trainer = trainer_of(ranks, policy, accumulate=micro * world if ranks is None else micro + flush, **settings)
    if ranks is None and flush:
        trainer.accumulate += world
    inputs, targets = data(sum(sizes))
    losses = []
    pieces = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
    for window in range(windows):
        mine = pieces[window * micro * world : (window + 1) * micro * world][rank::world]
        for batch in mine:
            info = trainer.step(batch)
        if flush:
            info = trainer.flush()
        losses.append([info.loss, info.grad_norm, info.updated])
    weights = torch.cat([one.detach().float().flatten() for one in trainer.model.parameters()])
    return {"losses": losses, "weights": weights.tolist()}


def fault_on_one(ranks: Ranks, where: str, fault: float) -> dict:
    """Return what every rank sees of a fault on rank 1."""
    trainer = trainer_of(ranks, "fp16-mixed", loss_scale=DynamicScale(initial=64.0))
    inputs, targets = data(16)
    for _ in range(2):
        trainer.step((inputs, targets))
    before = torch.cat([one.detach().flatten() for one in trainer.model.parameters()])
    if ranks.rank == 1 and where == "backward":
        trainer.model.module.fault = fault
    if ranks.rank == 1 and where == "forward":
        inputs = inputs * fault
    for _ in range(2):
        info = trainer.step((inputs, targets))
    after = torch.cat([one.detach().flatten() for one in trainer.model.parameters()])
    skip = trainer.ledger[0]
    return {
        "skipped": info.skipped,
        "moved": not torch.equal(before, after),
        "scale": trainer.scale,
        "steps": trainer.steps,
        "rank": skip.rank,
        "layer": skip.layers[0],
        "kind": skip.kind,
    }


def main(folder: str, rank: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    ranks = Gloo()
    sizes = [6, 3, 8, 2, 5, 5, 1, 10]
    seen = {"training": {}, "faults": {}}
    for policy in ("fp32", "bf16-mixed", "fp16-mixed", "bf16-true"):
        for flush in (False, True):
            key = f"{policy}{' flushed' if flush else ''}"
            seen["training"][key] = trained(ranks, policy, sizes, flush=flush)
    seen["faults"]["backward"] = fault_on_one(ranks, "backward", float("inf"))
    seen["faults"]["forward"] = fault_on_one(ranks, "forward", float("nan"))
    dist.destroy_process_group()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
