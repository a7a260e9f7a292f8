"""A process that fails alone ends the others at once, and all say which it was and what happened there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import failing_ranks
import pytest
from small_runs import TWO_DEVICES, free_ports, write_images

WAITED_S = 300  # the group's own timeout is ten minutes


@pytest.fixture(scope="module", params=TWO_DEVICES)
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """How both processes ended, by case; all cases run at the same time."""
    place = tmp_path_factory.mktemp("failing")
    write_images(place / "data.npz")
    ports = free_ports(len(failing_ranks.CASES))
    running = subprocess.Popen(
        [sys.executable, failing_ranks.__file__, str(place), request.param, *map(str, ports)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        running.communicate(timeout=WAITED_S)
    except subprocess.TimeoutExpired:  # some wait still: what the others saw is there
        os.killpg(running.pid, 9)
        running.communicate()
    return {
        case: [json.loads(path.read_text()) for path in sorted(place.glob(f"{case}-*.json"))]
        for case in failing_ranks.CASES
    }


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("loader", "ValueError: planted in the data"),
        ("assertion", "AssertionError: planted in the network"),
        ("loss", "ZeroDivisionError: planted in the loss"),
    ],
)
def test_an_error_on_one_rank_ends_all_with_its_name(ended, case, said):
    first, second = ended[case]
    assert first == second
    assert first["kind"] == "TrainingError"
    assert first["said"].startswith(f"rank 1 failed: {said}")
    assert "--resume" in first["said"]


def test_a_batch_that_does_not_fit_on_one_rank_is_told_to_all(ended):
    first, second = ended["memory"]
    assert second["said"].startswith("a batch of 16 does not fit the memory of ")
    assert first["said"] == "rank 1 failed: " + second["said"]
    assert first["kind"] == second["kind"] == "TrainingError"


def test_a_replay_without_room_on_one_rank_is_given_up_by_all_and_training_goes_on(ended):
    first, second = ended["room"]
    assert first == second
    assert first["kind"] is None
    (sentence,) = first["said"]["said"]
    assert "the replay did not fit the device's memory beside the run" in sentence
    assert (first["said"]["steps"], first["said"]["skipped"]) == (4, 1)


def test_a_replay_that_runs_out_of_memory_on_one_rank_ends_all_with_its_name(ended):
    first, second = ended["replay"]
    assert second["said"].startswith("the doctor's replay of step 3 ran out of memory on rank 1")
    assert first["said"] == "rank 1 failed: " + second["said"]
    assert first["kind"] == "TrainingError"


def test_a_ledger_that_one_rank_cannot_write_ends_all_once_they_have_replayed_the_step_together(ended):
    """A rank that raised before the others are in the replay would leave them there."""
    first, second = ended["ledger"]
    assert first["kind"] == "OutputError"
    assert first["said"].startswith("the skip ledger")
    assert second["kind"] == "TrainingError"
    assert second["said"] == "rank 0 failed: " + first["said"]
