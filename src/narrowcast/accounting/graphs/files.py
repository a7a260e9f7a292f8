"""ONNX files as counting needs them: the graph, and of its weights only what they are called and how large they are.

Weights that a file keeps outside itself are never opened, so that a path in a model cannot lead anywhere, and a model of any
size is read in the time that its graph takes. The weights inside the file are dropped too, small constants (which may be
shapes, axes or trip counts) aside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data

from narrowcast.accounting.graphs.rules import Tensor
from narrowcast.errors import ModelError

__all__ = [
    "File",
    "Stored",
    "attributes_in",
    "dtype_of",
    "element_of",
    "graphs_in",
    "known_shape",
    "read_graph",
    "stored_of",
    "tensor_of",
]

#: Constants of at most so many numbers are kept: shape inference may need them.
_KEPT = 1024
#: Masks of attention of at most so many numbers are kept, to see what they hide.
_LARGEST_MASK = 1 << 22

_DTYPES = {"FLOAT": "float32", "DOUBLE": "float64", "FLOAT8E4M3FN": "float8_e4m3fn", "FLOAT8E5M2": "float8_e5m2"}
_BITS = {"BOOL": 8, "STRING": 0, "UNDEFINED": 0}


def dtype_of(element: int) -> str:
    """Return PyTorch's name of an ONNX element type, ONNX's own in lower case where PyTorch has none."""
    name = onnx.TensorProto.DataType.Name(element)
    return _DTYPES.get(name, name.lower())


def element_of(dtype: str) -> int:
    """Return the ONNX element type that :func:`dtype_of` names so."""
    names = {ours: theirs for theirs, ours in _DTYPES.items()}
    return onnx.TensorProto.DataType.Value(names.get(dtype, dtype.upper()))


def _bits_of(element: int) -> int:
    """Return the bits that a number of an ONNX element type takes; 0 for text."""
    name = onnx.TensorProto.DataType.Name(element)
    if name in _BITS:
        return _BITS[name]
    if name.endswith("INT4") or name.startswith("FLOAT4"):
        return 4
    if name.endswith("INT2"):
        return 2
    return 8 * onnx.helper.tensor_dtype_to_np_dtype(element).itemsize


def tensor_of(element: int, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of an ONNX element type."""
    return Tensor(shape, dtype_of(element), _bits_of(element))


def known_shape(value: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    """Return the shape that a graph states for a tensor; None if an axis of it is open."""
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.HasField("shape") or not kind.elem_type:
        return None
    if not all(dim.HasField("dim_value") and dim.dim_value >= 0 for dim in kind.shape.dim):
        return None
    return tuple(dim.dim_value for dim in kind.shape.dim)


@dataclass(frozen=True)
class Stored:
    """A constant that a model stores.

    Args:
        name: Its name in the graph.
        tensor: Its shape and dtype.
        place: File, offset and length, if it lies outside the model file; two constants in one place are one.
        is_zero: Whether it is a single zero.
    """

    name: str
    tensor: Tensor
    place: tuple[str, ...] = ()
    is_zero: bool = False


@dataclass(frozen=True)
class File:
    """A graph without its weights.

    Args:
        name: As the user gave it.
        model: The model; functions are inlined, and large constants have become inputs of the graph.
        stored: Every constant, by name.
        inputs: Names of the inputs that a user gives.
    """

    name: str
    model: onnx.ModelProto
    stored: Mapping[str, Stored]
    inputs: tuple[str, ...]


def read_graph(path: Path, name: str = "") -> File:
    """Return the graph of an ONNX file.

    Args:
        path: The file.
        name: How messages name it; the path unless given.

    Raises:
        ModelError: The file is missing, is not ONNX, is truncated, or breaks the ONNX specification.
    """
    name = name or str(path)
    if not path.is_file():
        raise ModelError(f"model file {path} does not exist", next_step="check the path; it must be a file")
    try:
        model = onnx.load(path, load_external_data=False)
        if not model.graph.node and not model.graph.output:
            raise ValueError("it holds no graph")
        given = [value.name for value in model.graph.input]
        stored: dict[str, Stored] = {}
        _strip(model.graph, stored, model.graph)
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
            _strip(model.graph, stored, model.graph)
        model.ir_version = max(model.ir_version, 4)  # before, constants had to be inputs too
        _check(model)
    except (DecodeError, OSError, ValueError, RuntimeError, TypeError, onnx.checker.ValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as an ONNX model: {reason}",
            allowed="a complete ONNX file that onnx.checker accepts",
            next_step="export the model again, or copy the file again if it was truncated",
        ) from error
    return File(name, model, stored, tuple(value for value in given if value not in stored))


def _check(model: onnx.ModelProto) -> None:
    """Check a graph against the specification, but for types and shapes that it leaves out.

    Inference finds those of results, and users may give the shapes of inputs; onnx.checker asks for them in some versions
    more than in others. The types of the model's inputs must be there.
    """
    described = onnx.ModelProto()
    described.CopyFrom(model)
    _describe(described.graph, main=True)
    onnx.checker.check_model(described)


def _describe(graph: onnx.GraphProto, *, main: bool = False) -> None:
    """Give a type and a shape to what has none in a graph and in its subgraphs."""
    for value in (*graph.output, *graph.value_info, *(() if main else graph.input)):
        if value.type.WhichOneof("value") is None:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()
    for node in graph.node:
        for _, inner in graphs_in(node):
            _describe(inner)


def attributes_in(node: onnx.NodeProto) -> dict[str, Any]:
    """Return the attributes of a node that are no subgraphs, text decoded."""
    subgraphs = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    found = {
        entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute if entry.type not in subgraphs
    }
    return {key: value.decode(errors="replace") if isinstance(value, bytes) else value for key, value in found.items()}


def graphs_in(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    """Yield the subgraphs of a node, with the attributes that they are."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.name, attribute.g
        yield from ((attribute.name, graph) for graph in attribute.graphs)


def _strip(graph: onnx.GraphProto, stored: dict[str, Stored], main: onnx.GraphProto) -> None:
    """Note every constant of a graph and of its subgraphs, and make the large ones inputs of the main graph."""
    _constants_to_initializers(graph)
    inputs = {value.name for value in graph.input}
    kept: list[onnx.TensorProto] = []
    for tensor in graph.initializer:
        found = stored_of(tensor)
        outside = uses_external_data(tensor)
        if tensor.name in stored and graph is not main:  # the name means another constant in another branch
            kept.append(tensor)
            continue
        stored[tensor.name] = found
        if not outside and (found.tensor.size <= _KEPT or _may_mask(found.tensor)):
            kept.append(tensor)
        elif graph is not main or tensor.name not in inputs:
            shape = list(found.tensor.shape)
            main.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, shape))
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for node in graph.node:
        for _, inner in graphs_in(node):
            _strip(inner, stored, main)


def _may_mask(tensor: Tensor) -> bool:
    """Return whether a constant may be a mask of attention: truths, or numbers for pairs of tokens that all heads share."""
    pairs = len(tensor.shape) == 4 and tensor.shape[1] == 1
    return tensor.size <= _LARGEST_MASK and (tensor.dtype == "bool" or pairs)


def stored_of(tensor: onnx.TensorProto) -> Stored:
    """Return what is to be known of a constant."""
    shape = tuple(int(size) for size in tensor.dims)
    known = {entry.key: entry.value for entry in tensor.external_data} if uses_external_data(tensor) else {}
    place = tuple(known.get(key, "") for key in ("location", "offset", "length")) if known else ()
    found = tensor_of(tensor.data_type, shape)
    is_zero = found.size == 1 and not place and not numpy_helper.to_array(tensor).any()
    return Stored(tensor.name, found, place, bool(is_zero))


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        tensor = _constant(node) if node.op_type == "Constant" and node.domain in ("", "ai.onnx") else None
        if tensor is None:
            nodes.append(node)
        else:
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
    if len(nodes) < len(graph.node):
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(kept)


_NUMBERS = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    (attribute,) = node.attribute[:1] or (None,)
    if attribute is None:
        return None
    if attribute.name == "value":
        return attribute.t
    if attribute.name not in _NUMBERS:
        return None
    value: Any = onnx.helper.get_attribute_value(attribute)
    return numpy_helper.from_array(np.asarray(value, _NUMBERS[attribute.name]))
