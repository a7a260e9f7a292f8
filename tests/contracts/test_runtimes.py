"""The contract that every registered runtime keeps: the same graphs, the same answers, the same errors."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from contracts.graphs import CASES, Case
from narrowcast.data.dataset import Dataset
from narrowcast.errors import DataError, RuntimeFailedError, RuntimeMissingError
from narrowcast.models.prepare import prepare
from narrowcast.recipes.recipe import DynamicInt8, Float16Weights, Optimise, Recipe, StaticInt8, Step, WeightOnlyInt8
from narrowcast.recipes.target import FusionRules
from narrowcast.runtimes import Runtime, get_runtime, runtime_names
from narrowcast.transforms.apply import Built, apply_recipe

Tensors = dict[str, NDArray[Any]]
CALIBRATION, EVALUATION = 48, 16

#: Least SQNR of a quantised graph's outputs against FP32, in dB, per recipe.
BOUNDS: dict[type[Step], float] = {
    StaticInt8: 20.0,
    DynamicInt8: 20.0,
    WeightOnlyInt8: 30.0,
    Float16Weights: 55.0,
    Optimise: 90.0,
}

all_cases = pytest.mark.parametrize("case", CASES, ids=str)


@functools.cache
def evaluator(case: Case) -> ReferenceEvaluator:
    return ReferenceEvaluator(case.model())


@functools.cache
def expected(case: Case, size: int, seed: int = 0) -> Tensors:
    """What ONNX's own NumPy implementation of the operators says."""
    found = evaluator(case)
    return dict(zip(found.output_names, found.run(None, case.feeds(size, seed)), strict=True))


def sqnr_db(exact: NDArray[Any], other: NDArray[Any]) -> float:
    signal = float((exact.astype(np.float64) ** 2).sum())
    noise = float(((exact.astype(np.float64) - other) ** 2).sum())
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def assert_same(actual: Tensors, wanted: Tensors) -> None:
    assert list(actual) == list(wanted)
    for name, values in wanted.items():
        assert actual[name].dtype == values.dtype
        assert actual[name].shape == values.shape
        np.testing.assert_allclose(actual[name], values, rtol=1e-4, atol=1e-5 * float(np.abs(values).max()))


@pytest.fixture
def graph_file(case: Case, tmp_path: Path) -> Path:
    path = tmp_path / f"{case}.onnx"
    onnx.save(case.model(), path)
    return path


def file_of(name: str, folder: Path) -> tuple[Case, Path]:
    case = next(case for case in CASES if case.name == name)
    path = folder / f"{name}.onnx"
    onnx.save(case.model(), path)
    return case, path


# FP32 -----------------------------------------------------------------------------------------------------------------


@all_cases
def test_a_dynamic_batch_axis_takes_any_batch_and_the_outputs_are_right(
    runtime: Runtime, case: Case, graph_file: Path
) -> None:
    session = runtime.load(graph_file)
    assert all(info.dynamic_batch for info in session.inputs)
    for size in (1, 3, 1):
        assert_same(session.run(case.feeds(size)), expected(case, size))


@all_cases
@pytest.mark.parametrize("size", [1, 3])
def test_a_fixed_batch_axis_gives_the_same_outputs(runtime: Runtime, case: Case, graph_file: Path, size: int) -> None:
    session = runtime.load(graph_file, batch=size)
    assert all(info.dynamic_batch or info.shape[0] == size for info in session.inputs)
    assert_same(session.run(case.feeds(size)), expected(case, size))


@all_cases
def test_a_session_names_its_inputs_and_outputs_as_the_graph_does(
    runtime: Runtime, case: Case, graph_file: Path
) -> None:
    session, graph = runtime.load(graph_file), case.model().graph
    feeds = case.feeds(1)
    assert [info.name for info in session.inputs] == [value.name for value in graph.input]
    assert list(session.outputs) == [value.name for value in graph.output]
    for info in session.inputs:
        assert info.dtype == feeds[info.name].dtype
        assert info.shape[1:] == feeds[info.name].shape[1:]


def test_more_threads_change_nothing(runtime: Runtime, tmp_path: Path) -> None:
    case, path = file_of("residual", tmp_path)
    assert_same(runtime.load(path, threads=2).run(case.feeds(3)), expected(case, 3))


def test_outputs_stay_as_they_are_when_the_session_runs_again(runtime: Runtime, tmp_path: Path) -> None:
    case, path = file_of("several_inputs_and_outputs", tmp_path)
    session = runtime.load(path)
    first = session.run(case.feeds(3))
    kept = {name: array.copy() for name, array in first.items()}
    session.run(case.feeds(3, seed=1))
    for name, array in kept.items():
        np.testing.assert_array_equal(first[name], array)


def test_sessions_of_one_file_do_not_share_state(runtime: Runtime, tmp_path: Path) -> None:
    case, path = file_of("gemm", tmp_path)
    one, other = runtime.load(path), runtime.load(path, batch=1)
    first = one.run(case.feeds(3))
    other.run(case.feeds(1, seed=7))
    assert_same(first, expected(case, 3))
    other.close()
    assert_same(one.run(case.feeds(3)), expected(case, 3))


def test_inputs_are_read_and_not_written(runtime: Runtime, tmp_path: Path) -> None:
    case, path = file_of("conv_relu6", tmp_path)
    feeds = case.feeds(3)
    kept = {name: array.copy() for name, array in feeds.items()}
    runtime.load(path).run(feeds)
    for name, array in kept.items():
        np.testing.assert_array_equal(feeds[name], array)


def test_inputs_need_not_be_contiguous(runtime: Runtime, tmp_path: Path) -> None:
    case, path = file_of("conv_relu6", tmp_path)
    image = case.feeds(3)["image"]
    strided = np.ascontiguousarray(image.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert not strided.flags.c_contiguous
    assert_same(runtime.load(path).run({"image": strided}), expected(case, 3))


# Bad input ------------------------------------------------------------------------------------------------------------


def test_a_missing_input_is_named(runtime: Runtime, tmp_path: Path) -> None:
    case, path = file_of("several_inputs_and_outputs", tmp_path)
    feeds = case.feeds(1)
    del feeds["right"]
    with pytest.raises(DataError, match=r"no input 'right' \(it has 'left'\)"):
        runtime.load(path).run(feeds)


def test_an_input_too_many_is_named(runtime: Runtime, tmp_path: Path) -> None:
    case, path = file_of("conv_relu6", tmp_path)
    with pytest.raises(DataError, match="no input 'mask'") as caught:
        runtime.load(path).run(case.feeds(1) | {"mask": np.zeros((1, 2), np.float32)})
    assert "'image'" in caught.value.allowed


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, np.uint8])
def test_a_wrong_element_type_is_named_with_the_right_one(
    runtime: Runtime, tmp_path: Path, dtype: type[np.generic]
) -> None:
    case, path = file_of("conv_relu6", tmp_path)
    with pytest.raises(DataError, match=f"'image' is {np.dtype(dtype)}") as caught:
        runtime.load(path).run({"image": case.feeds(1)["image"].astype(dtype)})
    assert "float32" in caught.value.allowed


def test_integer_inputs_are_not_cast_either(runtime: Runtime, tmp_path: Path) -> None:
    case, path = file_of("embedding", tmp_path)
    with pytest.raises(DataError, match="'ids' is int32") as caught:
        runtime.load(path).run({"ids": case.feeds(1)["ids"].astype(np.int32)})
    assert "int64" in caught.value.allowed


@pytest.mark.parametrize("shape", [(1, 3, 9, 8), (1, 4, 9, 9), (3, 9, 9), (1, 1, 3, 9, 9)])
def test_a_wrong_shape_is_named_with_the_right_one(runtime: Runtime, tmp_path: Path, shape: tuple[int, ...]) -> None:
    _, path = file_of("conv_relu6", tmp_path)
    with pytest.raises(DataError, match=r"'image' is float32 \[" + ", ".join(map(str, shape))) as caught:
        runtime.load(path).run({"image": np.zeros(shape, np.float32)})
    assert "3, 9, 9" in caught.value.allowed


def test_a_session_for_one_batch_size_refuses_another_or_gets_it_right(runtime: Runtime, tmp_path: Path) -> None:
    case, path = file_of("conv_relu6", tmp_path)
    session = runtime.load(path, batch=2)
    if session.inputs[0].dynamic_batch:
        assert_same(session.run(case.feeds(3)), expected(case, 3))
        return
    with pytest.raises(DataError, match=r"'image' is float32 \[3, 3, 9, 9\]") as caught:
        session.run(case.feeds(3))
    assert "[2, 3, 9, 9]" in caught.value.allowed


@pytest.mark.parametrize("batch", [None, 1])
@pytest.mark.parametrize("share", [0.5, 0.98])
def test_a_truncated_file_is_refused_by_name(runtime: Runtime, tmp_path: Path, share: float, batch: int | None) -> None:
    _, path = file_of("residual", tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(RuntimeFailedError, match=r"residual\.onnx"):
        runtime.load(path, batch=batch)


@pytest.mark.parametrize("batch", [None, 1])
def test_a_file_that_is_no_model_is_refused_by_name(runtime: Runtime, tmp_path: Path, batch: int | None) -> None:
    path = tmp_path / "notes.onnx"
    path.write_text("these are notes, not a model")
    with pytest.raises(RuntimeFailedError, match=r"notes\.onnx"):
        runtime.load(path, batch=batch)


@pytest.mark.parametrize("batch", [None, 1])
def test_a_missing_file_is_refused_by_name(runtime: Runtime, tmp_path: Path, batch: int | None) -> None:
    with pytest.raises(RuntimeFailedError, match=r"absent\.onnx"):
        runtime.load(tmp_path / "absent.onnx", batch=batch)


def test_an_operator_that_does_not_exist_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    case, path = file_of("gemm", tmp_path)
    model = case.model()
    model.graph.node[1].op_type = "Frobnicate"
    onnx.save(model, path)
    with pytest.raises(RuntimeFailedError, match=r"(?s)gemm\.onnx.*Frobnicate"):
        runtime.load(path)


def test_an_unknown_runtime_lists_the_known_ones() -> None:
    with pytest.raises(RuntimeMissingError, match="'onxruntime' is unknown") as caught:
        get_runtime("onxruntime")
    assert all(name in caught.value.allowed for name in runtime_names())
    assert "did you mean onnxruntime?" in caught.value.allowed


def test_every_runtime_says_its_version(runtime: Runtime) -> None:
    assert runtime.version()[0].isdigit()


# Profiling ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "attention", "several_inputs_and_outputs"])
def test_a_profile_gives_the_operators_with_the_slowest_first(runtime: Runtime, tmp_path: Path, name: str) -> None:
    case, path = file_of(name, tmp_path)
    found = runtime.profile(path, case.feeds(1), runs=5)
    seconds = [item.seconds for item in found]
    assert all(item.name and item.op_type for item in found)
    assert len({(item.name, item.op_type) for item in found}) == len(found)
    assert seconds[0] > 0
    assert all(math.isfinite(value) and value >= 0 for value in seconds)
    assert seconds == sorted(seconds, reverse=True)


# Quantised graphs -----------------------------------------------------------------------------------------------------


@functools.cache
def built(case: Case, step: Step, rules: FusionRules) -> Built:
    feeds = case.feeds(CALIBRATION, seed=1)
    data = Dataset("random", "0" * 64, CALIBRATION, lambda i: {name: array[i] for name, array in feeds.items()})
    return apply_recipe(Recipe(name="under-test", steps=(step,)), prepare(case.model(), case.name), data, rules)


STEPS: list[Step] = [step() for step in BOUNDS]
RULES = list(dict.fromkeys(get_runtime(name).rules for name in runtime_names()))  # distinct, in the same order always
all_steps = pytest.mark.parametrize("step", STEPS, ids=lambda step: type(step).__name__)


@all_cases
@all_steps
def test_a_quantised_graph_stays_close_to_fp32(runtime: Runtime, case: Case, step: Step, tmp_path: Path) -> None:
    path = tmp_path / "quantised.onnx"
    built(case, step, runtime.rules).graph.save(path)
    feeds, wanted = case.feeds(EVALUATION, seed=2), expected(case, EVALUATION, 2)
    outputs = runtime.load(path).run(feeds)
    assert list(outputs) == list(wanted)
    for name, exact in wanted.items():
        assert outputs[name].dtype == exact.dtype
        assert outputs[name].shape == exact.shape
        assert sqnr_db(exact, outputs[name]) > BOUNDS[type(step)], name
    one = {name: array[:1] for name, array in feeds.items()}
    fixed = runtime.load(path, batch=1).run(one)
    for name, exact in wanted.items():
        assert sqnr_db(exact[:1], fixed[name]) > BOUNDS[type(step)] - 6, name


@all_cases
@all_steps
@pytest.mark.parametrize("rules", RULES, ids=lambda r: "rules")
def test_a_quantised_graph_is_valid_and_keeps_its_signature(case: Case, step: Step, rules: FusionRules) -> None:
    model = built(case, step, rules).graph.to_model()
    onnx.checker.check_model(model, full_check=True)
    original = case.model().graph
    assert [value.name for value in model.graph.input] == [value.name for value in original.input]
    assert [value.name for value in model.graph.output] == [value.name for value in original.output]
    for ours, theirs in zip(model.graph.input, original.input, strict=True):
        assert ours.type.tensor_type.elem_type == theirs.type.tensor_type.elem_type
        assert ours.type.tensor_type.shape.dim[0].dim_param
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)


@all_cases
@all_steps
def test_a_quantised_graph_is_narrower_where_its_plan_says_so(case: Case, step: Step) -> None:
    made = built(case, step, get_runtime("onnxruntime").rules)
    formats = {operator.format for operator in made.operators}
    dtypes = {array.dtype for array in made.graph.constants.values() if array.ndim > 1 and array.size > 1}
    kinds = {node.op_type for node in made.graph.nodes}
    products = {node.op_type for node in case.model().graph.node} & {"MatMul", "Gemm"}
    if isinstance(step, StaticInt8):
        assert "int8" in formats
        assert np.dtype(np.int8) in dtypes
        assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    elif isinstance(step, WeightOnlyInt8):
        assert formats >= {"int8"}
        assert not any(operator.executed for operator in made.operators if operator.format == "int8")
        assert np.dtype(np.int8) in dtypes
        assert "QuantizeLinear" not in kinds
    elif isinstance(step, Float16Weights):
        assert formats == {"fp16"}
        assert np.dtype(np.float16) in dtypes
    elif isinstance(step, DynamicInt8):
        assert ("MatMulInteger" in kinds) == bool(products)
    else:
        assert formats == {"fp32"}
        assert dtypes <= {np.dtype(np.float32)}
