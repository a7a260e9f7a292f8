"""The weights of a model as they are stored, one after the other and by rows, from any reference or safetensors file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from narrowcast.errors import ModelError
from narrowcast.formats import decode
from narrowcast.formats.arrays import CODED, opened
from narrowcast.formats.fast import exact_in_float32
from narrowcast.formats.table import ELEMENTS
from narrowcast.models import checkpoint
from narrowcast.models.loaders import artifact_file, load_module
from narrowcast.models.reference import ModelRef

__all__ = ["Weight", "Weights", "open_weights"]

_NAMES = {"float64": "fp64", "float32": "fp32", "float16": "fp16", **CODED}
_SCALES = "scales of other tensors"
_PACKED = "packed codes, whose scales are stored apart"


@dataclass(frozen=True)
class Weight:
    """A tensor that a model stores, seen as a matrix with one row per output channel.

    Attributes:
        name: Its name in the model.
        shape: Its shape in the model.
        dtype: Its number format: ``fp32``, ``bf16``, ``e4m3fn``, ``int64`` ...
        nbytes: What it takes where it is stored.
        matrix: Rows (output channels; 1 for a vector) and their length.
        rows: From the first row and the one after the last to their numbers: shape [rows, length], float32 (float64 for an
            FP64 tensor).
        unreadable: Why it has no numbers to compare, if so.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    matrix: tuple[int, int]
    rows: Callable[[int, int], np.ndarray]
    unreadable: str = ""

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_vector(self) -> bool:
        """Whether at most one axis is longer than 1: a bias, the scale of a normalisation, a class token."""
        return sum(length > 1 for length in self.shape) <= 1


@dataclass(frozen=True)
class Weights:
    """What a model stores.

    Attributes:
        source: The reference or path that was given.
        weights: Every tensor, in the model's order; one that is used in several places is there once.
        random: Whether nobody trained them.
    """

    source: str
    weights: tuple[Weight, ...]
    random: bool = False


def open_weights(source: str, *, seed: int = 0) -> Weights:
    """Return the weights that a model reference, a safetensors file or a folder of them holds; numbers are read later.

    Args:
        source: A path that ends in ``.safetensors``, a folder of such files, or any model reference.
        seed: Seed of the random weights, for the schemes that have no trained ones.

    Raises:
        ModelError: The model cannot be found or read, or the file is damaged.
        RuntimeMissingError: A package that the scheme needs is not installed.
    """
    path = Path(source)
    if source.endswith(".safetensors") or (path.is_dir() and _is_checkpoint(path)):
        tensors = [tensor for file in checkpoint.shards(path) for tensor in checkpoint.read_header(file)]
        return Weights(source, tuple(_stored(tensor) for tensor in checkpoint.unique(tensors).values()))
    try:
        ref = ModelRef.parse(source)
    except ModelError as error:
        raise ModelError(
            error.what,
            allowed=f"a path that ends in .safetensors, a folder of such files, {error.allowed}",
            next_step=error.next_step,
        ) from None
    made = load_module(ref, seed=seed)
    if made is not None:
        return Weights(source, tuple(_of_module(made.module)), made.random_weights)
    return Weights(source, tuple(_of_onnx(artifact_file(Path(ref.id)) if ref.scheme == "artifact" else Path(ref.id))))


def _is_checkpoint(folder: Path) -> bool:
    return not (folder / "model.onnx").is_file() and any(folder.glob("*.safetensors"))


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def _numbers(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return stored elements as float32 numbers (FP64 as float64), in their shape."""
    match dtype:
        case "fp64":
            return np.ascontiguousarray(array, np.float64)
        case "fp32" | "fp16":
            return np.ascontiguousarray(array, np.float32)
        case _:
            return decode(array, dtype, dtype="float32")


def _why_unreadable(dtype: str, shape: tuple[int, ...], packed: bool) -> str:
    if dtype == "e8m0":
        return _SCALES
    if packed:
        return _PACKED
    if dtype not in ELEMENTS or dtype[:3] in ("int", "uin"):
        return f"{dtype}, no floating-point numbers"
    assert dtype in ("fp64", "fp32") or exact_in_float32(ELEMENTS[dtype])
    return "empty" if not math.prod(shape) else ""


# safetensors ----------------------------------------------------------------------------------------------------------


def _stored(tensor: checkpoint.StoredTensor) -> Weight:
    matrix = _matrix(tensor.shape)

    def rows(start: int, stop: int) -> np.ndarray:
        found = tensor.read(start * matrix[1], (stop - start) * matrix[1])
        return _numbers(found, tensor.dtype).reshape(stop - start, matrix[1])

    why = _why_unreadable(tensor.dtype, tensor.shape, tensor.bits < 8)
    return Weight(tensor.name, tensor.shape, tensor.dtype, tensor.nbytes, matrix, rows, why)


# Arrays ---------------------------------------------------------------------------------------------------------------


def _of_array(name: str, array: np.ndarray, dtype: str, nbytes: int, channels: int = 0, packed: bool = False) -> Weight:
    """Return an array in memory (or mapped into it) as a weight whose output channels are counted by one axis."""
    shape = tuple(array.shape)
    ordered = np.moveaxis(array, channels, 0) if channels else array
    matrix = _matrix(ordered.shape)

    def rows(start: int, stop: int) -> np.ndarray:
        part = ordered[start:stop] if ordered.ndim > 1 else ordered
        return _numbers(np.ascontiguousarray(part), dtype).reshape(stop - start, matrix[1])

    return Weight(name, shape, dtype, nbytes, matrix, rows, _why_unreadable(dtype, shape, packed))


def _of_module(module: Any) -> Iterable[Weight]:
    """Yield the parameters and persistent buffers of a PyTorch module, those that are tied once."""
    turned = {
        f"{name}.weight" if name else "weight"
        for name, part in module.named_modules()
        if "ConvTranspose" in type(part).__name__ and part.groups == 1
    }
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        tensor = tensor.detach().cpu()
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _NAMES:
            shape = tuple(tensor.shape)
            yield Weight(
                name, shape, dtype, tensor.nbytes, _matrix(shape), _no_rows, f"{dtype}, no floating-point numbers"
            )
            continue
        yield _of_array(name, opened(tensor).array, _NAMES[dtype], tensor.nbytes, channels=int(name in turned))


def _no_rows(start: int, stop: int) -> np.ndarray:
    raise AssertionError(f"rows {start} to {stop} of a tensor without numbers")


# ONNX -----------------------------------------------------------------------------------------------------------------


def _of_onnx(path: Path) -> Iterable[Weight]:
    """Yield the initialisers of an ONNX file and the tensors of its Constant nodes; external data stay in their file."""
    model = _read_without_data(path)
    channels = _channel_axes(model.graph)
    tensors = list(model.graph.initializer)
    for node in model.graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    attribute.t.name = node.output[0]
                    tensors.append(attribute.t)
    for tensor in tensors:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        if kind == "STRING":
            shape = tuple(tensor.dims)
            yield Weight(tensor.name, shape, "string", 0, _matrix(shape), _no_rows, "string, no floating-point numbers")
            continue
        array = _onnx_array(tensor, path)
        packed = (kind.endswith("4") and "INT" in kind) or kind.startswith(("FLOAT4", "FLOAT6", "INT2", "UINT2"))
        bits = 2 if kind.endswith("INT2") else 4 if packed else 8 * array.itemsize
        name = _NAMES.get(array.dtype.name, array.dtype.name)
        source = opened(array).array if array.dtype.name in CODED else array
        axis = channels.get(tensor.name, 0) if array.ndim > 1 else 0
        yield _of_array(tensor.name, source, name, -(-array.size * bits // 8), axis, packed)


def _read_without_data(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise ModelError(f"model file {path} does not exist", next_step="check the path; it must be a file")
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise ModelError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as an ONNX model: {error}",
            allowed="a complete ONNX file",
            next_step="export the model again, or copy the file again if it was truncated",
        ) from None
    if not model.graph.node:
        raise ModelError(f"{path} holds no ONNX graph", allowed="a complete ONNX file", next_step="export it again")
    return model


def _channel_axes(graph: onnx.GraphProto) -> dict[str, int]:
    """Return which axis of a weight counts output channels, where that is not the first."""
    found: dict[str, int] = {}
    for node in graph.node:
        if len(node.input) < 2:
            continue
        options = {item.name: item.i for item in node.attribute}
        turned = (
            node.op_type == "MatMul"
            or (node.op_type == "Gemm" and not options.get("transB", 0))
            or (node.op_type == "ConvTranspose" and options.get("group", 1) == 1)
        )
        if turned:
            found[node.input[1]] = -1 if node.op_type == "MatMul" else 1
    return found


def _onnx_array(tensor: onnx.TensorProto, path: Path) -> np.ndarray:
    try:
        if not uses_external_data(tensor):
            return onnx.numpy_helper.to_array(tensor)
        info = ExternalDataInfo(tensor)
        file = (path.parent / info.location).resolve()
        if path.parent.resolve() not in file.parents:
            raise ValueError(f"its data lie outside the model's folder, in {info.location}")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if not math.prod(tensor.dims):
            return np.empty(tuple(tensor.dims), dtype)
        return np.memmap(file, dtype, "r", int(info.offset or 0), tuple(tensor.dims))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"{path}: the data of tensor {tensor.name!r} cannot be read: {error}",
            next_step="keep the model's data file beside it, whole",
        ) from None
