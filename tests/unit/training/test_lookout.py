"""When the host hears of numbers that were not finite."""

from __future__ import annotations

import pytest
import torch

from narrowcast.training import lookout
from narrowcast.training.lookout import Lookout, Sighting


class Event:
    """A CUDA event that has not come yet, until somebody waits for it."""

    def record(self, stream: object) -> None:
        pass

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    ones = torch.ones
    monkeypatch.setattr(lookout.torch, "ones", lambda *size, pin_memory, **given: ones(*size, **given))
    return torch.device("cpu")


def heard_at(watching: Lookout, broken: int) -> int:
    """Return the update after whose end the host hears of a broken one, which it must name."""
    for step in range(200):
        watching.send(torch.tensor(step != broken), Sighting(step, None))
        seen = watching.arrived()
        if seen is not None:
            assert seen.step == broken
            return step
    raise AssertionError("nothing was heard")


def test_several_ranks_hear_a_fixed_number_of_updates_later_whenever_flags_arrive(device: torch.device):
    assert heard_at(Lookout(device, together=True), 7) == 8


def test_one_process_never_waits_until_it_is_far_ahead(device: torch.device):
    assert heard_at(Lookout(device), 7) == 7 + 63


def test_the_end_waits_for_all(device: torch.device):
    watching = Lookout(device, together=True)
    watching.send(torch.tensor(False), Sighting(0, None))
    assert watching.arrived() is None
    seen = watching.arrived(wait=True)
    assert seen is not None
    assert seen.step == 0
