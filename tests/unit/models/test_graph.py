from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from contracts.graphs import CASES, Builder, Case
from narrowcast.models.execution import session_of
from narrowcast.models.graph import Graph, TensorInfo, attribute, make_node

all_cases = pytest.mark.parametrize("case", CASES, ids=str)


def run(graph: Graph, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [np.asarray(value) for value in session_of(graph).run(None, feeds)]


@all_cases
def test_a_graph_survives_being_written_and_read(case: Case, tmp_path: Path) -> None:
    first = Graph.from_model(case.model())
    first.save(tmp_path / "a.onnx")
    again = Graph.load(tmp_path / "a.onnx")
    assert [node.SerializeToString() for node in again.nodes] == [node.SerializeToString() for node in first.nodes]
    assert again.inputs == first.inputs
    assert again.outputs == first.outputs
    assert again.opsets == first.opsets
    assert again.constants.keys() == first.constants.keys()
    for name, value in first.constants.items():
        np.testing.assert_array_equal(again.constants[name], value)
    again.save(tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@all_cases
def test_every_tensor_of_a_graph_has_a_type(case: Case) -> None:
    graph = Graph.from_model(case.model())
    for node in graph.nodes:
        for name in node.output:
            assert graph.dtype(name) is not None, name
            assert graph.rank(name) is not None, name


def test_constant_nodes_become_constants() -> None:
    value = numpy_helper.from_array(np.array([2.0, 3.0], np.float32), "v")
    nodes = [helper.make_node("Constant", [], ["two"], value=value), helper.make_node("Mul", ["x", "two"], ["y"])]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in ("x", "y")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", infos[:1], infos[1:]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    graph = Graph.from_model(model)
    assert [node.op_type for node in graph.nodes] == ["Mul"]
    np.testing.assert_array_equal(graph.constants["two"], [2, 3])
    (found,) = run(graph, {"x": np.ones((1, 2), np.float32)})
    np.testing.assert_array_equal(found, [[2, 3]])


def test_initialisers_listed_as_inputs_are_not_fed() -> None:
    model = CASES[0].model()
    weight = model.graph.initializer[0]
    model.graph.input.append(helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims))
    assert [info.name for info in Graph.from_model(model).inputs] == ["image"]


def test_a_dynamic_axis_keeps_its_name_and_a_fixed_one_its_size() -> None:
    (info,) = Graph.from_model(CASES[0].model()).inputs
    assert info == TensorInfo("image", np.dtype(np.float32), ("batch", 3, 9, 9))
    assert info.dynamic_batch
    assert not TensorInfo("x", np.dtype(np.float32), (1, 2)).dynamic_batch
    assert not TensorInfo("x", np.dtype(np.float32), ()).dynamic_batch


def test_a_copy_can_be_edited_alone() -> None:
    graph = Graph.from_model(CASES[0].model())
    copy = graph.copy()
    copy.nodes[0].input[0] = "elsewhere"
    copy.nodes.pop()
    copy.constants.clear()
    copy.inputs.clear()
    copy.values.clear()
    assert graph.nodes[0].input[0] == "image"
    assert len(graph.nodes) == 3
    assert graph.constants
    assert graph.inputs
    assert graph.values


def test_only_constants_in_use_are_written() -> None:
    graph = Graph.from_model(CASES[0].model())
    graph.constant("unused", np.zeros(10**6, np.float32))
    assert "unused" not in {item.name for item in graph.to_model().graph.initializer}


def test_a_taken_name_gets_a_number() -> None:
    graph = Graph.from_model(CASES[0].model())
    names = [graph.constant("scale", np.float32(value)) for value in (1.0, 2.0, 3.0)]
    assert len(set(names)) == 3
    assert [float(graph.constants[name]) for name in names] == [1.0, 2.0, 3.0]


def test_sorting_puts_makers_before_readers_and_keeps_the_order_of_the_rest() -> None:
    case = next(case for case in CASES if case.name == "residual")
    graph = Graph.from_model(case.model())
    names = [node.name for node in graph.nodes]
    before = run(graph, case.feeds(2))
    graph.sort()
    assert [node.name for node in graph.nodes] == names
    graph.nodes.reverse()
    graph.sort()
    for ours, theirs in zip(run(graph, case.feeds(2)), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_cycle_cannot_be_sorted() -> None:
    graph = Graph.from_model(CASES[0].model())
    graph.nodes[0].input[0] = graph.nodes[-1].output[0]
    with pytest.raises(ValueError, match="cycle"):
        graph.sort()


def test_removing_what_is_unused_keeps_the_outputs() -> None:
    case = next(case for case in CASES if case.name == "several_inputs_and_outputs")
    graph = Graph.from_model(case.model())
    scores = run(graph, case.feeds(2))[0]
    graph.outputs = graph.outputs[:1]
    graph.remove_unused()
    assert "mask" not in {node.name for node in graph.nodes}
    assert "mask.w" not in graph.constants
    np.testing.assert_array_equal(run(graph, case.feeds(2))[0], scores)


def test_rewiring_skips_the_nodes_that_it_is_told_to() -> None:
    case = next(case for case in CASES if case.name == "residual")
    graph = Graph.from_model(case.model())
    nodes = {node.name: node for node in graph.nodes}
    graph.rewire({"stem.relu": "other"}, skip=[id(nodes["sum"])])
    assert nodes["a"].input[0] == "other"
    assert "stem.relu" in nodes["sum"].input


def test_consumers_list_each_reader_once() -> None:
    b = Builder(0)
    x = b.node("Relu", b.input("x", 4), out="relu")
    b.node("Mul", x, x, out="out")
    graph = Graph.from_model(b.model(out=(4,)))
    assert [node.name for node in graph.consumers()["relu"]] == ["out"]
    assert graph.producers()["out"].name == "out"


def test_a_subgraph_takes_what_is_made_elsewhere_as_inputs() -> None:
    case = next(case for case in CASES if case.name == "residual")
    graph = Graph.from_model(case.model())
    nodes = [node for node in graph.nodes if node.name in ("b", "sum", "sum.relu")]
    part = graph.subgraph(nodes, ["sum.relu", "b"])
    assert [info.name for info in part.inputs] == ["a.relu", "stem.relu"]
    assert [info.name for info in part.outputs] == ["sum.relu", "b"]
    feeds = {name: np.ones((1, 16, 8, 8), np.float32) for name in ("a.relu", "stem.relu")}
    total, product = run(part, feeds)
    np.testing.assert_allclose(total, np.maximum(product + 1, 0), rtol=1e-6)


def test_inner_graphs_keep_what_they_read_from_outside() -> None:
    branch = helper.make_graph(
        [helper.make_node("Mul", ["outer", "x"], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("Relu", ["x"], ["outer"], name="outer"),
        helper.make_node("ReduceSum", ["x"], ["sum"], name="sum", keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["positive"], name="positive"),
        helper.make_node("If", ["positive"], ["y"], name="if", then_branch=branch, else_branch=branch),
    ]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in ("x", "y")]
    zero = numpy_helper.from_array(np.array(0, np.float32), "zero")
    made = helper.make_graph(nodes, "g", infos[:1], infos[1:], [zero])
    graph = Graph.from_model(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    graph.remove_unused()
    assert [node.name for node in graph.nodes] == ["outer", "sum", "positive", "if"]
    graph.nodes.reverse()
    graph.sort()
    assert [node.name for node in graph.nodes][-1] == "if"


def test_attributes_have_defaults() -> None:
    node = make_node("Conv", ["x", "w"], ["y"], "conv", group=4, strides=[2, 2])
    assert attribute(node, "group", 1) == 4
    assert list(attribute(node, "strides")) == [2, 2]
    assert attribute(node, "dilations") is None
    assert attribute(node, "auto_pad", b"NOTSET") == b"NOTSET"
    assert isinstance(node, onnx.NodeProto)
