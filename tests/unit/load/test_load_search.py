"""The search, against queues that are simulated: no server, no clock."""

from __future__ import annotations

import math

import numpy as np
import pytest

from narrowcast.load.scenarios import Guard
from narrowcast.load.search import Found, Rules, Trial, find_largest
from narrowcast.load.session import Watch
from narrowcast.measure.load.progress import Progress
from narrowcast.measure.load.values import Probe

SERVICE = 0.01  # seconds, in the mean
BOUND = 0.1


def queue(rate: float, seed: int, *, seconds: float) -> Trial:
    """Run M/M/1 from empty, and say which sojourn times are above the bound."""
    rng = np.random.default_rng(seed)
    size = int(rate * seconds)
    gaps, services = rng.exponential(1 / rate, size).tolist(), rng.exponential(SERVICE, size).tolist()
    waiting, late = 0.0, []
    for gap, service in zip(gaps, services, strict=True):
        late.append(float(waiting + service > BOUND))
        waiting = max(0.0, waiting + service - gap)
    return Trial(np.array(late[size // 20 :]), void=False)


#: P(sojourn > t) = exp(-(mu - rate) t), so 1 % are above the bound where rate = mu - ln(100) / t.
TRUTH = 1 / SERVICE - math.log(100) / BOUND


@pytest.mark.parametrize("first", [2.0, 40.0, 500.0])
@pytest.mark.parametrize("seed", [0, 1000])
def test_the_largest_rate_is_found_from_wherever_the_search_begins(first: float, seed: int) -> None:
    found = find_largest(
        lambda rate, seed: queue(rate, seed, seconds=max(300.0, 4000 / rate)), first, Rules(0.01), seed
    )
    assert found.confirmed is not None
    assert found.largest is not None
    assert found.confirmed == pytest.approx(TRUTH, rel=0.12)
    assert found.largest.value == pytest.approx(TRUTH, rel=0.1)
    assert found.largest.low <= found.largest.value <= found.largest.high
    assert found.limit is None
    assert any(probe.confirming for probe in found.probes)


def fixed(answer: dict[str, float]) -> Found:
    """Search a server that misses the bound above a rate, with a client that fails above another."""

    def run(rate: float, seed: int) -> Trial:
        size = 2000
        missed = np.zeros(size)
        if rate > answer["server"]:
            missed[::2] = 1
        return Trial(missed, void=rate > answer["client"])

    return find_largest(run, 10.0, Rules(0.01))


def test_without_noise_the_edge_is_found_to_the_tolerance() -> None:
    found = fixed({"server": 123.0, "client": math.inf})
    assert found.confirmed is not None
    assert 123.0 / 1.05 <= found.confirmed <= 123.0
    assert len(found.probes) < 20


def test_a_client_that_fails_is_no_verdict_on_the_server() -> None:
    found = fixed({"server": math.inf, "client": 60.0})
    assert found.confirmed is not None
    assert found.confirmed <= 60.0
    assert found.largest is None
    assert found.limit is not None
    assert 60.0 < found.limit < 66.0
    assert {probe.verdict for probe in found.probes} == {"held", "void"}


def test_a_server_that_never_holds_the_bound_has_no_rate() -> None:
    found = fixed({"server": 0.0, "client": math.inf})
    assert found.confirmed is None
    assert found.largest is None


def test_a_try_that_was_ended_early_has_missed() -> None:
    def run(rate: float, seed: int) -> Trial:
        return Trial(np.zeros(500) if rate <= 30 else np.empty(0), void=False, ended=rate > 30)

    found = find_largest(run, 20.0, Rules(0.01))
    assert found.confirmed is not None
    assert 30 / 1.05 <= found.confirmed <= 30


def test_tries_outlive_an_interruption() -> None:
    def run(rate: float, seed: int) -> Trial:
        if rate > 30:
            raise KeyboardInterrupt
        return Trial(np.zeros(500), void=False)

    probes: list[Probe] = []
    with pytest.raises(KeyboardInterrupt):
        find_largest(run, 10.0, Rules(0.01), probes=probes)
    assert [probe.rate for probe in probes] == [10.0, 20.0]


def test_a_try_is_ended_by_what_was_due_after_its_warm_up_alone() -> None:
    def progress(since: float, latencies: tuple[float, ...], failures: tuple[float, ...] = ()) -> Progress:
        return Progress(since + 0.25, 100, len(latencies), len(failures), latencies, failures, since)

    guard = Guard(0.1, 1.0, 5, Watch(lambda name: None, lambda progress: None))
    assert not guard(progress(1.5, (0.8,) * 50, (0.6,) * 50))  # due before 1.0 s, or perhaps
    assert not guard(progress(2.0, (0.05,) * 50, (0.9, 0.01)))
    assert not guard(progress(2.25, (0.3,) * 3))
    assert guard(progress(2.5, (1.4,)))
    assert guard.ended


def test_a_rate_that_held_by_chance_is_not_confirmed() -> None:
    """The first try of each rate is without a miss; the truth shows when it is tried again."""
    seen: dict[float, int] = {}

    def run(rate: float, seed: int) -> Trial:
        seen[rate] = seen.get(rate, 0) + 1
        missed = np.zeros(1000)
        if rate > 200 or (rate > 50 and seen[rate] > 1):
            missed[::10] = 1
        return Trial(missed, void=False)

    found = find_largest(run, 20.0, Rules(0.01))
    assert found.confirmed is not None
    assert found.confirmed <= 50
