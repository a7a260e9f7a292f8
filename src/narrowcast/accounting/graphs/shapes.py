"""The shape of every tensor of an ONNX graph, from the shapes of its inputs.

Several engines, the next one only where the ones before leave a shape open: ONNX's own inference, ONNX Runtime's symbolic
inference (it knows the operators of ``com.microsoft``; needs sympy), rules of our own, and ONNX Runtime itself, which
folds what shapes are computed from.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference

from narrowcast.accounting.graphs.files import attributes_in, element_of, graphs_in, known_shape, tensor_of
from narrowcast.accounting.graphs.rules import Tensor, entry_of
from narrowcast.errors import ModelError
from narrowcast.models.prepare import folded

__all__ = ["constants_of", "node_name", "shapes_of"]

#: What is not constant though all it reads is: random numbers, and weights that stay in few bits until they are used.
_NEVER_CONSTANT = frozenset(
    "RandomNormal RandomNormalLike RandomUniform RandomUniformLike Bernoulli Multinomial DequantizeLinear".split()  # noqa: SIM905
)
#: What is known once all shapes are.
_OF_SHAPES = frozenset({"Shape", "Size", "EyeLike"})
#: What takes no more than the dtype of its second input.
_OF_FIRST = frozenset({"CastLike"})


def constants_of(graph: onnx.GraphProto, known: Iterable[str]) -> set[str]:
    """Return the tensors that are the same in every run: constants, shapes, and what is computed from these alone.

    Args:
        graph: Its nodes in order.
        known: Names of the tensors from outside the graph that are constant.
    """
    constant = {*known, *(tensor.name for tensor in graph.initializer)}
    for node in graph.node:
        read = [name for name in node.input[: 1 if node.op_type in _OF_FIRST else None] if name]
        folds = node.op_type in _OF_SHAPES or all(name in constant for name in read)
        if folds and node.op_type not in _NEVER_CONSTANT and not any(graphs_in(node)):
            constant.update(name for name in node.output if name)
    return constant


def shapes_of(model: onnx.ModelProto, constant: set[str], name: str) -> dict[str, Tensor]:
    """Return the tensors of a graph's main level by name, with shapes of numbers.

    Args:
        model: A graph whose inputs have shapes of numbers, without weights.
        constant: As :func:`constants_of` gives it: what may stay without a shape.
        name: How messages name the model.

    Raises:
        ModelError: Shapes do not fit at a node, or stay open; the node and its tensor are named.
    """
    needed = list(_needed(model.graph, constant))
    found: dict[str, Tensor] = {}
    original = model
    for engine in _ENGINES:
        model = engine(model)
        found |= _tensors(model.graph)
        others = _without_shape(model.graph)
        if all(tensor in found or tensor in others for tensor in needed):
            return found
    raise _open_error(original, next(tensor for tensor in needed if tensor not in found), name)


def _needed(graph: onnx.GraphProto, constant: set[str]) -> Iterator[str]:
    """Yield the tensors that counting reads the shapes of."""
    for node in graph.node:
        if entry_of(node.domain, node.op_type) or any(graphs_in(node)):
            yield from (tensor for tensor in (*node.input, *node.output) if tensor and tensor not in constant)


def _tensors(graph: onnx.GraphProto) -> dict[str, Tensor]:
    found = {tensor.name: tensor_of(tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        shape = known_shape(value)
        if shape is not None:
            found[value.name] = tensor_of(value.type.tensor_type.elem_type, shape)
    return found


def _without_shape(graph: onnx.GraphProto) -> set[str]:
    """Return sequences, maps and optional values: they are passed on, and have no shape."""
    return {value.name for value in (*graph.value_info, *graph.output) if _is_other(value.type)}


def _is_other(kind: onnx.TypeProto) -> bool:
    return kind.WhichOneof("value") not in (None, "tensor_type")


def _by_onnx(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError):
        return model


def _symbolic(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        tool: Any = importlib.import_module("onnxruntime.tools.symbolic_shape_infer")
    except ImportError:  # sympy, which the tool needs, comes with PyTorch and not with ONNX Runtime
        return model
    logging.getLogger(tool.__name__).setLevel(logging.CRITICAL)
    engine = tool.SymbolicShapeInference(int_max=2**31 - 1, auto_merge=True, guess_output_rank=False, verbose=0)
    try:
        # As its infer_shapes does, which writes a file into the current folder if a shape stays open.
        engine._preprocess(model)
        while engine.run_:
            engine._infer_impl()
        engine._update_output_from_vi()
    except Exception:  # it asserts and raises whatever its handlers meet; the next engine has its say
        return model
    return _by_onnx(engine.out_mp_)


def _by_runtime(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return _by_onnx(folded(model, "the graph"))
    except ModelError:  # it has no kernels for it, and another engine may know
        return model


def _by_hand(model: onnx.ModelProto) -> onnx.ModelProto:
    """State shapes that no other engine knows: what a Loop hands from pass to pass, and operators on codes."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    found = _tensors(made.graph)
    for node in model.graph.node:
        if node.op_type not in _BY_HAND or node.output[0] in found:
            continue
        if not all(name in found for name in node.input if name):
            made = _by_onnx(made)  # what was stated so far may say it
            found = _tensors(made.graph)
        for name, tensor in _BY_HAND[node.op_type](node, found):
            if name and name not in found:
                found[name] = tensor
                _replace(made.graph, onnx.helper.make_tensor_value_info(name, element_of(tensor.dtype), tensor.shape))
    return _by_onnx(made)


def _loop(node: onnx.NodeProto, found: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield what a Loop hands on, with the shapes that it starts with."""
    for start, result in zip(node.input[2:], node.output, strict=False):
        if start in found:
            yield result, found[start]


def _quantised_product(node: onnx.NodeProto, found: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the result of a QGemm: codes with the zero point's dtype, or floating numbers without one."""
    a, b = (found.get(node.input[place]) for place in (0, 3))
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
        return
    turned = attributes_in(node)
    shape = a.shape[1 if turned.get("transA") else 0], b.shape[0 if turned.get("transB") else 1]
    zero = found.get(node.input[8]) if len(node.input) > 8 else None
    yield node.output[0], replace(zero, shape=shape) if zero else Tensor(shape)


def _as_first(node: onnx.NodeProto, found: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the result of an operator that keeps the shape of its input."""
    if node.input[0] in found:
        yield node.output[0], found[node.input[0]]


def _as_both(node: onnx.NodeProto, found: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the result of a quantised operator of two tensors that broadcast."""
    a, b = (found.get(node.input[place]) for place in (0, 3))
    if a is not None and b is not None:
        yield node.output[0], replace(a, shape=np.broadcast_shapes(a.shape, b.shape))


_BY_HAND = {
    "Loop": _loop,
    "QGemm": _quantised_product,
    **dict.fromkeys(("QLinearSoftmax", "QLinearSigmoid", "QLinearLeakyRelu"), _as_first),
    **dict.fromkeys(("QLinearAdd", "QLinearMul"), _as_both),
}


def _replace(graph: onnx.GraphProto, value: onnx.ValueInfoProto) -> None:
    for stated in (graph.value_info, graph.output):
        for entry in stated:
            if entry.name == value.name:
                entry.CopyFrom(value)
                return
    graph.value_info.append(value)


_ENGINES: tuple[Callable[[onnx.ModelProto], onnx.ModelProto], ...] = (
    _by_onnx,
    _symbolic,
    _by_hand,
    _by_runtime,
)


def _open_error(model: onnx.ModelProto, tensor: str, name: str) -> ModelError:
    """Return why a tensor has no shape: inputs that do not fit, or a shape that depends on numbers or is unknown."""
    node = next((node for node in model.graph.node if tensor in node.output), None)
    try:
        onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError) as error:
        lines = [line for line in str(error).splitlines() if "ShapeInferenceError" in line or "InferenceError" in line]
        reason = (lines or [str(error)])[-1].strip()
        return ModelError(
            f"{name}: the inputs do not fit at {node_name(node) if node else repr(tensor)}: {reason}",
            next_step="give inputs of the right shapes: --input NAME=1x3x224x224",
        )
    made = f"which {node_name(node)} makes" if node else "which no node makes"
    return ModelError(
        f"ONNX without shapes: {name} leaves the shape of tensor {tensor!r} open, {made}",
        allowed="graphs whose shapes follow from the shapes of their inputs",
        next_step="give the inputs' shapes (--input NAME=1x3x224x224), export the model with shapes, or cut it before "
        "operators whose results have as many numbers as they find (NonZero, NonMaxSuppression, Unique)",
    )


def node_name(node: onnx.NodeProto) -> str:
    """Return how messages name a node."""
    return f"node {node.name or node.output[0]!r} ({node.op_type})" if node.output else f"node {node.op_type}"
