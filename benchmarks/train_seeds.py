"""Test accuracy of the recipes in examples/ by precision, over seeds: is it the same in half precision?

Each run is `narrowcast train` on one CPU thread; the accuracy is that of the report part, which is not trained on, with the
weights in FP32. The same seed gives the same initial weights, order and augmentation in every precision, so precisions are
compared by the differences between runs of one seed: their mean with a 95 % interval (Student's t over the seeds).

A call that was interrupted goes on where it stopped; delete the file to begin anew.

    python benchmarks/train_seeds.py [--seeds 5] [--recipes digits,mnist5k] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch
from scipy import stats

from narrowcast.measure.environment import environment
from narrowcast.training.reading import read_config
from narrowcast.training.run import fit

ROOT = Path(__file__).parents[1]
PRECISIONS = ("fp32", "bf16-mixed", "fp16-mixed")


@dataclass(frozen=True)
class Run:
    """One run: accuracy on the report part, and what it took."""

    seed: int
    accuracy: float
    loss: float | None
    steps: int
    skipped: int
    seconds: float


def train(recipe: str, precision: str, seed: int) -> Run:
    settings = [f"precision.name={precision}", f"seed={seed}", "threads=1", "device=cpu", "doctor=off"]
    config = read_config(ROOT / "examples" / f"{recipe}.yaml", settings)
    with tempfile.TemporaryDirectory() as folder:
        done = fit(config, Path(folder) / "run")
    return Run(seed, done.report.value, done.loss, done.steps, done.skipped, round(done.seconds, 1))


def interval(values: list[float]) -> dict[str, float]:
    """Mean of values, one a seed, with its 95 % interval."""
    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return {"mean": mean(values), "low": mean(values) - half, "high": mean(values) + half}


def summary(runs: dict[str, list[Run]]) -> dict[str, object]:
    told = {name: [asdict(run) for run in found] for name, found in runs.items()}
    accuracy = {name: [run.accuracy for run in found] for name, found in runs.items() if len(found) > 1}
    if "fp32" not in accuracy:
        return {"runs": told}
    differences = {
        name: interval([one - base for one, base in zip(values, accuracy["fp32"], strict=False)])
        for name, values in accuracy.items()
        if name != "fp32"
    }
    return {
        "runs": told,
        "accuracy": {name: interval(values) for name, values in accuracy.items()},
        "seed_to_seed_fp32": {"low": min(accuracy["fp32"]), "high": max(accuracy["fp32"])},
        "difference_to_fp32": differences,
        "same": {name: found["low"] <= 0 <= found["high"] for name, found in differences.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--recipes", default="digits,mnist5k")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "train-seeds.json")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    found = known(asked.out)
    for recipe, precision, seed in product(asked.recipes.split(","), PRECISIONS, range(asked.seeds)):
        runs = found.setdefault(recipe, {}).setdefault(precision, [])
        if any(run.seed == seed for run in runs):
            continue
        runs.append(train(recipe, precision, seed))
        print(f"{recipe} {precision} seed {seed}: {runs[-1].accuracy:.4f} in {runs[-1].seconds} s", flush=True)
        write(asked.out, found)
    for recipe, record in json.loads(asked.out.read_text(encoding="utf-8"))["recipes"].items():
        print(recipe, json.dumps({key: value for key, value in record.items() if key != "runs"}, indent=1))


def known(file: Path) -> dict[str, dict[str, list[Run]]]:
    """Runs of an earlier call that was interrupted."""
    if not file.is_file():
        return {}
    recipes = json.loads(file.read_text(encoding="utf-8"))["recipes"]
    return {
        recipe: {name: [Run(**run) for run in runs] for name, runs in record["runs"].items()}
        for recipe, record in recipes.items()
    }


def write(file: Path, found: dict[str, dict[str, list[Run]]]) -> None:
    record = {
        "protocol": " ".join((__doc__ or "").split("\n\n")[1].split()),
        "environment": environment().model_dump(mode="json"),
        "recipes": {recipe: summary(runs) for recipe, runs in found.items()},
    }
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
