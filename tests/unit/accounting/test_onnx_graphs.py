"""ONNX files as a whole: shapes, folding, weights outside the file, control flow, parameters, lives, and bad files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from narrowcast.accounting.kinds import Kind
from narrowcast.accounting.profile import Profile, profile
from narrowcast.accounting.sources import GraphSource, parse_input, source
from narrowcast.errors import ModelError

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
Shape = Sequence[int | str | None] | None


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., str]:
    """Write a graph to a file, and return its path. Inputs are shapes of float32, constants arrays."""

    def write(
        nodes: Sequence[onnx.NodeProto],
        inputs: Mapping[str, Shape],
        outputs: Sequence[str],
        constants: Mapping[str, np.ndarray[Any, Any]] | None = None,
        *,
        types: Mapping[str, int] | None = None,
        functions: Sequence[onnx.FunctionProto] = (),
        domains: Sequence[str] = (),
        outside: bool = False,
    ) -> str:
        types = types or {}
        graph = helper.make_graph(
            list(nodes),
            "g",
            [helper.make_tensor_value_info(name, types.get(name, FLOAT), shape) for name, shape in inputs.items()],
            [helper.make_tensor_value_info(name, types.get(name, FLOAT), None) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
        )
        opsets = [helper.make_opsetid(domain, 20 if not domain else 1) for domain in ("", *domains)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions))
        path = tmp_path / "model.onnx"
        onnx.save(model, path, save_as_external_data=outside, location="weights.bin", size_threshold=0)
        return str(path)

    return write


def node(operator: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """Return a node; inputs and outputs are words, ``_`` is one that is left out."""
    names = [[word.strip("_") for word in text.split()] for text in (inputs, outputs)]
    return helper.make_node(operator, *names, name=attributes.pop("name", f"{operator}_{outputs}"), **attributes)


def ones(*shape: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.ones(shape, dtype)


def count(path: str, *inputs: str, **options: Any) -> Profile:
    return profile(source(path, inputs=inputs, **options))


# Shapes ---------------------------------------------------------------------------------------------------------------

LINEAR = [node("MatMul", "x w", "p"), node("Add", "p b", "y")]
WEIGHTS = {"w": ones(16, 8), "b": ones(8)}


@pytest.mark.parametrize(
    ("given", "options", "rows"),
    [
        ((), {}, 1),
        ((), {"batch": 5}, 5),
        (("x=3x16",), {}, 3),
        (("4x16",), {}, 4),
        (("x=3x16",), {"batch": 9}, 3),  # a shape says more than a batch
    ],
)
def test_dynamic_axes_are_bound_by_the_user(
    save: Callable[..., str], given: Sequence[str], options: dict[str, int], rows: int
) -> None:
    found = count(save(LINEAR, {"x": ["batch", 16]}, ["y"], WEIGHTS), *given, **options)
    assert (found.inputs, found.input_names) == ([[rows, 16]], ["x"])
    assert (found.macs, found.bias_adds, found.other_flops) == (rows * 128, rows * 8, 0)


def test_tokens_bind_the_second_axis_of_integer_inputs_and_all_axes_of_its_name(save: Callable[..., str]) -> None:
    nodes = [
        node("Gather", "table ids", "e"),
        node("MatMul", "mask e", "y"),
    ]
    inputs = {"mask": ["batch", "tokens", "tokens"], "ids": ["batch", "tokens"]}
    path = save(nodes, inputs, ["y"], {"table": ones(50, 6)}, types={"ids": INT64})
    assert count(path, tokens=7, batch=2).macs == 2 * 7 * 7 * 6
    assert count(path).inputs == [[1, 128, 128], [1, 128]]


@pytest.mark.parametrize(
    ("shape", "given", "options", "message"),
    [
        (["batch", 16], ("z=1x16",), {}, "no input 'z'"),
        (["batch", 16], ("1x16", "1x16"), {}, "2 shapes for"),
        (["batch", 16], ("1x17",), {}, "'x' of shape 1x17 does not fit"),
        (["batch", 16], ("1x1x16",), {}, "does not fit"),
        (["batch", 16], ("1x16:int64",), {}, "cannot be int64"),
        ([1, 16], (), {"batch": 4}, "no input has 4 batch"),
        (["batch", 16], (), {"tokens": 4}, "no input has 4 tokens"),
        (["batch", "width"], (), {}, "leaves input 'x' open: batchxwidth"),
        (None, (), {}, "leaves input 'x' open: unknown"),
    ],
)
def test_inputs_that_do_not_fit_are_named(
    save: Callable[..., str], shape: Shape, given: Sequence[str], options: dict[str, int], message: str
) -> None:
    path = save(LINEAR, {"x": shape}, ["y"], WEIGHTS)
    with pytest.raises(ModelError, match=message):
        count(path, *given, **options)


def test_an_input_without_a_shape_takes_the_users(save: Callable[..., str]) -> None:
    assert count(save(LINEAR, {"x": None}, ["y"], WEIGHTS), "2x16").macs == 256


def test_sizes_that_disagree_on_an_axis_are_refused(save: Callable[..., str]) -> None:
    path = save([node("Add", "a b", "y")], {"a": ["n", 2], "b": ["n", 2]}, ["y"])
    with pytest.raises(ModelError, match="axis 'n' of input 'b' is 4, and another input says 3"):
        count(path, "a=3x2", "b=4x2")


def test_computed_shapes_are_followed_and_cost_nothing(save: Callable[..., str]) -> None:
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s zero", "n"),
        node("Mul", "n two", "m"),
        node("Concat", "m eight", "to", axis=0),
        node("Reshape", "x to", "r"),
        node("MatMul", "r w", "y"),
    ]
    constants = {
        "zero": np.asarray([0]),
        "two": np.asarray([2]),
        "eight": np.asarray([8]),
        "w": ones(8, 4),
    }
    found = count(save(nodes, {"x": ["batch", 16]}, ["y"], constants), batch=3)
    assert [operator.name for operator in found.operators] == ["Reshape", "MatMul"]
    assert found.operators[0].outputs == ((6, 8),)
    assert found.parameters.total == 32
    assert (found.macs, found.other_flops) == (6 * 8 * 4, 0)


def test_shapes_that_depend_on_numbers_name_node_and_tensor(save: Callable[..., str]) -> None:
    nodes = [node("NonZero", "x", "i", name="finder"), node("Cast", "i", "y", to=FLOAT)]
    with pytest.raises(ModelError, match=r"(?s)without shapes.*tensor 'i' open, which node 'finder' \(NonZero\) makes"):
        count(save(nodes, {"x": [4, 4]}, ["y"]))


def test_onnx_runtime_is_asked_for_shapes_that_inference_leaves_open(save: Callable[..., str]) -> None:
    # A size that goes through floating numbers is followed by none but the engine that folds it.
    nodes = [
        node("Shape", "x", "s"),
        node("Cast", "s", "f", to=FLOAT),
        node("Sqrt", "f", "q"),
        node("Cast", "q", "to", to=INT64),
        node("Expand", "one to", "e"),
        node("Add", "x e", "unused"),
        node("ConstantOfShape", "to", "z"),
        node("MatMul", "z w", "y"),
        node("Add", "y v", "out"),
    ]
    constants = {"one": ones(1, 1), "w": ones(4, 2)}
    path = save([*nodes[:4], *nodes[6:]], {"x": [9, 16], "v": [3, 2]}, ["out"], constants)
    found = count(path)
    assert [operator.outputs for operator in found.operators] == [((3, 2),)]  # the product is of constants


# Folding --------------------------------------------------------------------------------------------------------------


def test_what_is_computed_of_constants_alone_is_folded_and_its_weights_are_parameters(save: Callable[..., str]) -> None:
    nodes = [node("Transpose", "w", "t", perm=[1, 0]), node("MatMul", "x t", "y")]
    found = count(save(nodes, {"x": [2, 16]}, ["y"], {"w": ones(8, 16)}))
    assert [operator.name for operator in found.operators] == ["MatMul"]
    assert found.parameters.by_kind == {"MatMul": 128}
    assert found.operators[0].weight_bytes == 4 * 128


def test_weights_in_few_bits_are_dequantised_in_every_run(save: Callable[..., str]) -> None:
    nodes = [node("DequantizeLinear", "q s z", "w"), node("MatMul", "x w", "p"), node("Add", "p b", "y")]
    constants = {"q": ones(16, 8, dtype=np.int8), "s": np.float32(0.1), "z": np.int8(0), "b": ones(8)}
    found = count(save(nodes, {"x": [2, 16]}, ["y"], {key: np.asarray(value) for key, value in constants.items()}))
    dequantise, product, _ = found.operators
    assert (dequantise.work.other, dequantise.bytes_written) == (2 * 128, 4 * 128)
    assert (product.weight_bytes, found.macs, found.bias_adds) == (4 * 128, 256, 16)
    assert found.parameters.by_kind == {"MatMul": 128, "Add": 8}
    assert (found.parameters.bytes, found.parameters.trainable) == (128 + 32, 8)


def test_a_bias_of_repeated_zeros_is_none(save: Callable[..., str]) -> None:
    nodes = [
        node("Expand", "zero size", "b"),
        node("Conv", "x w b", "y"),
    ]
    constants = {"zero": np.zeros(1, np.float32), "size": np.asarray([4]), "w": ones(4, 3, 1, 1)}
    found = count(save(nodes, {"x": [1, 3, 5, 5]}, ["y"], constants))
    assert (found.macs, found.bias_adds, found.parameters.total) == (300, 0, 12)


@pytest.mark.parametrize(
    ("shape", "bias"), [((8,), True), ((1, 1, 8), True), ((5, 8), False), ((1,), False), ((5, 1), False)]
)
def test_an_addition_after_a_product_is_a_bias_if_it_has_a_number_for_each_output(
    save: Callable[..., str], shape: tuple[int, ...], bias: bool
) -> None:
    found = count(save(LINEAR, {"x": [3, 5, 16]}, ["y"], {"w": ones(16, 8), "b": ones(*shape)}))
    assert (found.bias_adds, found.other_flops) == ((120, 0) if bias else (0, 120))


# Files ----------------------------------------------------------------------------------------------------------------


def test_weights_outside_the_file_are_never_opened(save: Callable[..., str], tmp_path: Path) -> None:
    path = save(LINEAR, {"x": ["batch", 16]}, ["y"], WEIGHTS, outside=True)
    before = count(path)
    (tmp_path / "weights.bin").unlink()
    assert count(path) == before
    assert before.parameters.bytes == before.static_bytes == 4 * 136


def test_weights_beyond_two_gigabytes_are_counted_from_their_shapes(save: Callable[..., str]) -> None:
    path = save([node("MatMul", "x w", "y")], {"x": [1, 16]}, ["y"], {"w": ones(16, 8)}, outside=True)
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].dims[:] = [16, 1 << 32]
    for entry in model.graph.initializer[0].external_data:
        entry.value = {"location": "../../elsewhere", "offset": "0", "length": str(64 << 32)}[entry.key]
    Path(path).write_bytes(model.SerializeToString())
    found = count(path)
    assert (found.macs, found.static_bytes) == (16 << 32, 64 << 32)


def test_two_names_for_one_place_outside_are_tied(save: Callable[..., str]) -> None:
    nodes = [node("MatMul", "x w", "p"), node("MatMul", "p v", "y")]
    path = save(nodes, {"x": [1, 8]}, ["y"], {"w": ones(8, 8), "v": ones(8, 8)}, outside=True)
    model = onnx.load(path, load_external_data=False)
    first, second = model.graph.initializer
    del second.external_data[:]
    second.external_data.extend(first.external_data)
    Path(path).write_bytes(model.SerializeToString())
    found = count(path)
    assert (found.parameters.total, found.parameters.tied, found.static_bytes) == (64, {"v": "w"}, 256)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "holds no graph"), (b"not a model at all", "cannot be read"), (b"\x08\x07\x12", "cannot be read")],
)
def test_files_that_are_no_models_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=reason):
        count(str(path))


def test_a_truncated_file_and_a_missing_one_are_refused(save: Callable[..., str]) -> None:
    path = Path(save(LINEAR, {"x": ["batch", 16]}, ["y"], WEIGHTS))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ModelError, match="cannot be read as an ONNX model"):
        count(str(path))
    with pytest.raises(ModelError, match=r"nowhere\.onnx does not exist"):
        count("nowhere.onnx")


def test_a_graph_that_reads_what_nobody_makes_is_refused(save: Callable[..., str]) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        count(save([node("Add", "x ghost", "y")], {"x": [2]}, ["y"]))


def bare(values: Sequence[onnx.ValueInfoProto]) -> list[str]:
    """Return the names of the values without a type or without a shape."""
    return [
        value.name
        for value in values
        if not value.type.WhichOneof("value")
        or (value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape"))
    ]


@pytest.mark.parametrize("typed", [True, False])
def test_results_may_lack_types_and_shapes_whatever_the_checker_asks(
    save: Callable[..., str], monkeypatch: pytest.MonkeyPatch, typed: bool
) -> None:
    result = lambda name: helper.make_tensor_value_info(name, FLOAT, None) if typed else onnx.ValueInfoProto(name=name)  # noqa: E731
    then = helper.make_graph([node("MatMul", "x w", "a")], "then", [], [result("a")])
    other = helper.make_graph([node("Relu", "x", "r"), node("MatMul", "r w", "b")], "else", [], [result("b")])
    path = save(
        [node("If", "c", "y", then_branch=then, else_branch=other)],
        {"x": [2, 16], "c": []},
        ["y"],
        {"w": ones(16, 8)},
        types={"c": TensorProto.BOOL},
    )
    model = onnx.load(path)
    model.graph.output[0].CopyFrom(result("y"))
    onnx.save(model, path)
    check = onnx.checker.check_model

    def strict(checked: onnx.ModelProto) -> None:
        inner = [entry.g for entry in checked.graph.node[0].attribute]
        for graph in (checked.graph, *inner):
            if missing := bare([*graph.input, *graph.output, *graph.value_info]):
                raise onnx.checker.ValidationError(f"Field 'shape' of 'type' is required but missing: {missing}")
        check(checked)

    monkeypatch.setattr(onnx.checker, "check_model", strict)
    assert count(path).macs == 2 * 16 * 8


def test_an_input_without_a_type_is_refused(save: Callable[..., str]) -> None:
    path = save(LINEAR, {"x": ["batch", 16]}, ["y"], WEIGHTS)
    model = onnx.load(path)
    model.graph.input[0].ClearField("type")
    onnx.save(model, path)
    with pytest.raises(ModelError, match=r"cannot be read as an ONNX model.*type"):
        count(path)


def test_a_graph_cannot_be_trained(save: Callable[..., str]) -> None:
    path = save(LINEAR, {"x": ["batch", 16]}, ["y"], WEIGHTS)
    with pytest.raises(ModelError, match="no backward"):
        profile(source(path), train=True)


def test_an_artifact_folder_is_counted_by_its_graph(save: Callable[..., str], tmp_path: Path) -> None:
    save(LINEAR, {"x": ["batch", 16]}, ["y"], WEIGHTS)
    found = source(str(tmp_path))
    assert isinstance(found, GraphSource)
    assert profile(found).macs == 128
    with pytest.raises(ModelError, match=r"no model\.onnx"):
        source(f"artifact:{tmp_path / 'empty'}")


@pytest.mark.parametrize("text", ["", "x=", "1x", "axb", "1x3:floating", "x=1x-3"])
def test_shapes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ModelError, match="input"):
        parse_input(text)


def test_names_with_dots_and_slashes_can_be_given() -> None:
    assert parse_input("model/input.1=1x3:int64") == ("model/input.1", (1, 3), "int64")


def test_counting_a_graph_needs_no_torch(save: Callable[..., str]) -> None:
    path = save(LINEAR, {"x": ["batch", 16]}, ["y"], WEIGHTS)
    script = f"""
import sys
sys.modules["torch"] = sys.modules["sympy"] = None  # importing them fails
from narrowcast.accounting.profile import profile
from narrowcast.accounting.sources import source
from narrowcast.errors import RuntimeMissingError
print(profile(source({path!r})).macs)
try:
    source("timm:resnet18")
except RuntimeMissingError as error:
    print(error.what)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["128", "timm:resnet18 needs PyTorch, which is not installed"]


# Control flow and functions -------------------------------------------------------------------------------------------


def body(
    nodes: Sequence[onnx.NodeProto], inputs: Mapping[str, tuple[int, Shape]], outputs: Sequence[str], **c: Any
) -> Any:
    return helper.make_graph(
        list(nodes),
        "body",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.BOOL if name == "go" else FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in c.items()],
    )


def test_the_larger_branch_of_an_if_counts(save: Callable[..., str]) -> None:
    then = body([node("MatMul", "x w", "a")], {}, ["a"])
    other = body([node("Relu", "x", "r"), node("MatMul", "r v", "b")], {}, ["b"], v=ones(16, 8))
    nodes = [node("If", "c", "y", then_branch=then, else_branch=other)]
    path = save(nodes, {"x": [2, 16], "c": []}, ["y"], {"w": ones(16, 8)}, types={"c": TensorProto.BOOL})
    found = count(path)
    assert [operator.name for operator in found.operators] == ["Relu", "MatMul", "If"]
    assert (found.macs, found.other_flops, found.parameters.total) == (256, 32, 256)  # the file holds both branches
    assert found.operators[-1].attributes == {
        "counted": "else_branch",
        "macs": {"then_branch": 256, "else_branch": 256},
    }
    assert not found.uncounted


LOOP_INPUTS = {"i": (INT64, []), "go_in": (TensorProto.BOOL, []), "h": (FLOAT, None)}


@pytest.mark.parametrize(("trips", "cond"), [(5, "_"), (5, "yes"), (0, "_")])
def test_a_loop_counts_every_pass(save: Callable[..., str], trips: int, cond: str) -> None:
    inner = body([node("Identity", "go_in", "go"), node("MatMul", "h w", "n")], LOOP_INPUTS, ["go", "n"])
    constants = {"w": ones(8, 8), "m": np.asarray(trips), "yes": np.asarray(True)}
    path = save([node("Loop", f"m {cond} x", "y", body=inner)], {"x": [2, 8]}, ["y"], constants)
    found = count(path)
    assert found.macs == trips * 128
    assert found.by_operator.get("MatMul", (0, 0)) == (trips * 128, trips)
    assert not found.uncounted
    assert found.operators[-1].attributes == {"passes": trips}


def test_a_trip_count_may_come_from_a_shape(save: Callable[..., str]) -> None:
    inner = body([node("Identity", "go_in", "go"), node("MatMul", "h w", "n")], LOOP_INPUTS, ["go", "n"])
    nodes = [node("Shape", "x", "s"), node("Gather", "s one", "m"), node("Loop", "m _ x", "y", body=inner)]
    found = count(save(nodes, {"x": [2, 8]}, ["y"], {"w": ones(8, 8), "one": np.asarray(1)}))
    assert found.macs == 8 * 128


def test_a_loop_that_numbers_stop_counts_one_pass_and_says_so(save: Callable[..., str]) -> None:
    nodes = [
        node("MatMul", "h w", "n"),
        node("ReduceSum", "n", "total", keepdims=0),
        node("Cast", "total", "go", to=TensorProto.BOOL),
    ]
    constants = {"w": ones(8, 8), "m": np.asarray(5)}
    path = save(
        [node("Loop", "m _ x", "y", body=body(nodes, LOOP_INPUTS, ["go", "n"]))], {"x": [2, 8]}, ["y"], constants
    )
    found = count(path)
    assert found.macs == 128
    assert list(found.uncounted) == ["node 'Loop_y' (Loop): passes after the first, as many as the numbers say"]


def test_a_scan_runs_once_for_each_slice(save: Callable[..., str]) -> None:
    inner = body(
        [node("MatMul", "x_t w", "p"), node("Add", "p h", "n"), node("Identity", "n", "out")],
        {"h": (FLOAT, [2, 4]), "x_t": (FLOAT, [2, 8])},
        ["n", "out"],
    )
    nodes = [node("Scan", "h0 x", "last all", num_scan_inputs=1, body=inner)]
    found = count(save(nodes, {"h0": [2, 4], "x": [6, 2, 8]}, ["last", "all"], {"w": ones(8, 4)}))
    assert (found.macs, found.other_flops) == (6 * 64, 6 * 8)
    assert [operator.producers for operator in found.operators if operator.name == "Add"] == [
        (3 * place, -1) for place in range(6)
    ]


def test_functions_of_the_model_are_inlined(save: Callable[..., str]) -> None:
    function = helper.make_function(
        "mine",
        "Double",
        ["a", "w"],
        ["c"],
        [node("MatMul", "a w", "b"), node("MatMul", "b w", "c")],
        [helper.make_opsetid("", 20)],
    )
    call = helper.make_node("Double", ["x", "w"], ["y"], domain="mine", name="call")
    path = save([call], {"x": [2, 8]}, ["y"], {"w": ones(8, 8)}, functions=[function], domains=["mine"])
    found = count(path)
    assert (found.macs, found.parameters.total, found.uncounted) == (256, 64, {})


# Parts, parameters, lives ---------------------------------------------------------------------------------------------


def test_modules_are_found_in_the_names_of_nodes(save: Callable[..., str]) -> None:
    nodes = [
        node("Conv", "x w", "a", name="/layer1/layer1.0/conv1/Conv"),
        node("Relu", "a", "b", name="/layer1/layer1.0/relu/Relu"),
        node("Conv", "b stem.weight", "y", name="Conv_7"),
    ]
    constants = {"w": ones(4, 3, 1, 1), "stem.weight": ones(2, 4, 1, 1)}
    found = count(save(nodes, {"x": [1, 3, 5, 5]}, ["y"], constants))
    parts = {part.path: part for part in found.parts}
    assert list(parts) == ["", "layer1", "layer1.0", "layer1.0.conv1", "layer1.0.relu", "stem"]
    assert parts[""].macs == found.macs == parts["layer1"].macs + parts["stem"].macs
    assert (parts["layer1.0"].parameters, parts["layer1.0"].other_flops) == (12, 100)
    assert parts[""].parameters == found.parameters.total == 20


def test_modules_are_found_in_the_properties_that_pytorch_writes(save: Callable[..., str]) -> None:
    def scoped(made: onnx.NodeProto, names: list[str], classes: list[str], rule: str = "") -> onnx.NodeProto:
        for key, value in (("name_scopes", repr(names)), ("class_hierarchy", repr(classes))):
            made.metadata_props.add(key=f"pkg.torch.onnx.{key}", value=value)
        made.metadata_props.add(key="pkg.onnxscript.rewriter.rule_name", value=rule)
        return made

    classes = ["m.Net", "torch.nn.modules.batchnorm.BatchNorm2d", "aten.batch_norm"]
    nodes = [
        scoped(node("Conv", "x stem.conv.weight", "a"), ["", "stem.bn", "bn"], classes, "FuseBatchNormIntoConv"),
        scoped(node("Relu", "a", "b"), ["", "act", "relu"], ["m.Net", "torch.nn.ReLU", "aten.relu"]),
        scoped(node("Relu", "b", "y"), ["__import__('os')"], ["evil"]),
    ]
    found = count(save(nodes, {"x": [1, 3, 5, 5]}, ["y"], {"stem.conv.weight": ones(4, 3, 1, 1)}))
    assert [operator.path for operator in found.operators] == ["stem.conv", "act", ""]
    assert {part.path: part.kind for part in found.parts} == {"": "Net", "stem": "", "stem.conv": "", "act": "ReLU"}


def test_settings_and_single_numbers_are_no_parameters(save: Callable[..., str]) -> None:
    nodes = [
        node("Reshape", "x shape", "a"),
        node("Clip", "a low high", "b"),
        node("Mul", "b half", "c"),
        node("Mul", "c gamma", "d"),
        node("Gather", "positions index", "p"),
        node("Cast", "p", "f", to=FLOAT),
        node("Add", "d f", "y"),
    ]
    constants = {
        "shape": np.asarray([2, 8]),
        "low": np.float32(0),
        "high": np.float32(6),
        "half": np.float32(0.5),
        "gamma": ones(8),
        "positions": np.arange(80).reshape(10, 8),
    }
    arrays = {key: np.asarray(value) for key, value in constants.items()}
    found = count(save(nodes, {"x": [16], "index": [2]}, ["y"], arrays, types={"index": INT64}))
    assert found.parameters.by_kind == {"Mul": 8}


def test_one_constant_counts_once_however_often_it_is_read(save: Callable[..., str]) -> None:
    nodes = [
        node("Gather", "w ids", "e"),
        node("Transpose", "w", "t", perm=[1, 0]),
        node("MatMul", "e t", "y"),
    ]
    found = count(save(nodes, {"ids": [7]}, ["y"], {"w": ones(50, 6)}, types={"ids": INT64}))
    assert (found.parameters.total, found.parameters.by_kind, found.macs) == (300, {"Gather": 300}, 7 * 6 * 50)


def test_live_bytes_rise_and_fall(save: Callable[..., str]) -> None:
    nodes = [
        node("MatMul", "x w", "a"),
        node("Reshape", "a flat", "v"),  # a view keeps its bytes alive
        node("Relu", "v", "b"),
        node("Reshape", "b back", "c"),
        node("MatMul", "c u", "y"),
    ]
    constants = {"w": ones(256, 1024), "u": ones(1024, 16), "flat": np.asarray([-1]), "back": np.asarray([64, 1024])}
    found = count(save(nodes, {"x": [64, 256]}, ["y"], constants))
    weights = 4 * (256 * 1024 + 1024 * 16) + 3 * 8
    assert found.static_bytes == weights
    inputs, hidden, result = 4 * 64 * 256, 4 * 64 * 1024, 4 * 64 * 16
    assert [operator.live_bytes - weights - inputs for operator in found.operators] == [
        hidden,
        hidden,
        2 * hidden,
        hidden,
        hidden + result,
    ]
    assert found.peak_bytes == weights + inputs + 2 * hidden
    assert [operator.kind for operator in found.operators][1] is Kind.VIEW
    assert [operator.producers for operator in found.operators] == [(-1, -1), (0,), (0,), (2,), (2, -1)]
