"""Two processes with the same weights or with parts of them: the steps of one process, and one decision."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import replicas

SIZES = [6, 3, 8, 2, 5, 5, 1, 10]
SCRIPT = Path(replicas.__file__)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("replicas")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(SCRIPT), str(folder), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for rank in range(2)
    ]
    said = []
    for one in running:
        with one:
            said.append((*one.communicate(timeout=600), one.returncode))
    assert all(code == 0 for _, _, code in said), "\n".join(err for _, err, _ in said)
    return [json.loads(out.splitlines()[-1]) for out, _, _ in said]


@pytest.mark.parametrize(("policy", "sharded", "flush"), replicas.CASES)
def test_two_processes_take_the_steps_of_one(both, policy, sharded, flush):
    """Losses weigh tokens that count: micro-batches of 1 to 10 samples, some of them ignored, dealt out to two ranks."""
    key = f"{policy} { {'flush': flush, 'sharded': sharded} }"
    alone = replicas.trained(None, policy, SIZES, flush=flush)
    first, second = (seen["training"][key] for seen in both)
    assert first == second
    bound = 1e-5 if policy in ("fp32", "fp16-mixed") else 2e-2
    for (loss, norm, updated), (expected, expected_norm, _) in zip(first["losses"], alone["losses"], strict=True):
        assert updated
        assert loss == pytest.approx(expected, rel=bound)
        assert norm == pytest.approx(expected_norm, rel=2 * bound)
    assert first["weights"] == pytest.approx(alone["weights"], abs=bound)


@pytest.mark.parametrize(
    ("where", "layer", "kind"),
    [
        ("backward", "second.bias", "inf"),
        ("forward", "head.bias", "nan"),
        ("backward sharded", "second.bias", "inf"),
        ("forward sharded", "head.bias", "nan"),
    ],
)
def test_a_fault_on_one_rank_is_a_skip_on_all_and_the_ledger_names_the_rank(both, where, layer, kind):
    for seen in both:
        fault = seen["faults"][where]
        assert fault == {
            "skipped": True,
            "moved": False,
            "scale": 32.0,
            "steps": 1,
            "rank": 1,
            "layer": layer,
            "kind": kind,
        }


def test_without_a_loss_scale_all_ranks_stop_and_name_the_one(both):
    for seen in both:
        assert "update 1 is not finite, in precision bf16-mixed on rank 1" in seen["stopped"]
        assert "the first in the backward pass is head.bias" in seen["stopped"]


def test_a_window_that_weighs_nothing_on_one_rank_is_an_update_and_one_without_any_weight_an_error_on_all(both):
    for seen in both:
        first, second, said = seen["weightless"]
        assert 0 < second < first
        assert "weigh nothing" in said


@pytest.mark.parametrize(("policy", "kind", "sharded"), replicas.LATE)
@pytest.mark.parametrize(("accumulate", "cut"), [(1, 5), (1, 7), (2, 10)])
def test_it_comes_to_the_same_on_all_ranks_whenever_decisions_are_learnt(both, policy, kind, sharded, accumulate, cut):
    """With faults on rank 1, of which rank 0 alone asks, and a state loaded with a decision under way."""
    key = f"{policy} {kind.__name__} {sharded} {accumulate} {cut}"
    at_once = [seen["late"][key][0] for seen in both]
    assert [seen["late"][key][1] for seen in both] == at_once
    (steps, skips, state), (others, their_skips, _) = map(json.loads, at_once)
    closed = slice(accumulate - 1, None, accumulate)
    assert str(steps[closed]) == str(others[closed])  # which hold NaN
    assert skips == their_skips
    skipped = [number // accumulate for number in replicas.FAULTS]
    assert [one["attempt"] for one in skips] == sorted(set(skipped))
    assert state["counters"] == {"steps": 18 // accumulate - len(skips), "skipped": len(skips)}
    assert {(one["rank"], one["layers"][0]) for one in skips} == {(1, "second.bias")}
    assert [one["kind"] for one in skips] == ["inf", "nan", "inf", "nan"]
