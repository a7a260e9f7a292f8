"""Stopping together: a signal to one process stops all at the end of the same window, and the run goes on as it would have."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from interrupted_ranks import HELD, RUNS, STOP
from small_runs import free_ports, result_of, write_images

from narrowcast.training import interrupts
from narrowcast.training.distributed import Ranks
from narrowcast.training.interrupts import Interrupts
from narrowcast.training.stopping import Stopping


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes saw."""
    place = tmp_path_factory.mktemp("stopped")
    write_images(place / "data.npz")
    return result_of("interrupted_ranks.py", place, *free_ports(len(HELD) * len(RUNS)))


@pytest.mark.parametrize("held", HELD)
def test_a_signal_to_one_rank_stops_all_at_the_next_step(seen: list[dict[str, Any]], held: str) -> None:
    assert [one[f"{held} cut"] for one in seen] == [{"stopped": [f"step-{STOP + 1:08d}"]}] * 2


@pytest.mark.parametrize("held", HELD)
def test_what_was_stopped_goes_on_as_if_it_had_not_been(seen: list[dict[str, Any]], held: str) -> None:
    for one in seen:
        assert one[f"{held} again"] == one[f"{held} whole"]
        assert one[f"{held} again"]["steps"] == 8


@dataclass(frozen=True, eq=False)
class Two(Ranks):
    """Two ranks, of which the other one has a loss of 1, a weight of 2, and perhaps asks to stop."""

    world: int = 2
    asks: bool = False

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + torch.tensor([1.0, 2.0, float(self.asks)])


@pytest.mark.parametrize("late", [False, True])
def test_a_wish_is_known_with_the_sum_or_a_window_later(late: bool) -> None:
    stopping = Stopping(torch.device("cpu"), Two(asks=False))
    stopping._late = late
    found: list[bool] = []
    for window in range(5):
        if window == 2:
            stopping.ask()
        assert stopping.summed(torch.tensor(3.5), 4.0) == (4.5, 6.0, 2)
        found.append(stopping.agreed)
    assert found == [False, False, not late, True, True]


def test_a_wish_of_another_rank_is_one_too() -> None:
    stopping = Stopping(torch.device("cpu"), Two(asks=True))
    stopping.summed(torch.tensor(3.5), torch.tensor(4.0))
    assert stopping.agreed


def test_alone_it_is_agreed_when_it_is_asked() -> None:
    stopping = Stopping(torch.device("cpu"), None)
    assert stopping.summed(torch.tensor(3.5), 4.0) == (3.5, 4.0, 1)
    assert not stopping.agreed
    stopping.ask()
    assert stopping.agreed


def test_a_second_signal_interrupts_at_once_unless_it_comes_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr(interrupts, "monotonic", lambda: now)
    with Interrupts() as noticed:
        signal.raise_signal(signal.SIGTERM)
        now += 0.5
        signal.raise_signal(signal.SIGINT)
        assert noticed.asked
        now += 1.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
