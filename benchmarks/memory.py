"""Predicted memory beside what PyTorch's allocator hands out: inference and training on the CPU, training on a CUDA card.

    python benchmarks/memory.py                         # CPU: every model, inference and a training step with AdamW, FP32
    python benchmarks/memory.py --device cuda           # CUDA: training with AdamW under BF16 autocast
    python benchmarks/memory.py --only resnet18 gpt2    # some models

On the CPU the profiler's allocator events are added up; on CUDA it is ``torch.cuda.max_memory_allocated``. Each model runs in
a process of its own, two steps each; the peak is that of the second, whose optimizer finds its states there.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

RESULTS = Path(__file__).parent / "results"
MIB = 1 << 20
SECOND = "memory: begin the second step"


# Models ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model, its inputs and its loss."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, torch.Tensor]]
    loss: Callable[[Any], torch.Tensor] = field(default=lambda out: first(out).float().square().mean())
    name: str = ""
    examples: Callable[[], tuple[Any, ...]] = tuple

    @property
    def named(self) -> Callable[[], dict[str, torch.Tensor]]:
        return self.inputs


def first(out: Any) -> torch.Tensor:
    if isinstance(out, torch.Tensor):
        return out
    return out[0] if isinstance(out, tuple) else next(iter(out.values()))


def own_loss(out: Any) -> torch.Tensor:
    return out["loss"]


class ByName(nn.Module):
    """A model of one input that has a name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x)


class SequenceModel(nn.Module):
    """Tokens, a two-layer LSTM, and a prediction for each place."""

    def __init__(self, words: int, width: int, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, words)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embedding(x))[0])


class ViTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, T, D]
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Vision transformer, as in the paper: width 768, 12 blocks for the size B."""

    def __init__(self, width: int, depth: int, heads: int, patch: int = 16, size: int = 224) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.place = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(*(ViTBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        return self.head(self.norm(self.blocks(x))[:, 0])


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != 4 * width:
            conv = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y.add_(self.shortcut(x)))


def resnet50() -> nn.Module:
    blocks: list[nn.Module] = []
    inputs = 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for place in range(depth):
            blocks.append(Bottleneck(inputs, width, stride if place == 0 else 1))
            inputs = 4 * width
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convnext_tiny() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 96, 4, 4), ChannelNorm(96)]
    inputs = 96
    for width, depth in ((96, 3), (192, 3), (384, 9), (768, 3)):
        if width != inputs:
            layers += [ChannelNorm(inputs), nn.Conv2d(inputs, width, 2, 2)]
        layers += [ConvNeXtBlock(width) for _ in range(depth)]
        inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(768), nn.Linear(768, 1000))


def torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: ByName(getattr(importlib.import_module("torchvision.models"), name)())


def timm(name: str) -> Callable[[], nn.Module]:
    return lambda: ByName(importlib.import_module("timm").create_model(name))


def transformers(kind: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        library = importlib.import_module("transformers")
        return getattr(library, kind)(getattr(library, config)(**sizes))

    return build


def images(batch: int, size: int = 224) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {"x": torch.randn(batch, 3, size, size)}


def tokens(batch: int, length: int, words: int, *, labels: bool = True, name: str = "input_ids") -> Callable[[], Any]:
    def make() -> dict[str, torch.Tensor]:
        ids = torch.randint(words, (batch, length))
        return {name: ids, "labels": ids.clone()} if labels else {name: ids}

    return make


SMALL_GPT2 = {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 8192, "n_positions": 256}
SMALL_BERT = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "vocab_size": 8192,
}
CPU: dict[str, Case] = {
    "resnet18": Case(torchvision("resnet18"), images(4)),
    "mobilenet_v3_small": Case(torchvision("mobilenet_v3_small"), images(8)),
    "efficientnet_b0": Case(torchvision("efficientnet_b0"), images(4)),
    "convnext_tiny": Case(torchvision("convnext_tiny"), images(2)),
    "densenet121": Case(torchvision("densenet121"), images(2)),
    "squeezenet1_1": Case(torchvision("squeezenet1_1"), images(8)),
    "swin_t": Case(torchvision("swin_t"), images(2)),
    "shufflenet_v2_x1_0": Case(torchvision("shufflenet_v2_x1_0"), images(8)),
    "deit_tiny": Case(timm("deit_tiny_patch16_224"), images(8)),
    "bert_small": Case(transformers("BertForMaskedLM", "BertConfig", **SMALL_BERT), tokens(4, 128, 8192), own_loss),
    "gpt2_small": Case(transformers("GPT2LMHeadModel", "GPT2Config", **SMALL_GPT2), tokens(4, 128, 8192), own_loss),
    "lstm": Case(lambda: SequenceModel(4096, 512), tokens(8, 64, 4096, labels=False, name="x")),
}
CUDA: dict[str, Case] = {
    "resnet50": Case(lambda: ByName(resnet50()), images(64)),
    "vit_b_16": Case(lambda: ViT(768, 12, 12), images(64)),
    "gpt2": Case(transformers("GPT2LMHeadModel", "GPT2Config"), tokens(8, 1024, 50257), own_loss),
    "bert_base": Case(transformers("BertForMaskedLM", "BertConfig"), tokens(32, 512, 30522), own_loss),
    "convnext_tiny": Case(lambda: ByName(convnext_tiny()), images(64)),
    "mlp": Case(
        lambda: ByName(nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(4096, 4096), nn.GELU())))),
        lambda: {"x": torch.randn(4096, 4096)},
    ),
}


# Measuring ------------------------------------------------------------------------------------------------------------


def train_step(
    model: nn.Module, optimizer: Any, case: Case, inputs: Any, autocast: Any, note: Callable[[str], None]
) -> None:
    with autocast():
        out = model(**inputs)
        loss = case.loss(out)
    note("forward")
    loss.backward()
    note("backward")
    optimizer.step()
    optimizer.zero_grad()
    note("step")


def measured_cpu(case: Case, mode: str) -> dict[str, Any]:
    """Return the profiler's peak in the second step, and what was allocated at points of the run."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        model = case.build().train(mode == "train")
        inputs = case.inputs()
        optimizer = torch.optim.AdamW(model.parameters()) if mode == "train" else None
        for number in ("first", "second"):
            if number == "second":
                with record_function(SECOND):
                    pass

            def note(name: str, number: str = number) -> None:
                with record_function(f"memory: {number} {name}"):
                    pass

            note("built")
            if optimizer is None:
                with torch.no_grad():
                    out = model(**inputs)
                    del out
            else:
                train_step(model, optimizer, case, inputs, contextlib.nullcontext, note)
    profiler: Any = run.profiler
    events = sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns())
    total = peak = first = 0
    moments: dict[str, int] = {}
    for event in events:
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
        elif event.name() == SECOND:
            first, peak = peak, total
        elif event.name().startswith("memory: "):
            moments[event.name().removeprefix("memory: ")] = total
    return {"peak": peak, "first_peak": first, "moments": moments}


def measured_cuda(case: Case, mode: str) -> dict[str, Any]:
    """Return the allocator's peak in the second step, what was allocated at points of the run, and the kernels that ran."""
    moments: dict[str, int] = {}
    with torch.device("cuda"):
        model = case.build().train()
    inputs = {name: tensor.cuda() for name, tensor in case.inputs().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    peaks: dict[str, int] = {}
    for number in ("first", "second", "third"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

        def note(name: str, number: str = number) -> None:
            torch.cuda.synchronize()
            moments[f"{number} {name}"] = torch.cuda.memory_allocated()
            moments[f"{number} {name} peak so far"] = torch.cuda.max_memory_allocated()

        note("built")
        train_step(model, optimizer, case, inputs, lambda: torch.autocast("cuda", dtype=torch.bfloat16), note)
        torch.cuda.synchronize()
        peaks[number] = torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU]) as run:
        train_step(
            model, optimizer, case, inputs, lambda: torch.autocast("cuda", dtype=torch.bfloat16), lambda name: None
        )
    calls = {event.key: event.count for event in run.key_averages() if event.key.startswith("aten::")}
    return {
        "peak": peaks["second"],
        "first_peak": peaks["first"],
        "third_peak": peaks["third"],
        "moments": moments,
        "reserved": torch.cuda.max_memory_reserved(),
        "largest": allocations(model, optimizer, case, inputs),
        "calls": dict(sorted(calls.items(), key=lambda item: -item[1])[:80]),
    }


def allocations(model: nn.Module, optimizer: Any, case: Case, inputs: Any) -> list[Any]:
    """Return what was alive at the peak of one more step: sizes, counts and the innermost Python lines that asked."""
    history: Any = torch.cuda.memory
    history._record_memory_history(max_entries=1_000_000)
    train_step(model, optimizer, case, inputs, lambda: torch.autocast("cuda", dtype=torch.bfloat16), lambda name: None)
    torch.cuda.synchronize()
    events: list[Any] = list(history._snapshot()["device_traces"][0])
    history._record_memory_history(enabled=None)
    alive: dict[int, tuple[int, str]] = {}
    total = peak = 0
    largest_at = 0
    log = [event for event in events if event["action"] in ("alloc", "free_completed")]
    for place, event in enumerate(log):
        if event["action"] == "alloc":
            total += event["size"]
        elif event["addr"] in alive:
            total -= alive.pop(event["addr"])[0]
            continue
        alive[event["addr"]] = (event["size"], where(event))
        if total > peak:
            peak, largest_at = total, place
    alive.clear()
    for event in log[: largest_at + 1]:
        if event["action"] == "alloc":
            alive[event["addr"]] = (event["size"], where(event))
        else:
            alive.pop(event["addr"], None)
    at_peak = list(alive.values())
    kinds: dict[tuple[int, str], int] = {}
    for entry in at_peak:
        kinds[entry] = kinds.get(entry, 0) + 1
    rows = sorted(([size * count, size, count, line] for (size, line), count in kinds.items()), reverse=True)
    return [[peak, peak, 1, f"everything new at the peak, at {where(log[largest_at])}"], *rows[:40]]


def where(event: Any) -> str:
    frames = [frame for frame in event.get("frames", []) if frame["filename"].endswith(".py")]
    return " < ".join(f"{Path(frame['filename']).name}:{frame['line']} {frame['name']}" for frame in frames[:3])


def predicted(case: Case, mode: str, device: str) -> dict[str, Any]:
    from narrowcast.accounting.memory import memory

    begin = time.perf_counter()
    found = memory(
        case,
        mode="train" if mode == "train" else "infer",
        policy="bf16-mixed" if device == "cuda" else "fp32",
        device="cuda" if device == "cuda" else "cpu",
        capability=torch.cuda.get_device_capability() if device == "cuda" else (8, 0),
        loss=case.loss,
    )
    return {
        "peak": found.peak,
        "first_peak": found.first_peak,
        "when": found.when,
        "parts": found.parts,
        "most": found.most,
        "moments": found.moments,
        "seconds": round(time.perf_counter() - begin, 1),
    }


# Running --------------------------------------------------------------------------------------------------------------


def one(name: str, mode: str, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    case = (CUDA if device == "cuda" else CPU)[name]
    result: dict[str, Any] = {"model": name, "mode": mode}
    for part, find in (
        ("predicted", lambda: predicted(case, mode, device)),
        ("measured", lambda: (measured_cuda if device == "cuda" else measured_cpu)(case, mode)),
    ):
        try:
            result[part] = find()
        except Exception:
            result[part] = {"error": traceback.format_exc()[-3000:]}
        gc.collect()
    if "peak" in result["predicted"] and "peak" in result["measured"]:
        result["error"] = result["predicted"]["peak"] / result["measured"]["peak"] - 1
    return result


def environment(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("torchvision", "timm", "transformers"):
        try:
            found[package] = importlib.import_module(package).__version__
        except ImportError:
            found[package] = None
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found["capability"] = torch.cuda.get_device_capability()
        found["cudnn"] = torch.backends.cudnn.version()
        found["settings"] = {key: value for key, value in os.environ.items() if key.startswith(("CUBLAS", "PYTORCH"))}
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found["device"] = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    return found


def show(result: dict[str, Any]) -> None:
    for part in ("predicted", "measured"):
        if "error" in result[part]:
            print(f"{result['model']} {result['mode']}: {part} failed\n{result[part]['error']}", flush=True)
            return
    guess, truth = result["predicted"], result["measured"]
    parts = ", ".join(f"{key} {value / MIB:.1f}" for key, value in guess["parts"].items() if value)
    print(
        f"{result['model']:20} {result['mode']:6} predicted {guess['peak'] / MIB:9.1f} MiB, measured "
        f"{truth['peak'] / MIB:9.1f} MiB, {result['error']:+.1%}; first step {guess['first_peak'] / MIB:.1f} / "
        f"{truth['first_peak'] / MIB:.1f}; at {guess['when']}\n    {parts}"
    )
    for side in (guess, truth):
        print("    ", ", ".join(f"{key} {value / MIB:.1f}" for key, value in side["moments"].items()), flush=True)
    for row in truth.get("largest", [])[:16]:
        print(f"        {row[0] / MIB:9.1f} MiB = {row[1]} x {row[2]}: {row[3]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", nargs="*", default=[], metavar="MODEL")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", metavar="MODEL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = CUDA if arguments.device == "cuda" else CPU
    modes = ("train",) if arguments.device == "cuda" else ("infer", "train")
    if arguments.one:
        for mode in modes:
            print("\n@" + json.dumps(one(arguments.one, mode, arguments.device)))
        return
    results: list[dict[str, Any]] = []
    document = {
        "protocol": "each model in a process of its own; AdamW, two steps, the peak of the second; "
        + (
            "BF16 autocast; torch.cuda.max_memory_allocated"
            if arguments.device == "cuda"
            else "FP32, one thread; running total of the profiler's [memory] events since before the model was built"
        ),
        "environment": environment(arguments.device),
        "results": results,
    }
    target = arguments.out or RESULTS / f"memory-{arguments.device}.json"
    if target.is_dir() or not target.suffix:
        target = target / f"memory-{arguments.device}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.only or cases:
        command = [sys.executable, __file__, "--device", arguments.device, "--one", name]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line[1:] for line in done.stdout.splitlines() if line.startswith("@")]
        if not lines:
            print(f"{name} failed\n{done.stderr[-3000:]}", flush=True)
        for line in lines:
            results.append(json.loads(line))
            show(results[-1])
        target.write_text(json.dumps(document, indent=1) + "\n")
    errors = {mode: [abs(row["error"]) for row in results if row["mode"] == mode and "error" in row] for mode in modes}
    for mode, found in errors.items():
        if found:
            print(f"{mode}: {len(found)} models, median error {statistics.median(found):.1%}, largest {max(found):.1%}")


if __name__ == "__main__":
    main()
