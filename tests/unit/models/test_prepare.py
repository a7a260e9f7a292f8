from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from contracts.graphs import CASES, Builder, Case
from narrowcast.errors import ModelError
from narrowcast.models.execution import session_of
from narrowcast.models.loaders import load_model
from narrowcast.models.prepare import prepare, read_onnx

RNG = np.random.default_rng(3)


def batch_normalised(**batch_norm: float) -> onnx.ModelProto:
    b = Builder(1)
    x = b.input("image", 3, 8, 8)
    for number, inside in enumerate((3, 16)):
        x = b.conv(x, f"conv{number}", (inside, 16), 3, 3, bias=number == 0)
        values = {
            "scale": RNG.uniform(0.2, 3, 16),
            "shift": RNG.normal(size=16),
            "mean": RNG.normal(size=16),
            "variance": RNG.uniform(0.1, 4, 16),
        }
        names = [b.constant(f"norm{number}.{k}", v.astype(np.float32)) for k, v in values.items()]
        x = b.node("BatchNormalization", x, *names, out=f"norm{number}", **batch_norm)
        x = b.node("Relu", x, out="out" if number else "relu")
    return b.model(out=(16, 8, 8))


def quantised() -> onnx.ModelProto:
    b = Builder(0)
    scale, zero = b.constant("scale", np.array(0.1, np.float32)), b.constant("zero", np.array(3, np.uint8))
    x = b.node("QuantizeLinear", b.input("x", 4), scale, zero, out="codes")
    b.gemm(b.node("DequantizeLinear", x, scale, zero, out="back"), "out", 4, 4)
    return b.model(out=(4,))


def test_folding_batch_normalisation_keeps_the_outputs() -> None:
    model = batch_normalised(epsilon=1e-3)
    graph = prepare(model, "net")
    assert "BatchNormalization" not in {node.op_type for node in graph.nodes}
    assert [node.op_type for node in graph.nodes].count("Conv") == 2
    feeds = {"image": RNG.normal(size=(3, 3, 8, 8)).astype(np.float32)}
    (expected,) = ReferenceEvaluator(model).run(None, feeds)
    (actual,) = session_of(graph).run(None, feeds)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * float(np.abs(expected).max()))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_preparing_keeps_the_outputs_names_and_signature(case: Case) -> None:
    model = case.model()
    before = model.SerializeToString()
    graph = prepare(model, case.name)
    assert model.SerializeToString() == before
    assert [info.name for info in graph.inputs] == [value.name for value in model.graph.input]
    assert [info.name for info in graph.outputs] == [value.name for value in model.graph.output]
    assert all(info.dynamic_batch for info in graph.inputs)
    names = [node.name for node in graph.nodes]
    assert all(names)
    assert len(set(names)) == len(names)
    assert all(graph.dtype(name) is not None for node in graph.nodes for name in node.output if name)
    onnx.checker.check_model(graph.to_model(), full_check=True)
    feeds = case.feeds(3)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for ours, theirs in zip(session_of(graph).run(None, feeds), plain.run(None, feeds), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(np.abs(theirs).max()))


@pytest.mark.parametrize("given", ["", "Clip_1", "Conv_2", "Conv_0"])
def test_missing_node_names_are_made_up_and_unique(given: str) -> None:
    model = CASES[0].model()
    for node in model.graph.node:
        node.name = ""
    model.graph.node[0].name = given
    names = [node.name for node in prepare(model, "net").nodes]
    assert all(names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", [[2, 3], [-1, -2]])
def test_a_spatial_mean_becomes_a_pooling(keepdims: int, axes: list[int]) -> None:
    b = Builder(0)
    x = b.conv(b.input("image", 3, 6, 6), "a", (3, 16), 3, 3)
    b.node("ReduceMean", x, out="out", axes=axes, keepdims=keepdims)
    model = b.model(out=(16, 1, 1) if keepdims else (16,))
    graph = prepare(model, "net")
    assert "GlobalAveragePool" in {node.op_type for node in graph.nodes}
    assert "ReduceMean" not in {node.op_type for node in graph.nodes}
    feeds = {"image": RNG.normal(size=(2, 3, 6, 6)).astype(np.float32)}
    (expected,) = ReferenceEvaluator(model).run(None, feeds)
    np.testing.assert_allclose(session_of(graph).run(None, feeds)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_mean_over_channels_stays_a_mean() -> None:
    b = Builder(0)
    b.node("ReduceMean", b.conv(b.input("image", 3, 6, 6), "a", (3, 16), 3, 3), out="out", axes=[1, 2], keepdims=0)
    assert "ReduceMean" in {node.op_type for node in prepare(b.model(out=(6,)), "net").nodes}


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [7, 12])
def test_an_opset_that_is_too_old_is_refused_with_its_number(version: int) -> None:
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Relu", ["x"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        ),
        opset_imports=[helper.make_opsetid("", version)],
        ir_version=6,
    )
    with pytest.raises(ModelError, match=f"net uses ONNX opset {version}") as caught:
        prepare(model, "net")
    assert "13" in caught.value.allowed


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.onnx does not exist"):
        read_onnx(tmp_path / "absent.onnx")


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 0.99])
def test_a_truncated_file_is_named_with_its_size(tmp_path: Path, share: float) -> None:
    path = tmp_path / "net.onnx"
    content = CASES[0].model().SerializeToString()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelError, match=rf"net\.onnx \({path.stat().st_size} bytes\) cannot be read"):
        load_model(str(path))


@pytest.mark.parametrize("content", [b"hello", b"\x00" * 1000, b"\xff" * 1000])
def test_a_file_that_is_no_onnx_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"net\.onnx .*cannot be read as an ONNX model"):
        load_model(str(path))


def test_missing_external_weights_are_named(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(CASES[0].model(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    load_model(str(path))
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"net\.onnx"):
        load_model(str(path))


def test_a_graph_with_external_weights_is_loaded_whole(tmp_path: Path) -> None:
    case = CASES[0]
    onnx.save(case.model(), tmp_path / "net.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    graph = load_model(str(tmp_path / "net.onnx")).graph
    (expected,) = ReferenceEvaluator(case.model()).run(None, case.feeds(2))
    np.testing.assert_allclose(session_of(graph).run(None, case.feeds(2))[0], expected, rtol=1e-4, atol=1e-4)


def test_an_unsupported_operator_is_named(tmp_path: Path) -> None:
    model = CASES[0].model()
    model.graph.node[1].op_type = "Frobnicate"
    model.graph.node[1].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    path = tmp_path / "net.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"net\.onnx cannot be loaded by ONNX Runtime.*Frobnicate"):
        load_model(str(path))


def test_a_quantised_model_is_refused() -> None:
    with pytest.raises(ModelError, match="net is quantised already"):
        prepare(quantised(), "net")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(bad: float) -> None:
    model = CASES[0].model()
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[3, 1, 1, 1] = bad
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "first.w"))
    with pytest.raises(ModelError, match=r"net holds NaN or infinity in 'first\.w'"):
        prepare(model, "net")


def test_a_small_weight_or_a_bias_that_is_not_finite_is_named_too() -> None:
    model = CASES[0].model()
    names = [item.name for item in model.graph.initializer]
    place = names.index("first.b")
    bias = onnx.numpy_helper.to_array(model.graph.initializer[place]).copy()
    bias[0] = np.nan
    model.graph.initializer[place].CopyFrom(onnx.numpy_helper.from_array(bias, "first.b"))
    with pytest.raises(ModelError, match=r"first\.b"):
        prepare(model, "net")


def test_infinite_bounds_of_a_mask_are_no_broken_weights() -> None:
    b = Builder(0)
    x = b.gemm(b.input("x", 4), "a", 4, 4)
    b.node("Add", x, b.constant("mask", np.array([0, -np.inf, 0, 0], np.float32)), out="masked")
    b.node("Softmax", "masked", out="out")
    graph = prepare(b.model(out=(4,)), "net")
    assert any(np.isneginf(array).any() for array in graph.constants.values() if array.dtype.kind == "f")


def test_a_fixed_batch_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = CASES[0].model()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ModelError, match=r"'image' has the fixed shape \[1, 3, 9, 9\]") as caught:
        load_model(str(tmp_path / "net.onnx"))
    assert "dynamic" in caught.value.allowed


def test_one_fixed_batch_among_dynamic_ones_is_refused(tmp_path: Path) -> None:
    model = next(case for case in CASES if case.name == "several_inputs_and_outputs").model()
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ModelError, match="'right' has the fixed shape"):
        load_model(str(tmp_path / "net.onnx"))


def test_a_loaded_model_is_known_by_the_hash_of_what_was_exported(tmp_path: Path) -> None:
    onnx.save(CASES[0].model(), tmp_path / "a.onnx")
    onnx.save(CASES[1].model(), tmp_path / "b.onnx")
    first, other = load_model(str(tmp_path / "a.onnx")), load_model(f"onnx:{tmp_path / 'b.onnx'}")
    assert first.sha256 == load_model(str(tmp_path / "a.onnx")).sha256 != other.sha256
    assert first.exported == (tmp_path / "a.onnx").read_bytes()
    assert not first.random_weights
