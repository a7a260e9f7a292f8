"""What a comparison of batching takes from its tries."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest
from load_results import records, run

from narrowcast.load.batching import KINDS, Side, options_of, void_findings
from narrowcast.load.session import Measured
from narrowcast.load.stairs import Stair, Step
from narrowcast.measure.load.summary import Span
from narrowcast.measure.load.values import Slo

SLO = Slo(percentile=99, seconds=0.05)


def sides(held: dict[str, list[bool]]) -> list[Side]:
    made = records()
    measured = Measured(run(made, SLO), made, Span(1.0, 10.0, 0.005), interrupted=False)
    found: list[Side] = []
    for kind, verdicts in held.items():
        side = Side(kind, cast(Any, None), Stair(1.0))
        for number, verdict in enumerate(verdicts):
            side.steps.append(Step(number, float(number + 1), verdict))
            side.runs.append(measured)
        found.append(side)
    return found


GOOD = [True, False] * 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        ([True, False] * 3, "kept its times in 6 of 12 rounds of"),
        ([False] * 12, "at no rate that was tried"),
        ([True] * 12, "at every rate that was tried"),
    ],
    ids=["late", "never", "always"],
)
def test_a_side_of_which_too_little_is_known_voids_the_comparison(kind: str, verdicts: list[bool], said: str) -> None:
    held = dict.fromkeys(KINDS, GOOD)
    assert void_findings(sides(held), SLO) == []
    found = void_findings(sides(held | {kind: verdicts}), SLO)
    assert [(one.kind, one.void) for one in found] == [("undecided", True)]
    assert said in found[0].words
    assert kind in found[0].words


def test_no_batching_overrules_the_options_of_batching() -> None:
    given = ["--max-batch", "8", "--pad", "--delay", "5", "--workers", "2"]
    assert options_of("static", given) == [*given, "--batching", "static"]
    alone = options_of("none", given)
    assert "--pad" not in alone
    last = {name: value for name, value in itertools.pairwise(alone) if name.startswith("--")}
    assert (last["--max-batch"], last["--delay"], last["--workers"]) == ("1", "0", "2")
