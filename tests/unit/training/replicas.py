"""What each of two processes does in the tests of replicas: ``python replicas.py FOLDER RANK``; prints what it saw as JSON."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from narrowcast.errors import TrainingError
from narrowcast.training import DynamicScale, Loss, Trainer, precision
from narrowcast.training.checks import unwrapped
from narrowcast.training.distributed import Ranks
from narrowcast.training.fused import FusedAdamW
from narrowcast.training.sharding import shard

#: Policy, whether weights are sharded, and whether windows are closed early.
CASES = [
    ("fp32", False, False),
    ("bf16-mixed", False, True),
    ("fp16-mixed", False, False),
    ("fp16-mixed", False, True),
    ("bf16-true", False, False),
    ("bf16-true", False, True),
    ("fp32", True, False),
    ("fp16-mixed", True, True),
]


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


def trainer_of(ranks: Ranks | None, policy: str, *, accumulate: int = 2, sharded: bool = False, **settings) -> Trainer:
    model = Faulty()
    chosen = precision(policy, **settings)
    chosen.prepare(model)
    called = model
    if sharded:
        shard(model, ranks, chosen, units=["second"])
    elif ranks is not None:
        called = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    return Trainer(called, optimizer, weighted, precision=chosen, clip_norm=0.5, accumulate=accumulate, ranks=ranks)


def weights(trainer: Trainer) -> torch.Tensor:
    held = [one.detach() for one in trainer.model.parameters()]
    return torch.cat([(one.full_tensor() if isinstance(one, DTensor) else one).float().flatten() for one in held])


def trained(ranks: Ranks | None, policy: str, sizes: list[int], *, flush: bool = False, sharded: bool = False) -> dict:
    """Return losses and weights after two windows of micro-batches of unequal sizes, dealt out to ranks in turn."""
    settings = {"loss_scale": DynamicScale(initial=64.0), "overrides": {"*": "fp32"}} if policy == "fp16-mixed" else {}
    if policy == "bf16-true":
        settings = {"update": "kahan"}
    world, rank = (1, 0) if ranks is None else (ranks.world, ranks.rank)
    windows = 2
    micro = len(sizes) // world // windows
    window = micro * world if ranks is None else micro + flush
    trainer = trainer_of(ranks, policy, accumulate=window, sharded=sharded, **settings)
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
    return {"losses": losses, "weights": weights(trainer).tolist()}


def fault_on_one(ranks: Ranks, where: str, fault: float, *, sharded: bool = False) -> dict:
    """Return what every rank sees of a fault on rank 1."""
    trainer = trainer_of(ranks, "fp16-mixed", loss_scale=DynamicScale(initial=64.0), sharded=sharded)
    inputs, targets = data(16)
    for _ in range(2):
        trainer.step((inputs, targets))
    before = weights(trainer)
    if sharded:  # what is run between two windows, such as a replay, says nothing of the next one
        trainer.model(inputs * torch.nan if ranks.rank == 0 else inputs).sum().backward()
        trainer.optimizer.zero_grad()
    if ranks.rank == 1 and where == "backward":
        unwrapped(trainer.model).fault = fault
    if ranks.rank == 1 and where == "forward":
        inputs = inputs * fault
    for _ in range(2):
        info = trainer.step((inputs, targets))
    after = weights(trainer)
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


def stopped(ranks: Ranks) -> str:
    """Return what every rank is told of a NaN in rank 1's data, without loss scaling."""
    trainer = trainer_of(ranks, "bf16-mixed", accumulate=1)
    inputs, targets = data(16)
    trainer.step((inputs, targets))
    try:
        trainer.step((inputs * torch.nan if ranks.rank == 1 else inputs, targets))
    except TrainingError as error:
        return error.what
    return ""


def weightless(ranks: Ranks) -> list[float | str]:
    """Return the losses of a window, and of one that weighs nothing on rank 1, and what is said of one without any weight."""
    trainer = trainer_of(ranks, "fp32", accumulate=1)
    inputs, targets = data(16)
    nothing = torch.full_like(targets, -100)
    seen: list[float | str] = [trainer.step((inputs, targets)).loss]
    seen.append(trainer.step((inputs, nothing if ranks.rank == 1 else targets)).loss)
    try:
        trainer.step((inputs, nothing))
    except TrainingError as error:
        seen.append(error.what)
    return seen


#: By number of a step: what is added to gradients on rank 1 alone.
FAULTS = {3: float("inf"), 4: float("nan"), 8: float("inf"), 13: float("nan")}
#: Policy and optimizer of runs whose decisions are learnt late, and whether weights are sharded.
LATE = [
    ("fp16-mixed", torch.optim.AdamW, False),
    ("fp16-mixed", torch.optim.SGD, False),
    ("fp16-mixed", FusedAdamW, False),
    ("bf16-true", torch.optim.AdamW, False),
    ("fp16-mixed", torch.optim.AdamW, True),
    ("fp16-mixed", torch.optim.Adam, True),
    ("bf16-true", torch.optim.AdamW, True),
]


def fused_trainer(ranks: Ranks, policy: str, kind: type, *, sharded: bool, late: bool, **options) -> Trainer:
    """Return a trainer that can leave updates out without the host, and does not wait for it if told so."""
    model = Faulty()
    settings = {"loss_scale": DynamicScale(initial=64.0, interval=3)} if policy == "fp16-mixed" else {"update": "kahan"}
    chosen = precision(policy, **settings)
    chosen.prepare(model)
    called = model
    if sharded:
        shard(model, ranks, chosen, units=["second"])
    else:
        called = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = kind(model.parameters(), lr=0.02, **({} if kind is FusedAdamW else {"fused": True}))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    trainer = Trainer(
        called,
        optimizer,
        weighted,
        precision=chosen,
        schedule=schedule,
        clip_norm=0.5,
        ranks=ranks,
        nonfinite="skip",
        **options,
    )
    trainer._settles_late = late
    return trainer


def plain(state: object) -> object:
    """Return a state as JSON holds it, with this rank's part of what is sharded."""
    if isinstance(state, torch.Tensor):
        return (state.to_local() if isinstance(state, DTensor) else state).double().flatten().tolist()
    if isinstance(state, dict):
        return {str(key): plain(one) for key, one in state.items()}
    return [plain(one) for one in state] if isinstance(state, list | tuple) else state


def late_course(ranks: Ranks, policy: str, kind: type, *, sharded: bool, late: bool, accumulate: int, cut: int) -> str:
    """Train with faults on rank 1, go on in another trainer from a state, and return all that was seen.

    Rank 0 alone asks at once what became of each update.
    """
    made = {"sharded": sharded, "late": late, "accumulate": accumulate}
    trainer = fused_trainer(ranks, policy, kind, **made)
    inputs, targets = data(16)
    infos, skips = [], []
    for number in range(18):
        if number == cut:
            saved = copy.deepcopy(trainer.state_dict())
            skips += list(trainer.ledger)
            trainer = fused_trainer(ranks, policy, kind, **made)
            trainer.step((inputs, targets))  # a window or a decision under way when the state is loaded
            trainer.load_state_dict(saved)
        unwrapped(trainer.model).fault = FAULTS.get(number, 0.0) if ranks.rank == 1 else 0.0
        part = inputs.roll(number + ranks.rank, 0)
        infos.append(trainer.step((part, part[:, :3].argmax(1))))
        if ranks.rank == 0 and infos[-1].skipped:
            assert trainer.skipped
    seen = [[one.loss, one.grad_norm, one.lr, one.scale, one.step, one.updated, one.skipped] for one in infos]
    return json.dumps([seen, [asdict(one) for one in (*skips, *trainer.ledger)], plain(trainer.state_dict())])


def late_decisions(ranks: Ranks) -> dict[str, list[str]]:
    """Return what runs came to whose decisions were known at once, and late."""
    seen = {}
    for policy, kind, sharded in LATE:
        for accumulate, cut in ((1, 5), (1, 7), (2, 10)):
            how = {"sharded": sharded, "accumulate": accumulate, "cut": cut}
            seen[f"{policy} {kind.__name__} {sharded} {accumulate} {cut}"] = [
                late_course(ranks, policy, kind, late=late, **how) for late in (False, True)
            ]
    return seen


def main(folder: str, rank: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    ranks = Ranks(rank, 2, torch.device("cpu"), init_device_mesh("cpu", (2,)))
    sizes = [6, 3, 8, 2, 5, 5, 1, 10]
    seen = {"training": {}, "faults": {}}
    for policy, sharded, flush in CASES:
        how = {"flush": flush, "sharded": sharded}
        seen["training"][f"{policy} {how}"] = trained(ranks, policy, sizes, **how)
    for sharded in (False, True):
        end = " sharded" if sharded else ""
        seen["faults"][f"backward{end}"] = fault_on_one(ranks, "backward", float("inf"), sharded=sharded)
        seen["faults"][f"forward{end}"] = fault_on_one(ranks, "forward", float("nan"), sharded=sharded)
    seen["stopped"] = stopped(ranks)
    seen["weightless"] = weightless(ranks)
    seen["late"] = late_decisions(ranks)
    dist.destroy_process_group()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
