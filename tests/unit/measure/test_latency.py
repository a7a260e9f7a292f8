from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from narrowcast.measure import latency
from narrowcast.measure.latency import Comparison, compare, latency_of, throughput, tie
from narrowcast.measure.statistics import Estimate
from narrowcast.measure.suite import throughput_measurements
from narrowcast.recipes.target import Target
from narrowcast.runtimes import Session

BATCH = {"x": np.zeros((1, 2), np.float32)}


class Clock:
    """A clock that only sessions move on."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, list[tuple[str, dict[str, Any]]]()

    def session(self, name: str, cost: Callable[[dict[str, Any], float], float]) -> Session:
        return FakeSession(self, name, cost)


class FakeSession(Session):
    def __init__(self, clock: Clock, name: str, cost: Callable[[dict[str, Any], float], float]) -> None:
        self.clock, self.name, self.cost = clock, name, cost

    def run(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.clock.log.append((self.name, batch))
        self.clock.now += self.cost(batch, self.clock.now)
        return {}


class Sleeper(Session):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def run(self, batch: dict[str, Any]) -> dict[str, Any]:
        time.sleep(self.seconds)
        return {}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: made.now))
    return made


def noisy(mean: float, share: float = 0.1, seed: int = 0) -> Callable[[dict[str, Any], float], float]:
    rng = np.random.default_rng(seed)
    return lambda batch, now: mean * float(np.exp(share * rng.normal()))


def test_half_the_speed_is_found_with_real_sleeps() -> None:
    found = compare({"slow": Sleeper(0.004), "fast": Sleeper(0.002)}, [BATCH], seconds=0.4, rounds=10)
    ratio = found.speedup("slow", "fast")
    assert ratio.low - 0.5 < 2 < ratio.high + 0.5
    assert not tie(ratio)


def test_half_the_speed_is_found_exactly_where_time_is(clock: Clock) -> None:
    sessions = {"slow": clock.session("slow", noisy(0.002)), "fast": clock.session("fast", noisy(0.001, seed=1))}
    ratio = compare(sessions, [BATCH], seconds=1.0).speedup("slow", "fast")
    assert ratio.low < 2 < ratio.high
    assert ratio.high - ratio.low < 0.2


def test_equal_sessions_are_a_tie_whatever_the_machine_does_meanwhile(clock: Clock) -> None:
    def throttled(seed: int) -> Callable[[dict[str, Any], float], float]:
        draw = noisy(0.001, seed=seed)
        return lambda batch, now: draw(batch, now) * (1 + now)  # the machine slows down all along

    sessions = {name: clock.session(name, throttled(seed)) for seed, name in enumerate(("one", "other"))}
    found = compare(sessions, [BATCH], seconds=1.0)
    assert tie(found.speedup("one", "other"))
    assert all(share > 0.05 for share in found.drifts.values())
    assert "one drifted by +" in found.protocol()


def test_sessions_take_turns_in_an_order_that_chance_decides(clock: Clock) -> None:
    sessions = {name: clock.session(name, noisy(0.001)) for name in "ab"}
    found = compare(sessions, [BATCH], seconds=0.1, rounds=20, minimum_runs=2)
    assert found.times["a"].shape == found.times["b"].shape
    rounds, runs = found.times["a"].shape
    assert rounds == 20
    turns = [name for name, _ in clock.log[found.warmup_runs :]]
    per_turn = [turns[i : i + runs + 1] for i in range(0, len(turns), runs + 1)]
    assert all(len(set(turn)) == 1 for turn in per_turn)
    pairs = ["".join((per_turn[i][0], per_turn[i + 1][0])) for i in range(0, len(per_turn), 2)]
    assert len(pairs) == 20
    assert set(pairs) == {"ab", "ba"}


def test_the_order_follows_the_seed(clock: Clock) -> None:
    def order(seed: int) -> list[str]:
        clock.log.clear()
        sessions = {name: clock.session(name, lambda batch, now: 0.001) for name in "abc"}
        compare(sessions, [BATCH], seconds=0.1, rounds=6, seed=seed)
        return [name for name, _ in clock.log]

    assert order(1) == order(1) != order(2)


def test_both_sessions_see_the_same_inputs_in_the_same_order(clock: Clock) -> None:
    batches = [{"x": np.full((1, 2), i, np.float32)} for i in range(3)]
    sessions = {name: clock.session(name, noisy(0.001)) for name in "ab"}
    found = compare(sessions, batches, seconds=0.1, rounds=5, minimum_runs=4)
    seen = {name: [int(b["x"][0, 0]) for n, b in clock.log[found.warmup_runs :] if n == name] for name in ("a", "b")}
    assert seen["a"] == seen["b"]
    assert set(seen["a"]) == {0, 1, 2}


def test_warm_up_goes_on_until_times_are_steady(clock: Clock) -> None:
    calls = 0

    def cost(batch: dict[str, Any], now: float) -> float:
        nonlocal calls
        calls += 1
        return 0.001 * (1 + 20 * np.exp(-calls / 8))  # caches fill slowly

    found = compare({"a": clock.session("a", cost)}, [BATCH], seconds=4.0)
    assert found.steady
    assert found.warmup_runs > 20
    assert found.times["a"].max() < 0.0015
    assert "until steady" in found.protocol()


def test_times_that_never_become_steady_are_said_to_be(clock: Clock) -> None:
    found = compare({"a": clock.session("a", lambda batch, now: 0.001 * (1 + 50 * now))}, [BATCH], seconds=0.4)
    assert not found.steady
    assert "not steady" in found.protocol()


def test_percentiles_follow_the_number_of_runs(clock: Clock) -> None:
    few = compare({"a": clock.session("a", noisy(0.1))}, [BATCH], seconds=1.0, rounds=10, minimum_runs=3)
    assert few.times["a"].size < 36
    assert few.percentile("a", 50) is not None
    assert few.percentile("a", 90) is None
    many = compare({"a": clock.session("a", noisy(0.001))}, [BATCH], seconds=1.0, rounds=40, minimum_runs=10)
    assert many.percentile("a", 99) is not None


def test_one_session_alone_can_be_timed(clock: Clock) -> None:
    found = latency_of(clock.session("a", noisy(0.003)), [BATCH], seconds=1.0)
    median = found.median("session")
    assert median.low < 0.003 < median.high


def test_the_garbage_collector_is_off_while_timing_and_back_on_after(clock: Clock) -> None:
    states: list[bool] = []

    def cost(batch: dict[str, Any], now: float) -> float:
        states.append(gc.isenabled())
        return 0.001

    found = compare({"a": clock.session("a", cost)}, [BATCH], seconds=0.1)
    assert not any(states[found.warmup_runs :])
    assert gc.isenabled()

    def fail(batch: dict[str, Any], now: float) -> float:
        if not gc.isenabled():
            raise RuntimeError("broken session")
        return 0.001

    with pytest.raises(RuntimeError):
        compare({"a": clock.session("a", fail)}, [BATCH], seconds=0.1)
    assert gc.isenabled()


def test_progress_ends_at_one(clock: Clock) -> None:
    shares: list[float] = []
    compare({"a": clock.session("a", noisy(0.001))}, [BATCH], seconds=0.1, rounds=7, progress=shares.append)
    assert shares == pytest.approx([i / 7 for i in range(1, 8)])


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.9, 1.1, True), (1.0, 1.2, True), (1.01, 1.2, False), (0.5, 0.99, False)]
)
def test_a_ratio_whose_interval_holds_one_is_a_tie(low: float, high: float, expected: bool) -> None:
    assert tie(Estimate(1.05, low, high, 30)) is expected


def test_the_protocol_names_rounds_and_runs() -> None:
    found = Comparison({"a": np.ones((30, 4))}, {"a": 0.0}, 25, True)
    assert "30 rounds of 4 runs" in found.protocol()
    assert "25 warm-up runs" in found.protocol()


# Throughput -----------------------------------------------------------------------------------------------------------


def inputs(size: int) -> dict[str, Any]:
    return {"x": np.zeros((size, 2), np.float32)}


def fixed_cost(overhead: float, each: float, limit: int = 10**6) -> Callable[[dict[str, Any], float], float]:
    return lambda batch, now: overhead + each * len(batch["x"]) + (1.0 if len(batch["x"]) > limit else 0.0)


def test_throughput_finds_the_batch_size_with_the_most_samples_per_second(clock: Clock) -> None:
    made = {
        "original": clock.session("original", fixed_cost(0.001, 0.001, limit=8)),
        "artifact": clock.session("artifact", fixed_cost(0.0, 0.0005)),
    }
    best = throughput(lambda size: made, inputs, seconds=0.2)
    assert best["original"][0] == 8
    assert best["original"][1].value == pytest.approx(8 / 0.009)
    assert best["artifact"][0] == 1  # nothing is gained by waiting for more
    assert best["artifact"][1].value == pytest.approx(2000)


def test_throughput_stops_at_the_largest_size(clock: Clock) -> None:
    made = {"a": clock.session("a", fixed_cost(1.0, 0.001))}
    sizes: list[int] = []

    def load(size: int) -> dict[str, Session]:
        sizes.append(size)
        return made

    best = throughput(load, inputs, largest=8, seconds=0.2)
    assert sizes == [1, 2, 4, 8]
    assert best["a"][0] == 8


class FakeRuntime:
    """Loads the sessions that it is given, whatever the batch size."""

    def __init__(self, sessions: dict[str, Session]) -> None:
        self.sessions = sessions

    def load(self, path: Path, *, threads: int, batch: int) -> Session:
        return self.sessions[path.name]


def measured_throughput(clock: Clock, **costs: Callable[[dict[str, Any], float], float]) -> dict[tuple[str, str], Any]:
    runtime: Any = FakeRuntime({name: clock.session(name, cost) for name, cost in costs.items()})
    graphs = {name: Path(name) for name in costs}
    return {(m.measure, m.subject): m for m in throughput_measurements(runtime, Target(), graphs, BATCH)}


def test_equal_throughput_is_a_tie(clock: Clock) -> None:
    found = measured_throughput(clock, original=noisy(0.01), artifact=noisy(0.01, seed=1))
    ratio = found["throughput", "ratio"]
    assert ratio.low < 1 < ratio.high
    assert ratio.protocol.endswith("ratio round by round")
    assert found["throughput", "original"].low < found["throughput", "original"].value


def test_the_ratio_of_throughputs_is_that_of_the_rates_at_each_ones_best_batch(clock: Clock) -> None:
    found = measured_throughput(clock, original=fixed_cost(0.001, 0.001, limit=8), artifact=fixed_cost(0.0, 0.0005))
    assert [found["best_batch", name].value for name in ("original", "artifact")] == [8, 1]
    assert found["throughput", "original"].value == pytest.approx(8 / 0.009)
    assert found["throughput", "artifact"].value == pytest.approx(2000)
    assert found["throughput", "ratio"].value == pytest.approx(2000 * 0.009 / 8)
    assert found["throughput", "ratio"].protocol.endswith("one after the other, as the best sizes differ")
    assert found["latency_best_batch_p50", "original"].value == pytest.approx(0.009)
