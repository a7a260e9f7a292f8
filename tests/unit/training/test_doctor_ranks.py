"""A fault on rank 1 alone: both ranks name it, and the rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import doctor_ranks
import pytest


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What the doctors of two processes said."""
    folder = tmp_path_factory.mktemp("doctor")
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", doctor_ranks.__file__, str(folder), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(doctor_ranks.__file__).parent)},
            text=True,
        )
        for rank in range(2)
    ]
    said = []
    for one in running:
        with one:
            said.append((*one.communicate(timeout=240), one.returncode))
    assert all(code == 0 for _, _, code in said), "\n".join(err for _, err, _ in said)
    return [json.loads(out.splitlines()[-1]) for out, _, _ in said]


@pytest.mark.parametrize(
    ("case", "layer", "operator"),
    [("overflow", "first", "aten._to_copy"), ("nan", "data", "data"), ("overflow, sharded", "first", None)],
)
def test_the_rank_of_a_fault_is_named_on_both(both, case, layer, operator):
    first, second = (seen[case]["events"] for seen in both)
    assert [event["sentence"] for event in first] == [event["sentence"] for event in second]
    (event,) = first
    cause = event["cause"]
    assert (cause["rank"], cause["step"], cause["layer"]) == (1, 1, layer)
    assert operator in (cause["operator"], None)
    assert "Step 1, rank 1" in event["sentence"]
    assert [seen[case]["skipped"] for seen in both] == [True, True]
    assert not any(seen[case]["moved"] for seen in both)
    mended = [remedy["kind"] for remedy in cause["remedies"] if remedy["mended"]]
    assert mended if "sharded" not in case else not cause["remedies"]  # trials need every rank of sharded weights


def test_back_off_is_agreed_on_by_ranks(both):
    for seen in both:
        assert [event["kind"] for event in seen["scale"]["events"]] == ["back-off"]
        assert seen["scale"]["healthy"]


def test_layers_go_by_their_names_in_the_model(both):
    assert both[0]["overflow"]["layers"] == ["first", "second", "head", "norm"]
    assert both[0]["overflow"]["world"] == 2
