"""Training that is killed while it saves goes on bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
from killed_training import KILLS, PRECISIONS, UPDATES
from small_runs import result_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return result_of("killed_training.py", tmp_path_factory.mktemp("killed"))


@pytest.mark.parametrize("name", PRECISIONS)
def test_losses_and_weights_after_a_kill_are_those_of_the_uninterrupted_run(runs: dict[str, Any], name: str) -> None:
    straight, interrupted = runs[name]["straight"], runs[name]["interrupted"]
    assert straight["start"] == 0
    assert straight["seen"][-1][0] == UPDATES
    assert len({one["start"] for one in interrupted}) == len(KILLS[name])  # each goes on from another checkpoint
    for one in interrupted:
        assert one["killed"]
        assert one["seen"] == straight["seen"][-len(one["seen"]) :]
        assert one["weights"] == straight["weights"]


def test_skips_and_scales_go_on_too(runs: dict[str, Any]) -> None:
    seen = runs["fp16-mixed"]["straight"]["seen"]
    assert any(skipped for _, _, _, skipped in seen)
    assert len({scale for _, _, scale, _ in seen}) > 3
