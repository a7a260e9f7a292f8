from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.graphs import CASES, Case
from narrowcast.models.execution import StagedExecutor, session_of
from narrowcast.models.graph import Graph
from narrowcast.models.prepare import prepare
from narrowcast.recipes.target import FusionRules
from narrowcast.transforms.groups import boundaries, find_groups

all_cases = pytest.mark.parametrize("case", CASES, ids=str)
GRAPHS = {case.name: prepare(case.model(), case.name) for case in CASES}


def whole(graph: Graph, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = session_of(graph)
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


def assert_equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-6)


@all_cases
def test_stages_of_fused_groups_compute_what_one_session_computes(case: Case) -> None:
    graph, feeds = GRAPHS[case.name], case.feeds(3)
    executor = StagedExecutor(graph, boundaries(find_groups(graph, FusionRules())))
    assert_equal(executor.run_from(0, feeds), whole(graph, feeds))


@all_cases
def test_any_stage_can_be_the_first(case: Case) -> None:
    graph, feeds = GRAPHS[case.name], case.feeds(2)
    executor, expected = StagedExecutor(graph, [frozenset({node.name}) for node in graph.nodes]), whole(graph, feeds)
    assert len(executor.stages) == len(graph.nodes)
    for index, alive in executor.walk(feeds):
        assert_equal(executor.run_from(index + 1, alive), expected)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(GRAPHS)), cuts=st.data())
def test_arbitrary_cuts_change_nothing(name: str, cuts: st.DataObject) -> None:
    graph = GRAPHS[name]
    names = [node.name for node in graph.nodes]
    places = sorted(cuts.draw(st.sets(st.integers(0, len(names)), max_size=6)))
    sets = [frozenset(names[a:b]) for a, b in itertools.pairwise(places)]
    chosen = [s for s in sets if cuts.draw(st.booleans())]
    feeds = next(case for case in CASES if case.name == name).feeds(2)
    executor = StagedExecutor(graph, chosen)
    assert sorted(node.name for stage in executor.stages for node in stage.nodes) == sorted(names)
    for wanted in chosen:
        assert any({node.name for node in stage.nodes} == wanted for stage in executor.stages)
    assert_equal(executor.run_from(0, feeds), whole(graph, feeds))


@all_cases
def test_a_walk_holds_each_tensor_until_its_last_reader_and_no_longer(case: Case) -> None:
    graph, feeds = GRAPHS[case.name], case.feeds(1)
    executor = StagedExecutor(graph, [frozenset({node.name}) for node in graph.nodes])
    outputs = {info.name for info in graph.outputs}
    for index, alive in executor.walk(feeds):
        later = {name for stage in executor.stages[index + 1 :] for name in stage.inputs}
        assert later | {n for n in outputs if n in alive} <= set(alive) | {
            name for stage in executor.stages[index + 1 :] for name in stage.outputs
        }
        before = {name for stage in executor.stages[:index] for name in stage.outputs} | set(feeds)
        stale = before - later - outputs - set(executor.stages[index].inputs)
        assert not stale & set(alive)


def test_running_from_a_stage_leaves_the_given_tensors_alone() -> None:
    case = next(case for case in CASES if case.name == "residual")
    graph, feeds = GRAPHS["residual"], case.feeds(2)
    executor = StagedExecutor(graph, [frozenset({node.name}) for node in graph.nodes])
    kept = {name: array.copy() for name, array in feeds.items()}
    executor.run_from(0, feeds)
    assert feeds.keys() == kept.keys()
    for name, array in kept.items():
        np.testing.assert_array_equal(feeds[name], array)


def test_a_disturbance_at_a_stage_reaches_the_outputs() -> None:
    case = next(case for case in CASES if case.name == "residual")
    graph, feeds = GRAPHS["residual"], case.feeds(2)
    executor, expected = StagedExecutor(graph, [frozenset({node.name}) for node in graph.nodes]), whole(graph, feeds)
    for index, alive in executor.walk(feeds):
        made = executor.stages[index].outputs[0]
        outputs = executor.run_from(index + 1, alive | {made: alive[made] + 1.0})
        assert np.abs(outputs["out"] - expected["out"]).max() > 1e-3
