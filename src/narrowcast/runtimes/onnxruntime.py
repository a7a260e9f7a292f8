"""ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime as ort

from narrowcast.errors import RuntimeFailedError
from narrowcast.models.graph import TensorInfo
from narrowcast.recipes.target import FusionRules
from narrowcast.runtimes.base import OperatorTime, Runtime, Session, Tensors, check_batch

__all__ = ["OnnxRuntime"]


class _Session(Session):
    def __init__(self, session: ort.InferenceSession, path: Path) -> None:
        self._session = session
        self._path = path
        self.inputs = tuple(_info(value) for value in session.get_inputs())
        self.outputs = tuple(value.name for value in session.get_outputs())

    def run(self, batch: Tensors) -> Tensors:
        try:
            values = cast(list[Any], self._session.run(list(self.outputs), batch))
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types here
            check_batch(self.inputs, batch, self._path.name)
            raise RuntimeFailedError(f"ONNX Runtime failed on {self._path.name}: {_reason(error)}") from error
        return dict(zip(self.outputs, values, strict=True))

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

    def load(self, path: Path, *, threads: int = 1, batch: int | None = None) -> Session:
        # A fixed batch is no faster here, and it lets ONNX Runtime 1.31 rewrite matrix products to Gemm before it looks
        # for integer kernels, which it then misses: the batch axis stays dynamic.
        return _Session(self._open(path, _options(threads)), path)

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


def _info(value: ort.NodeArg) -> TensorInfo:
    name = value.type[len("tensor(") : -1]
    return TensorInfo(
        value.name, np.dtype({"float": "float32", "double": "float64"}.get(name, name)), tuple(value.shape)
    )


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
