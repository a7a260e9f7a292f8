"""From the bytes of an ONNX model to a graph that the rest of narrowcast can work on."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError

from narrowcast.errors import ModelError
from narrowcast.models.graph import Graph, TensorInfo, attribute, make_node

__all__ = ["folded", "prepare", "read_onnx"]

MINIMUM_OPSET = 13  # per-channel QuantizeLinear and DequantizeLinear came with it


def read_onnx(path: Path) -> onnx.ModelProto:
    """Return the checked model of an ONNX file, with external data loaded.

    Raises:
        ModelError: The file is missing, is not ONNX, is truncated, or breaks the ONNX specification.
    """
    if not path.is_file():
        raise ModelError(f"model file {path} does not exist", allowed="an ONNX file", next_step="check the path")
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except (DecodeError, OSError, ValueError, onnx.checker.ValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as an ONNX model: {reason}",
            allowed="a complete ONNX file that onnx.checker accepts",
            next_step="export the model again, or copy the file again if it was truncated",
        ) from error
    return model


def prepare(model: onnx.ModelProto, source: str) -> Graph:
    """Return the FP32 graph with constants and normalisation layers folded, every tensor typed and every node named.

    Folding is ONNX Runtime's own "basic" level, which keeps to standard operators and changes no result beyond
    rounding; the graph is then rewritten to the operators that runtimes have integer kernels for.

    Args:
        model: A checked ONNX model.
        source: How messages name the model.

    Raises:
        ModelError: The opset is too old, ONNX Runtime cannot load the graph, or the first axis is not dynamic.
    """
    opset = max((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), default=0)
    if opset < MINIMUM_OPSET:
        raise ModelError(
            f"{source} uses ONNX opset {opset}",
            allowed=f"opset {MINIMUM_OPSET} or newer",
            next_step=f"export again with a newer opset, or convert it with onnx.version_converter to {MINIMUM_OPSET}",
        )
    graph = Graph.from_model(folded(model, source))
    _name_nodes(graph)
    _global_average(graph)
    _complete_types(graph)
    _check_floats(graph, source)
    graph.remove_unused()
    return graph


def folded(model: onnx.ModelProto, source: str) -> onnx.ModelProto:
    """Return what ONNX Runtime's basic optimisation makes of a graph: constants folded, shapes inferred.

    Args:
        model: The graph with its weights.
        source: What messages call it.

    Raises:
        ModelError: ONNX Runtime cannot load the graph.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "folded.onnx"
        options.optimized_model_filepath = str(target)
        try:
            ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types here
            raise ModelError(
                f"{source} cannot be loaded by ONNX Runtime {ort.__version__}: {_first_line(error)}",
                allowed="graphs whose operators all have CPU kernels in ONNX Runtime",
                next_step="replace the operator that the message names, or export with another opset",
            ) from error
        return onnx.load(target)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].split(" : ", 2)[-1][:300] if str(error).strip() else type(error).__name__


def _name_nodes(graph: Graph) -> None:
    given = {node.name for node in graph.nodes}
    seen: set[str] = set()
    for number, node in enumerate(graph.nodes):
        if not node.name or node.name in seen:
            name, copies = f"{node.op_type}_{number}", 1
            while name in given | seen:
                name, copies = f"{node.op_type}_{number}_{copies}", copies + 1
            node.name = name
        seen.add(node.name)


def _global_average(graph: Graph) -> None:
    """Write the mean over all spatial axes as GlobalAveragePool, which runtimes have integer kernels for."""
    for position, node in enumerate(graph.nodes):
        if node.op_type != "ReduceMean" or graph.rank(node.input[0]) != 4:
            continue
        axes = attribute(node, "axes")
        if axes is None and len(node.input) > 1 and node.input[1] in graph.constants:
            axes = graph.constants[node.input[1]].tolist()
        if axes is None or sorted(axis % 4 for axis in axes) != [2, 3]:
            continue
        output = node.output[0]
        if attribute(node, "keepdims", 1) == 1:
            graph.nodes[position] = make_node("GlobalAveragePool", [node.input[0]], [output], node.name)
            continue
        pooled = output + "_pooled"
        graph.nodes[position] = make_node("GlobalAveragePool", [node.input[0]], [pooled], node.name)
        flatten = make_node("Flatten", [pooled], [output], node.name + "_flatten", axis=1)
        graph.nodes.insert(position + 1, flatten)
        info = graph.values[output]
        graph.values[pooled] = TensorInfo(pooled, info.dtype, (*info.shape, 1, 1))


def _complete_types(graph: Graph) -> None:
    """Ask ONNX Runtime for the types that ONNX's shape inference does not know."""
    unknown = [name for node in graph.nodes for name in node.output if name and name not in graph.values]
    if not unknown:
        return
    model = graph.to_model()
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in unknown)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for value in session.get_outputs():
        if value.name in unknown and value.type.startswith("tensor("):
            name = value.type[len("tensor(") : -1]
            dtype = np.dtype({"float": "float32", "double": "float64"}.get(name, name))
            graph.values[value.name] = TensorInfo(value.name, dtype, tuple(value.shape))


def _check_floats(graph: Graph, source: str) -> None:
    if any(
        node.op_type in ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "MatMulInteger") for node in graph.nodes
    ):
        raise ModelError(
            f"{source} is quantised already",
            allowed="models in FP32",
            next_step="give the FP32 model that it was made from",
        )
    # Attention masks hold minus infinity by right; NaN, and infinity in anything larger than a mask value, mean divergence.
    floats = {name: value for name, value in graph.constants.items() if value.dtype.kind == "f"}
    weights = [
        name
        for name, value in floats.items()
        if np.isnan(value).any() or (value.ndim > 1 and value.size > 64 and np.isposinf(value).any())
    ]
    if weights:
        raise ModelError(
            f"{source} holds NaN or infinity in {weights[0]!r} and {len(weights) - 1} other weights",
            allowed="finite weights",
            next_step="train or export it again; a model that has diverged cannot be quantised",
        )
