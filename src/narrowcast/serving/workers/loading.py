"""Models from artifacts and from Python functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from narrowcast.artifacts import load_artifact
from narrowcast.errors import ArtifactError
from narrowcast.runtimes import get_runtime
from narrowcast.serving.datatypes import Datatype, datatype_of
from narrowcast.serving.signature import Signature, Tensors, TensorSpec
from narrowcast.serving.workers.base import LoadedModel

__all__ = ["FunctionModel", "open_artifact"]


class FunctionModel(LoadedModel):
    """A Python function from inputs to outputs by name, for libraries and tests.

    Args:
        signature: What it takes and gives.
        function: Called with one batch at a time.
    """

    def __init__(self, signature: Signature, function: Callable[[Tensors], Tensors]) -> None:
        self.signature = signature
        self._function = function

    def run(self, inputs: Tensors) -> Tensors:
        return self._function(inputs)


class _ArtifactModel(LoadedModel):
    def __init__(self, folder: Path) -> None:
        artifact = load_artifact(folder)
        target = artifact.manifest.target
        self._session = get_runtime(target.runtime).load(artifact.graph, threads=target.threads, shares=True)
        inputs = tuple(
            TensorSpec(info.name, _datatype(folder, info.name, info.dtype), _axes(info.shape))
            for info in self._session.inputs
        )
        outputs = _output_specs(artifact.graph)
        batched = all(info.dynamic_batch for info in self._session.inputs) and all(
            spec.shape[:1] == (-1,) for spec in outputs
        )
        self.signature = Signature(inputs, outputs, batched)

    def run(self, inputs: Tensors) -> Tensors:
        return self._session.run(inputs)

    def close(self) -> None:
        self._session.close()


def open_artifact(folder: Path) -> LoadedModel:
    """Return the model of an artifact folder on the runtime that it was made for, every hash checked first.

    Raises:
        ArtifactError: The folder is no artifact, or damaged.
        RuntimeMissingError: Its runtime is not installed.
        RuntimeFailedError: Its runtime refuses it.
    """
    return _ArtifactModel(folder)


def _axes(shape: tuple[int | str | None, ...]) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else -1 for size in shape)


def _datatype(folder: Path, name: str, dtype: np.dtype[np.generic]) -> Datatype:
    found = datatype_of(dtype)
    if found is None:
        raise ArtifactError(f"artifact {folder}: the protocol has no name for {dtype}, the type of {name!r}")
    return found


def _output_specs(path: Path) -> tuple[TensorSpec, ...]:
    """Return the outputs that a graph declares; sessions tell their names alone."""
    graph = onnx.load(path, load_external_data=False).graph
    specs: list[TensorSpec] = []
    for value in graph.output:
        tensor = value.type.tensor_type
        axes = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        specs.append(TensorSpec(value.name, _datatype(path.parent, value.name, dtype), axes))
    return tuple(specs)
