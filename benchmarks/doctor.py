"""What the numerics doctor costs: steps with it over steps without it, in the same run, on the same model.

python benchmarks/doctor.py [--device cuda] [--model gpt resnet] [--rounds 8] [--compile] [--small]

Blocks of as many steps as lie between two deep samples take turns: without a doctor, cheap, deep. Each block with a doctor is
divided by the block without one of the same round; the median of these ratios is the cost. It needs torch and narrowcast
alone, and writes benchmarks/results/doctor-DEVICE.json (or under $OUT where that is set).
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from statistics import median

import torch
from training_loops import loss_itself
from training_models import workloads

from narrowcast.training import Trainer
from narrowcast.training.doctor.watch import Watch

HERE = Path(__file__).parent
LIMITS = {"cheap": 1.02, "deep": 1.15}
BATCHES = {"gpt": 8, "resnet": 128}


# Times


def block(trainer, batch, steps):
    """Return the seconds of so many steps, the device's work included."""
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        trainer.step(batch)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name, arguments):
    """Return the costs of both levels on one model."""
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    work = workloads(arguments.small, None if arguments.small else BATCHES[name])[name]
    model, batch = work.build().to(device), (work.batch(device), None)
    fused = {"fused": True} if device.type == "cuda" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **fused)
    called = torch.compile(model) if arguments.compile else model
    precision = arguments.precision
    trainer = Trainer(called, optimizer, loss_itself, precision=precision)
    doctors = {
        level: Watch(called, level, every=arguments.every, optimizer=optimizer, loss=loss_itself, precision=precision)
        for level in LIMITS
    }
    for watch in (None, *doctors.values()):
        trainer.watch = watch
        block(trainer, batch, arguments.every)
    rounds = []
    for number in range(arguments.rounds):
        order = ["none", *LIMITS] if number % 2 == 0 else [*reversed(LIMITS), "none"]
        seconds = {}
        for level in order:
            trainer.watch = doctors.get(level)
            seconds[level] = block(trainer, batch, arguments.every) / arguments.every
        rounds.append(seconds)
        print(name, " ".join(f"{level} {1e3 * value:.2f} ms" for level, value in seconds.items()), flush=True)
    found = {
        "model": work.about,
        "step_s": {level: median(one[level] for one in rounds) for level in ("none", *LIMITS)},
        "levels": {},
    }
    for level, limit in LIMITS.items():
        ratios = sorted(one[level] / one["none"] for one in rounds)
        summary = doctors[level].close()
        found["levels"][level] = {
            "ratio": median(ratios),
            "least": ratios[0],
            "greatest": ratios[-1],
            "limit": limit,
            "holds": median(ratios) <= limit,
            "healthy": summary.verdict.healthy,
            "series": len(doctors[level].record().series),
        }
    found["deep_step_s"] = deep_step(trainer, doctors, batch, arguments.every)
    if device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def deep_step(trainer, doctors, batch, every):
    """Return the seconds of the step that is sampled, alone: the lesser of two."""
    trainer.watch = doctors["deep"]
    first = block(trainer, batch, 1)
    block(trainer, batch, every - 1)
    return min(first, block(trainer, batch, 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--precision", default=None)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--small", action="store_true", help="tiny models, to see that it runs")
    arguments = parser.parse_args()
    arguments.precision = arguments.precision or ("bf16-mixed" if arguments.device == "cuda" else "fp32")
    results = {
        "environment": {
            "device": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
        "settings": {key: value for key, value in vars(arguments).items() if key != "model"},
        "models": {name: measure(name, arguments) for name in arguments.model},
    }
    for name, found in results["models"].items():
        for level, one in found["levels"].items():
            print(
                f"{name} {level}: {one['ratio']:.4f} ({one['least']:.4f} to {one['greatest']:.4f}), limit {one['limit']}"
            )
    kind = f"{arguments.device}{'-compiled' if arguments.compile else ''}{'-small' if arguments.small else ''}"
    folder = Path(os.environ.get("OUT", HERE / "results"))
    (folder / f"doctor-{kind}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
