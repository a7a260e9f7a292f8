"""Latency and throughput of sessions, compared in one process, interleaved, in an order that chance decides."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrowcast.measure.statistics import Estimate, bootstrap_median, drift, percentile
from narrowcast.runtimes import Session

__all__ = ["Comparison", "compare", "latency_of", "throughput", "tie"]

Floats = NDArray[np.float64]
Tensors = dict[str, NDArray[Any]]

#: Warm-up takes at least half its time, and goes on until two windows in a row agree within this share.
STEADY = 0.05


@dataclass(frozen=True)
class Comparison:
    """Times of several sessions, taken in turns.

    Attributes:
        times: Seconds of each run by session name, ``[rounds, runs per round]``.
        drifts: Change of level over the measurement by session name, as a share (0: none stands out).
        warmup_runs: Runs before measuring began.
        steady: Whether warm-up ended because times had become steady (else because its time was up).
    """

    times: Mapping[str, Floats]
    drifts: Mapping[str, float]
    warmup_runs: int
    steady: bool

    def median(self, name: str) -> Estimate:
        """Return the median latency of a session in seconds; the interval is over rounds."""
        return bootstrap_median(np.median(self.times[name], axis=1))

    def percentile(self, name: str, q: float) -> Estimate | None:
        """Return a percentile of all runs in seconds, or None where there are too few runs for it."""
        return percentile(self.times[name].reshape(-1), q)

    def speedup(self, slow: str, fast: str) -> Estimate:
        """Return how many times faster one session is than another: the median of the ratios round by round."""
        return bootstrap_median(np.median(self.times[slow], axis=1) / np.median(self.times[fast], axis=1))

    def protocol(self) -> str:
        """Return how the times were taken, for people."""
        rounds, runs = next(iter(self.times.values())).shape
        ends = "until steady" if self.steady else "until its time was up (not steady)"
        wandering = [f"{name} drifted by {share:+.0%}" for name, share in self.drifts.items() if abs(share) > STEADY]
        return (
            f"{rounds} rounds of {runs} runs each, interleaved in random order after {self.warmup_runs} warm-up runs "
            f"{ends}; bootstrap over rounds" + "".join(f"; {text}" for text in wandering)
        )


def compare(
    sessions: Mapping[str, Session],
    batches: Sequence[Tensors],
    *,
    seconds: float = 4.0,
    rounds: int = 30,
    minimum_runs: int = 3,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Comparison:
    """Return the times of sessions that run in turns on the same inputs.

    Args:
        sessions: Sessions by name.
        batches: Inputs; runs go through them in turn.
        seconds: About how long measuring may take, warm-up not counted.
        rounds: Times that each session gets its turn.
        minimum_runs: Runs per turn at the least.
        seed: Seed of the order.
        progress: Called with the share that is done.
    """
    warmup_runs, steady, per_run = _warm_up(sessions, batches, seconds / 4)
    runs = max(minimum_runs, int(seconds / rounds / sum(per_run.values())))
    rng = np.random.default_rng(seed)
    times: dict[str, Floats] = {name: np.empty((rounds, runs)) for name in sessions}
    names = list(sessions)
    enabled = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            for choice in rng.permutation(len(names)):
                name = names[choice]
                times[name][number] = _timed(sessions[name], batches, runs, number * runs)
            if progress is not None:
                progress((number + 1) / rounds)
    finally:
        if enabled:
            gc.enable()
    drifts = {name: drift(np.median(values, axis=1)) for name, values in times.items()}
    return Comparison(times, drifts, warmup_runs, steady)


def _timed(session: Session, batches: Sequence[Tensors], runs: int, start: int) -> Floats:
    session.run(batches[start % len(batches)])  # the first run after another session's finds cold caches
    times = np.empty(runs)
    for number in range(runs):
        batch = batches[(start + number) % len(batches)]
        begin = time.perf_counter()
        session.run(batch)
        times[number] = time.perf_counter() - begin
    return times


def _warm_up(
    sessions: Mapping[str, Session], batches: Sequence[Tensors], seconds: float
) -> tuple[int, bool, dict[str, float]]:
    """Run all sessions until each one's times are steady; return the runs, whether they were, and seconds per run."""
    total, all_steady, per_run = 0, True, dict[str, float]()
    for name, session in sessions.items():
        begin, window, last, steady = time.perf_counter(), 4, 0.0, False
        share = seconds / len(sessions)
        while True:
            median = float(np.median(_timed(session, batches, window, 0)))
            steady = abs(median - last) <= STEADY * last
            last, total = median, total + window + 1
            spent = time.perf_counter() - begin
            if spent >= share or (steady and spent >= share / 2):
                break
            window = max(
                4, min(64, int(window * share / 20 / max(spent, 1e-6)))
            )  # about ten windows in the time there is
        per_run[name] = last
        all_steady &= steady
    return total, all_steady, per_run


def latency_of(session: Session, batches: Sequence[Tensors], *, seconds: float = 2.0) -> Comparison:
    """Return the times of one session alone."""
    return compare({"session": session}, batches, seconds=seconds)


def tie(ratio: Estimate) -> bool:
    """Return whether a ratio of times is within the noise: its interval holds 1."""
    return ratio.low <= 1.0 <= ratio.high


def throughput(
    load: Callable[[int], Mapping[str, Session]],
    inputs: Callable[[int], Tensors],
    *,
    largest: int = 32,
    seconds: float = 1.0,
    gain: float = 1.03,
) -> dict[str, tuple[int, Estimate]]:
    """Return for each session the batch size with the most samples per second, and that rate.

    Batch sizes double until no session gains any more.

    Args:
        load: From a batch size to sessions by name.
        inputs: From a batch size to a batch.
        largest: Largest batch size tried.
        seconds: About how long each size is measured.
        gain: A larger batch must be better by this factor.
    """
    best: dict[str, tuple[int, Estimate]] = {}
    size = 1
    while size <= largest:
        found = compare(load(size), [inputs(size)], seconds=seconds, rounds=8, minimum_runs=2)
        improved = False
        for name in found.times:
            rate = bootstrap_median(size / np.median(found.times[name], axis=1))
            if name not in best or rate.value > best[name][1].value * gain:
                best[name], improved = (size, rate), True
        if not improved:
            break
        size *= 2
    return best
