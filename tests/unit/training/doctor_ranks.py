"""What one of two processes does in the tests of the doctor: trains, with an overflow or NaN on rank 1 alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from doctor_models import DelayedLinear, squares
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from narrowcast.errors import TrainingError
from narrowcast.training import DynamicScale, StaticScale, Trainer, precision
from narrowcast.training.distributed import Ranks
from narrowcast.training.doctor import replay
from narrowcast.training.doctor.watch import Watch
from narrowcast.training.sharding import shard


class Net(nn.Module):
    def __init__(self, cast: bool) -> None:
        super().__init__()
        self.first, self.second, self.head = (
            nn.Linear(8, 8),
            (DelayedLinear if cast else nn.Linear)(8, 8),
            nn.Linear(8, 2),
        )
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.head(self.norm(self.second(torch.relu(self.first(x)))))


#: What the loss scale is, by fault; 8 where it does not matter.
SCALES = {"scale": DynamicScale(initial=2.0**24), "vanished": StaticScale(1.0), "validated": StaticScale(1.0)}


def fault(ranks: Ranks, kind: str, *, sharded: bool = False, gather: str = "stored", late: bool = False) -> dict:
    """Return what the doctor says of a fault.

    Args:
        ranks: The two processes.
        kind: On rank 1 alone ``overflow``, ``nan`` (in the data), ``weight`` (a parameter that is NaN), ``scale`` (too high to
            begin with), or ``cast`` (a stale scale of FP8); on both ``vanished``, or ``validated``: the same, looked at after
            a forward pass without gradients.
        sharded: Whether the weights are spread over the ranks, else they are replicas.
        gather: As :func:`narrowcast.training.sharding.shard` takes it.
        late: Whether the device decides, and the doctor hears of it when the next passes are queued.
    """
    torch.manual_seed(0)
    model = Net(kind == "cast")
    model.to(ranks.device)
    if kind == "cast":
        model.second.largest.fill_(8.0)
    policy = precision("fp16-mixed", loss_scale=SCALES.get(kind, StaticScale(8.0)))
    if sharded:
        shard(model, ranks, policy, units=["second"], gather=gather)
    called = model if sharded else DistributedDataParallel(model)
    make = (
        (lambda params: torch.optim.AdamW(params, fused=True))
        if late
        else (lambda params: torch.optim.SGD(params, lr=0.1))
    )
    optimizer = make(model.parameters())

    def loss(outputs, targets):
        return squares(outputs, targets) * (1e-8 if kind in ("vanished", "validated") else 1.0)

    every = 4 if kind == "validated" else 2
    doctor = Watch(called, "deep", every=every, optimizer=optimizer, loss=loss, precision=policy, rank=ranks.rank)
    trainer = Trainer(called, optimizer, loss, precision=policy, ranks=ranks, watch=doctor)
    trainer._settles_late = late
    batch = torch.randn(4, 8).to(ranks.device), torch.randn(4, 2).to(ranks.device)
    for _ in range({"scale": 0, "cast": 2, "vanished": 4, "validated": 3}.get(kind, 1)):
        trainer.step(batch)
    inputs = batch[0].clone()
    if ranks.rank == 1:
        inputs *= {"overflow": 4e5, "scale": 100, "cast": 50}.get(kind, 1)
        if kind == "nan":
            inputs[3] = torch.nan
        if kind == "weight":
            with torch.no_grad():
                replay.local(model.second.weight)[-1, -1] = torch.nan
    before = [replay.local(one.detach()).clone() for one in model.parameters()]
    info = trainer.step((inputs, batch[1]))
    after = [replay.local(one.detach()) for one in model.parameters()]
    same = all(torch.equal(one, two) or one.isnan().any() for one, two in zip(before, after, strict=True))
    if late:
        assert not doctor.events
        trainer.step(batch)
        assert doctor.events
        trainer.finish()
    if kind == "validated":
        with torch.no_grad():
            model(inputs)
    doctor.save(trainer.steps)
    summary = doctor.close()
    return {
        "skipped": info.skipped,
        "moved": not same,
        "events": [event.model_dump(mode="json") for event in doctor.events],
        "healthy": summary.verdict.healthy,
        "layers": [layer.name for layer in doctor.record().setting.layers],
        "notes": doctor.record().setting.notes,
        "world": doctor.record().setting.world,
        "gradients": all(one.grad is None for one in model.parameters()),
    }


def windows(ranks: Ranks, *, sharded: bool) -> dict:
    """Return what comes of windows of two micro-batches, some of which overflow on rank 1.

    Of three runs: with a doctor that hears of it at once, with one that hears of it amid the next window, and without one.
    """
    seen: dict[str, list] = {"weights": [], "events": [], "skipped": []}
    for late, watched in ((False, True), (True, True), (True, False)):
        torch.manual_seed(0)
        model = Net(cast=False).to(ranks.device)
        policy = precision("fp16-mixed", loss_scale=StaticScale(8.0))
        if sharded:
            shard(model, ranks, policy, units=["second"])
        called = model if sharded else DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        doctor = Watch(called, "deep", every=2, optimizer=optimizer, loss=squares, precision=policy, rank=ranks.rank)
        watch = doctor if watched else None
        trainer = Trainer(called, optimizer, squares, precision=policy, ranks=ranks, watch=watch, accumulate=2)
        trainer._settles_late = late
        for number in range(11):
            factor = 4e5 if ranks.rank == 1 and number in (1, 6, 8) else 1.0
            trainer.step((torch.randn(4, 8).to(ranks.device) * factor, torch.randn(4, 2).to(ranks.device)))
        trainer.flush()
        trainer.finish()
        seen["weights"].append([replay.local(one.detach()).tolist() for one in model.parameters()])
        seen["events"].append([event.model_dump(mode="json") for event in doctor.events])
        seen["skipped"].append(trainer.skipped)
    return seen


def stagnant(ranks: Ranks) -> list[dict] | None:
    """Return what the doctor says of sharded BF16 weights that plain rounding keeps where they are.

    None where PyTorch sums their gradients in BF16, as 2.11 does: the trainer refuses that.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)).to(ranks.device)
    with torch.no_grad():
        for one in model.parameters():
            one.fill_(1.0)
    policy = precision("bf16-true", update="plain")
    try:
        shard(model, ranks, policy, units=["0"])
    except TrainingError:
        return None
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    doctor = Watch(model, every=4, optimizer=optimizer, loss=squares, precision=policy, rank=ranks.rank)
    trainer = Trainer(model, optimizer, squares, precision=policy, ranks=ranks, watch=doctor)
    for _ in range(18):
        trainer.step((torch.randn(4, 64).to(ranks.device), torch.randn(4, 2).to(ranks.device)))
    doctor.close()
    return [event.model_dump(mode="json") for event in doctor.events]


def main(folder: str, rank: int, kind: str) -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu") if kind == "cpu" else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(str(Path(folder) / "store"), 2)
    dist.init_process_group("gloo" if kind == "cpu" else "nccl", store=store, rank=rank, world_size=2)
    ranks = Ranks(rank, 2, device, init_device_mesh(kind, (2,)))
    seen = {kind: fault(ranks, kind) for kind in ("overflow", "nan", "scale")}
    for kind in ("overflow", "nan", "scale", "weight", "cast", "vanished", "validated"):
        seen[f"{kind}, sharded"] = fault(ranks, kind, sharded=True)
    for kind in ("overflow", "nan"):
        seen[f"{kind}, late"] = fault(ranks, kind, late=True)
        seen[f"{kind}, sharded, late"] = fault(ranks, kind, sharded=True, late=True)
    seen["overflow, gathered"] = fault(ranks, "overflow", sharded=True, gather="compute")
    seen["windows"] = windows(ranks, sharded=False)
    seen["windows, sharded"] = windows(ranks, sharded=True)
    seen["stagnant"] = stagnant(ranks)
    dist.destroy_process_group()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
