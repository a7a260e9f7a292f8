"""Training on several GPUs: our step beside PyTorch's DistributedDataParallel and FSDP2 written by hand, and one process.

torchrun --standalone --nproc-per-node 2 benchmarks/training_ranks.py

Writes training-ranks.json into --out ($OUT or benchmarks/results unless given), after every case. With --tiny --device cpu
everything runs small and over gloo, to try the script.
"""

import argparse
import contextlib
import io
import itertools
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from training_gpu import CLIP, Report, set_tf32, spread, timed
from training_loops import CAST, loss_itself
from training_models import text_workload, workloads

from narrowcast.training import sharded_checkpoint
from narrowcast.training.checks import unwrapped
from narrowcast.training.distributed import Ranks, replicate
from narrowcast.training.sharded_checkpoint import Layout
from narrowcast.training.sharding import shard
from narrowcast.training.trainer import Trainer

HELD = ("replicated", "sharded", "sharded, narrow traffic")
APART = {"fp32": 1e-5, "bf16-mixed": 1e-2, "fp16-mixed": 1e-2}  # relative, of a loss, from one process
STEPS = 12  # of a check; half of them before the checkpoint


class Plain:
    """What a person writes with PyTorch's parts alone."""

    def __init__(self, model, held, precision, ranks):
        self.cast, self.device = CAST.get(precision), ranks.device.type
        if held == "replicated":
            self.model = DistributedDataParallel(model, [ranks.device] if self.device == "cuda" else None)
        else:
            narrow = MixedPrecisionPolicy(param_dtype=self.cast, reduce_dtype=torch.float32)
            policy = narrow if held.endswith("traffic") else MixedPrecisionPolicy()
            for part in (*model.blocks, model):
                fully_shard(part, mesh=ranks.mesh, mp_policy=policy)
            self.model = model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.scaler = torch.amp.GradScaler(self.device, enabled=precision == "fp16-mixed")

    def step(self, batch):
        with torch.autocast(self.device, dtype=self.cast, enabled=self.cast is not None):
            loss = self.model(*batch)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class Ours:
    """The same through the trainer."""

    def __init__(self, model, held, precision, ranks):
        if held == "replicated":
            self.model = replicate(model, ranks, precision)
        else:
            gather = "compute" if held.endswith("traffic") else "stored"
            self.model = shard(model, ranks, precision, gather=gather)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        together = ranks if ranks.world > 1 else None
        self.trainer = Trainer(
            self.model, self.optimizer, loss_itself, precision=precision, clip_norm=CLIP, ranks=together, watch=None
        )

    def step(self, batch):
        return self.trainer.step((batch, batch[1])).mean_loss


def built(kind, workload, held, precision, ranks):
    torch.manual_seed(0)
    with ranks.device:
        model = workload.build()
    return kind(model, held, precision, ranks)


# How fast a step is


def compare(found, workload, held, precision, ranks, options):
    batches = itertools.cycle([workload.batch(ranks.device) for _ in range(4)])
    loops = {"plain": built(Plain, workload, held, precision, ranks)}
    loops["ours"] = built(Ours, workload, held, precision, ranks)
    device = ranks.device.type
    for loop in loops.values():
        timed(loop, batches, 3, device)
    steps = torch.tensor(
        max(2, min(50, round(options.seconds / timed(loops["plain"], batches, 2, device)))), device=ranks.device
    )
    dist.broadcast(steps, 0)
    steps = int(steps)
    seconds = {name: [] for name in loops}
    for turn in range(options.rounds):
        for name in list(loops)[:: 1 if turn % 2 else -1]:
            dist.barrier()
            seconds[name].append(timed(loops[name], batches, steps, device))
    ratios = [ours / plain for ours, plain in zip(seconds["ours"], seconds["plain"], strict=True)]
    for name in loops:
        found[name] = {
            f"{workload.unit}_per_s": ranks.world * workload.count / median(seconds[name]),
            "seconds_per_step": spread(seconds[name]),
        }
    found |= {"ours_over_plain": spread(ratios), "steps_per_round": steps}
    rate, ratio = found["ours"][f"{workload.unit}_per_s"], found["ours_over_plain"]
    print(
        f"  {rate:,.0f} {workload.unit}/s; time over plain {ratio['median']:.4f} ({ratio['p10']:.4f}-{ratio['p90']:.4f})"
    )


# Whether it is right


def check(found, workload, held, precision, ranks):
    """Train as one process and as all, save halfway, load into models of other weights, and go on; losses must agree."""
    generator = torch.Generator().manual_seed(1)
    size, length = workload.about["batch"], workload.about["length"]
    tokens = torch.randint(0, workload.about["vocabulary"], (STEPS, size, length + 1), generator=generator)
    alone = Ranks(device=ranks.device)
    wanted = losses(built(Ours, workload, "replicated", precision, alone), tokens, range(STEPS), alone)
    loop = built(Ours, workload, held, precision, ranks)
    seen = losses(loop, tokens, range(STEPS // 2), ranks)
    with shared_folder(ranks) as folder:
        sharded_checkpoint.save(folder, {"trainer": loop.trainer.state_dict()}, step=STEPS // 2, ranks=ranks)
        torch.manual_seed(5)
        with ranks.device:
            other = workload.build()
        loop = Ours(other, held, precision, ranks)
        layout = Layout.of(unwrapped(loop.model), loop.optimizer)
        loaded = sharded_checkpoint.load_latest(folder, ranks=ranks, layout=layout)
        loop.trainer.load_state_dict(loaded.state["trainer"])
        dist.barrier()
    seen += losses(loop, tokens, range(STEPS // 2, STEPS), ranks)
    apart = max(abs(mine / its - 1) for mine, its in zip(seen, wanted, strict=True))
    found |= {"losses": seen, "losses of one process": wanted, "apart": apart, "allowed": APART[precision]}
    print(f"  {wanted[0]:.4f} -> {wanted[-1]:.4f}, at most {apart:.2e} apart", flush=True)
    if not apart <= APART[precision]:
        raise AssertionError(f"losses lie {apart:.2e} from those of one process")


def losses(loop, tokens, steps, ranks):
    seen = []
    for step in steps:
        rows = tokens[step].chunk(ranks.world)[ranks.rank].to(ranks.device)
        seen.append(loop.step((rows[:, :-1].contiguous(), rows[:, 1:].contiguous())))
    return [float(ranks.sum(one.clone())) / ranks.world for one in seen]


@contextlib.contextmanager
def shared_folder(ranks):
    """Give a folder that all ranks of this machine see, and rank 0 removes."""
    with contextlib.nullcontext("") if ranks.rank else tempfile.TemporaryDirectory() as own:
        yield Path(ranks.gather(str(own))[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.5, help="of one loop in a round, about")
    parser.add_argument("--only", default="", help="run the cases whose names have this in them")
    parser.add_argument("--batch", type=int, help="samples of each process")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default=os.environ.get("OUT", str(Path(__file__).parent / "results")))
    options = parser.parse_args()
    with Ranks.from_environment(options.device) as ranks, tempfile.TemporaryDirectory() as hidden:
        if ranks.rank:
            options.out, sys.stdout = hidden, io.StringIO()
        report = Report(
            "ranks",
            options,
            f"{ranks.world} processes, {dist.get_backend()}. Checks: losses of {STEPS} steps from those of one process with "
            f"all samples, saved halfway and loaded into other weights. Speed: rounds of about {options.seconds} s, both loops "
            "in each, in turns first; a ratio is taken within a round, on rank 0.",
        )
        small = text_workload(2, 64, 4, 32, 256, 4) if options.tiny else text_workload(4, 256, 4, 128, 512, 8)
        large = workloads(options.tiny, options.batch)["gpt"]
        report.content["workload"] = {**large.about, "processes": ranks.world}
        speeds = [*itertools.product(HELD[:2], ("tf32", "bf16-mixed", "fp16-mixed")), (HELD[2], "bf16-mixed")]
        cases = [("check", *one) for one in itertools.product(HELD[:2], APART)] + [("speed", *one) for one in speeds]
        for what, held, precision in cases:
            name = f"{what} {held} {precision}"
            if options.only not in name:
                continue
            with report.case(name) as found:
                set_tf32(what == "speed" and precision == "tf32")
                if what == "check":
                    check(found, small, held, precision, ranks)
                else:
                    compare(found, large, held, precision, ranks, options)
        failed = [name for name, case in report.content["cases"].items() if "error" in case]
        print(f"{report.path}; failed: {', '.join(failed) or 'none'}", flush=True)


if __name__ == "__main__":
    main()
