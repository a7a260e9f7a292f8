"""What the numerics doctor costs: steps with it over steps without it, in the same run, on the same model.

python benchmarks/doctor.py [--device cuda] [--model gpt resnet] [--rounds 8] [--compile] [--small]

Blocks of as many steps as lie between two deep samples take turns: without a doctor, cheap, deep. Each block with a doctor is
divided by the block without one next to it; the median of these ratios is the cost. It needs torch and narrowcast alone, and
writes benchmarks/results/doctor-DEVICE.json (or under $OUT where that is set).
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

from narrowcast.training import Trainer
from narrowcast.training.doctor.watch import Watch

HERE = Path(__file__).parent
LIMITS = {"cheap": 1.02, "deep": 1.15}


# Models


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        # q, k, v: [B, H, S, D]
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder of GPT-2's shape; 24 layers of width 1024 have about 350 M parameters."""

    def __init__(self, vocabulary, width, heads, layers, length):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self.apply(self._start)

    @staticmethod
    def _start(part):
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)))


class Bottleneck(nn.Module):
    def __init__(self, given, width, stride):
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(given, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)),
        )
        same = given == out and stride == 1
        self.skip = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(given, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x):
        return F.relu(self.body(x) + self.skip(x))


def resnet(blocks=(3, 4, 6, 3), width=64, classes=1000):
    """Return a ResNet; with the given defaults ResNet-50."""
    stem = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    parts, given = [*stem, nn.MaxPool2d(3, 2, 1)], width
    for stage, count in enumerate(blocks):
        inner = width << stage
        for number in range(count):
            parts.append(Bottleneck(given, inner, 2 if stage and not number else 1))
            given = 4 * inner
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(given, classes))


def gpt_case(device, small):
    vocabulary, width, heads, layers, length, size = (512, 64, 4, 2, 64, 4) if small else (50304, 1024, 16, 24, 1024, 8)
    model = GPT(vocabulary, width, heads, layers, length).to(device)
    tokens = torch.randint(0, vocabulary, (size, length + 1), device=device)
    return (
        model,
        lambda out, target: F.cross_entropy(out.flatten(0, 1), target.flatten()),
        (tokens[:, :-1], tokens[:, 1:]),
    )


def resnet_case(device, small):
    model = (resnet((1, 1, 1, 1), 8, 10) if small else resnet()).to(device, memory_format=torch.channels_last)
    size, side, classes = (4, 64, 10) if small else (128, 224, 1000)
    images = torch.randn(size, 3, side, side, device=device).to(memory_format=torch.channels_last)
    return model, F.cross_entropy, (images, torch.randint(0, classes, (size,), device=device))


CASES = {"gpt": gpt_case, "resnet": resnet_case}


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
    model, loss, batch = CASES[name](device, arguments.small)
    fused = {"fused": True} if device.type == "cuda" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **fused)
    called = torch.compile(model) if arguments.compile else model
    precision = arguments.precision
    trainer = Trainer(called, optimizer, loss, precision=precision)
    doctors = {
        level: Watch(called, level, every=arguments.every, optimizer=optimizer, loss=loss, precision=precision)
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
    found = {"step_s": {level: median(one[level] for one in rounds) for level in ("none", *LIMITS)}, "levels": {}}
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
    """Return the median seconds of the step that is sampled, alone."""
    trainer.watch = doctors["deep"]
    while trainer.steps % every:
        trainer.step(batch)
    times = []
    for _ in range(3):
        times.append(block(trainer, batch, 1))
        block(trainer, batch, every - 1)
    return median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", nargs="+", choices=CASES, default=list(CASES))
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
