"""The full set of measurements of an original and an artifact, side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrowcast.artifacts.manifest import Measurement
from narrowcast.data.dataset import Dataset
from narrowcast.data.metrics import Metric
from narrowcast.errors import NarrowcastError
from narrowcast.measure.accuracy import Judge
from narrowcast.measure.latency import Comparison, compare, throughput
from narrowcast.measure.memory import peak_memory
from narrowcast.measure.statistics import Estimate, bootstrap_median
from narrowcast.recipes.target import Target
from narrowcast.runtimes import Runtime, Session

__all__ = ["measure_pair", "repeat_to"]

Tensors = dict[str, NDArray[Any]]

#: Seconds of interleaved runs, and runs at the least: 40 rounds of 10 support the 99th percentile (368 runs).
SECONDS, ROUNDS, RUNS = 14.0, 40, 10
#: The same at the best batch size, where a run takes many times as long: 12 rounds of 3 support the 90th percentile.
BEST_BATCH_SECONDS, BEST_BATCH_ROUNDS, BEST_BATCH_RUNS = 4.0, 12, 3


def measure_pair(
    runtime: Runtime,
    target: Target,
    graphs: Mapping[str, Path],
    data: Dataset,
    metric: Metric,
    folder: Path,
    *,
    seconds: float = SECONDS,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> list[Measurement]:
    """Return the measurements of two graphs: accuracy, size, latency, throughput and memory.

    Args:
        runtime: The runtime that loads both.
        target: Threads, and the batch size at which latency is judged.
        graphs: Graph files under the names ``original`` and ``artifact``.
        data: Samples that accuracy is judged on; the first one is what is timed.
        metric: The metric.
        folder: A folder for temporary files.
        seconds: About how long latency is measured.
        seed: Seed of the measuring order and of the bootstrap.
        progress: Called with a stage's name and the share of it that is done.
    """
    report = progress or (lambda name, share: None)
    report("accuracy", 0.0)
    dynamic = {name: runtime.load(path, threads=target.threads) for name, path in graphs.items()}
    found = accuracy_measurements(dynamic["original"], dynamic["artifact"], data, metric, seed)
    found += size_measurements({name: path.stat().st_size for name, path in graphs.items()})
    batch = repeat_to(data.load(np.zeros(1, np.int64)), target.batch)
    sessions = {n: runtime.load(p, threads=target.threads, batch=target.batch) for n, p in graphs.items()}
    timed = compare(
        sessions,
        [batch],
        seconds=seconds,
        rounds=ROUNDS,
        minimum_runs=RUNS,
        seed=seed,
        progress=lambda share: report("latency", share),
    )
    found += latency_measurements(timed)
    report("throughput", 0.0)
    found += throughput_measurements(runtime, target, graphs, batch)
    report("memory", 0.0)
    inputs = folder / "memory-batch.npz"
    np.savez(inputs, **batch)  # type: ignore[arg-type]
    found += memory_measurements(graphs, inputs, target)
    return found


def repeat_to(sample: Tensors, size: int) -> Tensors:
    """Return a batch that repeats one sample, ``[1, ...]`` to ``[size, ...]``."""
    return {name: np.repeat(array, size, axis=0) if array.ndim else array for name, array in sample.items()}


def accuracy_measurements(
    original: Session, artifact: Session, data: Dataset, metric: Metric, seed: int
) -> list[Measurement]:
    """Return the metric of ``original`` and ``artifact`` on some data, and how much is lost."""
    judge = Judge(data, metric, original, seed)
    score = judge.score(artifact)
    protocol = f"{metric.name} on {data.size} samples; 95 % bootstrap interval over " + (
        "samples" if judge.data.groups is None else "sources of samples"
    )
    found: list[Measurement] = []
    for subject, item in (("original", judge.original), ("artifact", score)):
        found.append(_measurement("accuracy", subject, item, metric.unit, protocol))
    drop = judge.drop(score)
    if math.isfinite(drop.value):
        found.append(_measurement("accuracy_drop", "artifact", drop, metric.unit, protocol + ", paired"))
    return found


def _measurement(measure: str, subject: Any, item: Any, unit: str, protocol: str) -> Measurement:
    return Measurement(
        measure=measure,
        subject=subject,
        value=item.value,
        unit=unit,
        low=item.low,
        high=item.high,
        samples=item.samples,
        protocol=protocol,
    )


def size_measurements(sizes: Mapping[str, int]) -> list[Measurement]:
    """Return the sizes on disk of ``original`` and ``artifact``, and their ratio."""
    found = [
        Measurement(measure="size", subject=name, value=float(size), unit="B", protocol="bytes of the graph file")  # type: ignore[arg-type]
        for name, size in sizes.items()
    ]
    ratio = sizes["original"] / sizes["artifact"]
    return [
        *found,
        Measurement(measure="compression", subject="ratio", value=ratio, unit="x", protocol="sizes on disk"),
    ]


def latency_measurements(timed: Comparison) -> list[Measurement]:
    """Return median and percentiles of ``original`` and ``artifact`` in seconds, and the ratio of the medians."""
    protocol = timed.protocol()
    found = _percentiles(timed, "latency", protocol)
    ratio = timed.speedup("original", "artifact")
    return [*found, _measurement("latency_p50", "ratio", ratio, "x", protocol + "; ratio round by round")]


def _percentiles(timed: Comparison, measure: str, protocol: str) -> list[Measurement]:
    """Return median and percentiles in seconds, as far as the number of runs supports them."""
    found: list[Measurement] = []
    for name, times in timed.times.items():
        median = timed.median(name)
        runs = Estimate(median.value, median.low, median.high, times.size)
        found.append(_measurement(f"{measure}_p50", name, runs, "s", protocol))
        for q in (90, 99):
            estimate = timed.percentile(name, q)
            if estimate is not None:
                ends = "interval from order statistics"
                found.append(_measurement(f"{measure}_p{q}", name, estimate, "s", f"{protocol}; {ends}"))
    return found


def throughput_measurements(
    runtime: Runtime, target: Target, graphs: Mapping[str, Path], batch: dict[str, NDArray[Any]]
) -> list[Measurement]:
    """Return samples per second at the best batch size, their ratio, that size, and the latency of such a batch.

    The search for the size only says where to measure: the largest of several short measurements would flatter.
    """
    one = {name: array[:1] if array.ndim else array for name, array in batch.items()}

    def load(size: int) -> dict[str, Session]:
        return {name: runtime.load(path, threads=target.threads, batch=size) for name, path in graphs.items()}

    best = {name: size for name, (size, _) in throughput(load, lambda size: repeat_to(one, size)).items()}
    searched = "batch sizes doubled from 1 while samples per second grew by 3 %"
    rates: dict[str, NDArray[np.float64]] = {}
    found: list[Measurement] = []
    for size in sorted(set(best.values())):
        timed = compare(
            {name: session for name, session in load(size).items() if best[name] == size},
            [repeat_to(one, size)],
            seconds=BEST_BATCH_SECONDS,
            rounds=BEST_BATCH_ROUNDS,
            minimum_runs=BEST_BATCH_RUNS,
        )
        protocol = f"batch {size}; {timed.protocol()}"
        found += _percentiles(timed, "latency_best_batch", protocol)
        for name, times in timed.times.items():
            rates[name] = size / np.median(times, axis=1)
            rate = bootstrap_median(rates[name])
            found.append(_measurement("throughput", name, rate, "samples/s", f"{searched}; the best, {protocol}"))
            found.append(
                Measurement(measure="best_batch", subject=name, value=size, unit="samples", protocol=searched)  # type: ignore[arg-type]
            )
    ratio = bootstrap_median(rates["artifact"] / rates["original"])
    together = len(set(best.values())) == 1
    how = "round by round" if together else "of rounds one after the other, as the best sizes differ"
    return [*found, _measurement("throughput", "ratio", ratio, "x", f"{searched}; ratio {how}")]


def memory_measurements(graphs: Mapping[str, Path], inputs: Path, target: Target) -> list[Measurement]:
    """Return the peak memory of serving ``original`` and ``artifact`` in bytes, and the ratio; none if it cannot be read."""
    protocol = "peak resident memory of a fresh process that loads the graph and runs it five times"
    try:
        peaks = {name: peak_memory(path, inputs, target) for name, path in graphs.items()}
    except NarrowcastError:
        return []
    found: list[Measurement] = []
    for name, memory in peaks.items():
        found.append(Measurement(measure="peak_memory", subject=name, value=memory.peak, unit="B", protocol=protocol))  # type: ignore[arg-type]
        added = "part of the peak that came with loading and running the graph"
        found.append(Measurement(measure="added_memory", subject=name, value=memory.added, unit="B", protocol=added))  # type: ignore[arg-type]
    for measure, value in (
        ("peak_memory", peaks["original"].peak / peaks["artifact"].peak),
        ("added_memory", peaks["original"].added / max(peaks["artifact"].added, 1)),
    ):
        found.append(Measurement(measure=measure, subject="ratio", value=value, unit="x", protocol=protocol))
    return found
