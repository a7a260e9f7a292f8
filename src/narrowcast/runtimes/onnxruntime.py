"""ONNX Runtime on the CPU."""

from __future__ import annotations

import ctypes
import json
import math
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto

from narrowcast.errors import DataError, RuntimeFailedError
from narrowcast.models.graph import TensorInfo
from narrowcast.recipes.target import FusionRules
from narrowcast.runtimes.base import OperatorTime, Runtime, Session, Tensors, check_batch

__all__ = ["OnnxRuntime"]


#: What ONNX Runtime calls the element types that NumPy calls otherwise.
_DTYPES: dict[str, np.dtype[Any]] = {
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "string": np.dtype(np.object_),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_PLAIN = frozenset(
    {"bool", "float16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"},
)
_BFLOAT16 = _DTYPES["bfloat16"]


class _Session(Session):
    def __init__(self, session: ort.InferenceSession, path: Path) -> None:
        self._session = session
        self._path = path
        self.inputs = tuple(_info(value, path) for value in session.get_inputs())
        outputs = tuple(_info(value, path) for value in session.get_outputs())
        self.outputs = tuple(info.name for info in outputs)
        self._texts = tuple(info.name for info in self.inputs if info.dtype == np.object_)
        self._has_bfloat16 = any(info.dtype == _BFLOAT16 for info in (*self.inputs, *outputs))

    def run(self, batch: Tensors) -> Tensors:
        if self._texts:
            batch = batch | {name: _decoded(name, batch[name]) for name in self._texts if name in batch}
        try:
            if self._has_bfloat16:
                values = self._run_values(batch)
            else:
                values = cast(list[Any], self._session.run(list(self.outputs), batch))
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types here
            check_batch(self.inputs, batch, self._path.name)
            raise RuntimeFailedError(f"ONNX Runtime failed on {self._path.name}: {_reason(error)}") from error
        return dict(zip(self.outputs, values, strict=True))

    def _run_values(self, batch: Tensors) -> list[Any]:
        """Run values of ONNX Runtime's own, because its arrays know no BF16."""
        given = {name: _value(array) for name, array in batch.items()}
        return [_array(value) for value in self._session.run_with_ort_values(list(self.outputs), given)]

    def close(self) -> None:
        del self._session


class OnnxRuntime(Runtime):
    """ONNX Runtime with its CPU execution provider and all graph optimisations."""

    name = "onnxruntime"
    extra = ""
    rules = FusionRules()
    conversions = frozenset({"QuantizeLinear"})

    def version(self) -> str:
        return ort.__version__

    def load(self, path: Path, *, threads: int = 1, batch: int | None = None, shares: bool = False) -> Session:
        # A fixed batch is no faster here, and it lets ONNX Runtime 1.31 rewrite matrix products to Gemm before it looks
        # for integer kernels, which it then misses: the batch axis stays dynamic.
        options = _options(threads)
        if shares and threads > 1:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return _Session(self._open(path, options), path)

    def _open(self, path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
        try:
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types here
            raise RuntimeFailedError(
                f"ONNX Runtime {ort.__version__} cannot load {path}: {_reason(error)}",
                next_step="try the other runtime, or another recipe",
            ) from error

    def profile(self, path: Path, batch: Tensors, *, threads: int = 1, runs: int = 20) -> list[OperatorTime]:
        with tempfile.TemporaryDirectory() as folder:
            options = _options(threads)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = self._open(path, options)
            for _ in range(runs + 3):
                session.run(None, batch)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        times: dict[tuple[str, str], list[float]] = defaultdict(list)
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                name = event["name"].removesuffix("_kernel_time")
                times[name, event["args"]["op_name"]].append(event["dur"] * 1e-6)
        found = [OperatorTime(name, kind, float(np.mean(values[3:]))) for (name, kind), values in times.items()]
        return sorted(found, key=lambda item: -item.seconds)


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    # It turns the FP32 weights of an operator that stands between integers into INT8 with one scale for the whole tensor,
    # unasked: an operator that was put back to FP32 for its accuracy would come out worse than before.
    options.add_session_config_entry("optimization.disable_specified_optimizers", "WeightBiasQuantization")
    return options


def _info(value: ort.NodeArg, path: Path) -> TensorInfo:
    name = value.type.removeprefix("tensor(").removesuffix(")")
    if name not in _DTYPES and name not in _PLAIN:
        raise RuntimeFailedError(
            f"{path}: {value.name!r} is {value.type}", allowed=f"tensors of {', '.join(sorted({*_DTYPES, *_PLAIN}))}"
        )
    return TensorInfo(value.name, _DTYPES.get(name) or np.dtype(name), tuple(value.shape))


def _decoded(name: str, texts: NDArray[Any]) -> NDArray[Any]:
    """Return texts for ONNX Runtime, whose strings are text; bytes are taken as UTF-8.

    Raises:
        DataError: They are not.
    """
    try:
        flat = [text.decode() if isinstance(text, bytes) else str(text) for text in texts.flat]
    except UnicodeDecodeError as error:
        raise DataError(f"input {name!r}: an element is no UTF-8 text", allowed="UTF-8") from error
    decoded = np.empty(len(flat), np.object_)
    decoded[:] = flat
    return decoded.reshape(texts.shape)


def _value(array: NDArray[Any]) -> ort.OrtValue:
    if array.dtype != _BFLOAT16:
        return ort.OrtValue.ortvalue_from_numpy(array)
    bits = np.ascontiguousarray(array).view(np.uint16)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)


def _array(value: ort.OrtValue) -> NDArray[Any]:
    """Return a copy of a value as an array."""
    if value.element_type() != TensorProto.BFLOAT16:
        return value.numpy()
    shape = value.shape()
    bits = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
    return np.array(bits, np.uint16).view(_BFLOAT16).reshape(shape)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
