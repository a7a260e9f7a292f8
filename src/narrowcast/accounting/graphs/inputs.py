"""The inputs of an ONNX graph: what the user says of their shapes, and what the graph leaves open."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import onnx

from narrowcast.accounting.graphs.files import File, dtype_of, known_shape, tensor_of
from narrowcast.accounting.graphs.rules import Tensor
from narrowcast.errors import ModelError, choices

__all__ = ["Given", "bind", "set_shape"]


class Given(NamedTuple):
    """An input that the user describes.

    Args:
        name: Its name; empty for the next one in order.
        shape: Its sizes.
        dtype: Its dtype, by PyTorch's name; empty for the model's own.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = ""


_TOKENS = 128  # unless the user says how many
_INTEGERS = frozenset({"int32", "int64"})


def bind(file: File, given: Sequence[Given] = (), *, batch: int = 1, tokens: int | None = None) -> dict[str, Tensor]:
    """Give every input of a graph a shape of numbers, in place, and return them.

    A dynamic axis takes its size from the user's shape, else from an axis of the same name, else the first axis from
    ``batch`` and the second axis of an integer input from ``tokens``.

    Raises:
        ModelError: A shape does not fit the graph, or an axis stays open.
    """
    inputs = {value.name: value for value in file.model.graph.input if value.name in file.inputs}
    shapes = _assigned(file, inputs, given)
    symbols: dict[str, int] = {}
    for name, value in inputs.items():
        for place, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value") and dim.dim_param and name in shapes:
                known = symbols.setdefault(dim.dim_param, shapes[name].shape[place])
                if known != shapes[name].shape[place]:
                    raise ModelError(
                        f"{file.name}: axis {dim.dim_param!r} of input {name!r} is {shapes[name].shape[place]}, and another "
                        f"input says {known}",
                        next_step="give the shapes of both inputs so that they agree",
                    )
    sizes = {0: batch, 1: tokens or _TOKENS}
    for value in inputs.values():
        for place, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param and not dim.HasField("dim_value") and _by_default(value, place):
                symbols.setdefault(dim.dim_param, sizes[place])
    bound = {
        name: shapes[name].shape if name in shapes else _default(file, value, symbols, sizes)
        for name, value in inputs.items()
    }
    _check_asked(file, inputs, bound, set(shapes), batch, tokens)
    for name, value in inputs.items():
        set_shape(value, bound[name])
    _forget_symbols(file.model.graph)
    return {name: tensor_of(value.type.tensor_type.elem_type, bound[name]) for name, value in inputs.items()}


def _assigned(file: File, inputs: Mapping[str, onnx.ValueInfoProto], given: Sequence[Given]) -> dict[str, Given]:
    """Return which input each of the user's shapes is for."""
    named = {entry.name: entry for entry in given if entry.name}
    for name in named:
        if name not in inputs:
            raise ModelError(f"{file.name} has no input {name!r}", allowed=choices(name, inputs))
    open_ = [name for name in inputs if name not in named]
    unnamed = [entry for entry in given if not entry.name]
    if len(unnamed) > len(open_):
        raise ModelError(
            f"{len(given)} shapes for {file.name}, which has {len(inputs)} input(s)",
            allowed=", ".join(inputs) or "none: the graph has no inputs",
        )
    shapes = {**named, **dict(zip(open_, unnamed, strict=False))}
    for name, entry in shapes.items():
        _check_fits(file, inputs[name], entry)
    return shapes


def _check_fits(file: File, value: onnx.ValueInfoProto, entry: Given) -> None:
    kind = value.type.tensor_type
    dims = list(kind.shape.dim)
    wanted = "x".join(_text(dim) for dim in dims)
    fits = len(dims) == len(entry.shape) and all(
        not dim.HasField("dim_value") or dim.dim_value == size for dim, size in zip(dims, entry.shape, strict=False)
    )
    if kind.HasField("shape") and not fits:
        raise ModelError(
            f"{file.name}: input {value.name!r} of shape {'x'.join(map(str, entry.shape))} does not fit the graph",
            allowed=f"{wanted or 'a scalar'}; axes with a name or ? may have any size",
            next_step="give a shape that fits, or export the model with dynamic axes",
        )
    if entry.dtype and kind.elem_type and entry.dtype != dtype_of(kind.elem_type):
        raise ModelError(f"{file.name}: input {value.name!r} cannot be {entry.dtype}", allowed=dtype_of(kind.elem_type))


def _by_default(value: onnx.ValueInfoProto, place: int) -> bool:
    return place == 0 or (place == 1 and dtype_of(value.type.tensor_type.elem_type) in _INTEGERS)


def _default(
    file: File, value: onnx.ValueInfoProto, symbols: Mapping[str, int], sizes: Mapping[int, int]
) -> tuple[int, ...]:
    kind = value.type.tensor_type
    shape: list[int] = []
    for place, dim in enumerate(kind.shape.dim):
        if dim.HasField("dim_value"):
            shape.append(dim.dim_value)
        elif dim.dim_param in symbols:
            shape.append(symbols[dim.dim_param])
        elif _by_default(value, place):
            shape.append(sizes[place])
        else:
            break
    if value.type.HasField("tensor_type") and kind.HasField("shape") and len(shape) == len(kind.shape.dim):
        return tuple(shape)
    wanted = "x".join(_text(dim) for dim in kind.shape.dim) or "unknown"
    raise ModelError(
        f"ONNX without shapes: {file.name} leaves input {value.name!r} open: {wanted}",
        allowed="inputs whose axes are numbers, a batch, or the tokens of an integer input",
        next_step=f"give its shape: --input {value.name}=1x3x224x224, with the sizes that you mean",
    )


def _check_asked(
    file: File,
    inputs: Mapping[str, onnx.ValueInfoProto],
    bound: Mapping[str, tuple[int, ...]],
    given: set[str],
    batch: int,
    tokens: int | None,
) -> None:
    """Raise if the user asked for a batch or tokens that no input takes."""
    free = {name: shape for name, shape in bound.items() if name not in given}
    firsts = {shape[0] for shape in free.values() if shape}
    seconds = {shape[1] for name, shape in free.items() if len(shape) > 1 and _by_default(inputs[name], 1)}
    for what, asked, sizes in (("batch", batch if batch != 1 else None, firsts), ("tokens", tokens, seconds)):
        if asked is not None and free and asked not in sizes:
            raise ModelError(
                f"{file.name}: no input has {asked} {what} for an axis that is dynamic",
                allowed=", ".join(f"{name}: {'x'.join(map(str, shape))}" for name, shape in bound.items()),
                next_step="export the model with dynamic axes, or count the shapes that it has",
            )


def _text(dim: Any) -> str:
    return str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or "?"


def set_shape(value: onnx.ValueInfoProto, shape: Iterable[int]) -> None:
    """State the shape of a tensor, in place."""
    kind = value.type.tensor_type
    kind.ClearField("shape")
    kind.shape.SetInParent()
    for size in shape:
        kind.shape.dim.add().dim_value = size


def _forget_symbols(graph: onnx.GraphProto) -> None:
    """Drop the shapes that a graph states with symbols: they are inferred anew."""
    known = [value for value in graph.value_info if known_shape(value) is not None]
    del graph.value_info[:]
    graph.value_info.extend(known)
    for value in graph.output:
        if value.type.HasField("tensor_type") and known_shape(value) is None:
            value.type.tensor_type.ClearField("shape")
