"""What one of two processes does in the tests of the doctor: trains, with an overflow or NaN on rank 1 alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from doctor_models import squares
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from narrowcast.training import DynamicScale, StaticScale, Trainer, precision
from narrowcast.training.distributed import Ranks
from narrowcast.training.doctor.watch import Watch
from narrowcast.training.sharding import shard


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.head(self.norm(self.second(torch.relu(self.first(x)))))


def fault(ranks: Ranks, kind: str, *, sharded: bool = False) -> dict:
    """Return what the doctor says of a fault on rank 1: ``overflow``, ``nan`` or ``scale``."""
    torch.manual_seed(0)
    model = Net()
    policy = precision("fp16-mixed", loss_scale=DynamicScale(initial=2.0**24) if kind == "scale" else StaticScale(8.0))
    if sharded:
        shard(model, ranks, policy, units=["second"])
    called = model if sharded else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    doctor = Watch(called, "deep", every=2, optimizer=optimizer, loss=squares, precision=policy, rank=ranks.rank)
    trainer = Trainer(called, optimizer, squares, precision=policy, ranks=ranks, watch=doctor)
    batch = torch.randn(4, 8), torch.randn(4, 2)
    if kind != "scale":
        trainer.step(batch)
    inputs = batch[0].clone()
    if ranks.rank == 1:
        inputs = {"overflow": inputs * 4e5, "nan": inputs, "scale": inputs * 100}[kind]
        if kind == "nan":
            inputs[3] = torch.nan
    before = torch.cat([one.detach().flatten() for one in model.parameters() if not sharded] or [torch.zeros(1)])
    info = trainer.step((inputs, batch[1]))
    after = torch.cat([one.detach().flatten() for one in model.parameters() if not sharded] or [torch.zeros(1)])
    summary = doctor.close()
    return {
        "skipped": info.skipped,
        "moved": not torch.equal(before, after),
        "events": [event.model_dump(mode="json") for event in doctor.events],
        "healthy": summary.verdict.healthy,
        "layers": [layer.name for layer in doctor.record().setting.layers],
        "world": doctor.record().setting.world,
    }


def main(folder: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(Path(folder) / "store"), 2), rank=rank, world_size=2)
    ranks = Ranks(rank, 2, torch.device("cpu"), init_device_mesh("cpu", (2,)))
    seen = {kind: fault(ranks, kind) for kind in ("overflow", "nan", "scale")}
    seen["overflow, sharded"] = fault(ranks, "overflow", sharded=True)
    dist.destroy_process_group()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
