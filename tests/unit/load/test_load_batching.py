"""What a comparison of batching takes from its rounds."""

from __future__ import annotations

import pytest
from load_results import records, run

from narrowcast.load.batching import void_findings
from narrowcast.load.session import Measured
from narrowcast.measure.load.summary import Span


def measured(late: float) -> Measured:
    made = records(late=late)
    return Measured(run(made), made, Span(1.0, 10.0, 0.005), interrupted=False)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_one_void_round_is_said_whichever_side_it_is_of(kind: str) -> None:
    rounds = {("dynamic", 400.0): [measured(0.0)] * 3, ("static", 400.0): [measured(0.0)] * 3}
    assert void_findings(rounds) == []
    rounds[kind, 400.0] = [measured(0.0), measured(0.006), measured(0.0)]
    found = void_findings(rounds)
    assert [(one.kind, one.void) for one in found] == [("late", True)]
    assert found[0].words.startswith(f"round 2 of {kind} batching at 400/s: requests were sent late")
