"""OpenVINO on the CPU."""

from __future__ import annotations

import functools
import importlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from narrowcast.errors import RuntimeFailedError, RuntimeMissingError
from narrowcast.models.graph import TensorInfo
from narrowcast.recipes.target import FusionRules
from narrowcast.runtimes.base import OperatorTime, Runtime, Session, Tensors, check_batch

__all__ = ["OpenVino"]


class _Session(Session):
    def __init__(self, compiled: Any, path: Path) -> None:
        self._request = compiled.create_infer_request()
        self._path = path
        self.inputs = tuple(_info(port) for port in compiled.inputs)
        self.outputs = tuple(port.get_any_name() for port in compiled.outputs)

    def run(self, batch: Tensors) -> Tensors:
        # OpenVINO casts and reshapes silently what does not fit, so the check comes first.
        check_batch(self.inputs, batch, self._path.name)
        try:
            found = self._request.infer(batch, share_inputs=True)
        except Exception as error:  # OpenVINO raises RuntimeError for everything
            raise RuntimeFailedError(f"OpenVINO failed on {self._path.name}: {_reason(error)}") from error
        return {name: found[number] for number, name in enumerate(self.outputs)}


class OpenVino(Runtime):
    """OpenVINO with its CPU plugin, tuned for the latency of one stream, computing FP32 where the graph says FP32."""

    name = "openvino"
    extra = "openvino"
    rules = FusionRules()
    conversions = frozenset({"FakeQuantize"})

    def version(self) -> str:
        return str(_module().__version__).partition("-")[0]

    def load(self, path: Path, *, threads: int = 1, batch: int | None = None, shares: bool = False) -> Session:
        return _Session(self._compile(path, threads, batch, profile=False), path)

    def _compile(self, path: Path, threads: int, batch: int | None, *, profile: bool) -> Any:
        version = self.version()
        try:
            core = _core()
            model = core.read_model(path)
            if batch is not None:
                shapes = {port: port.get_partial_shape() for port in model.inputs}
                for shape in shapes.values():
                    if shape.rank.is_static and len(shape) and shape[0].is_dynamic:
                        shape[0] = batch
                model.reshape(shapes)
            settings = {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": threads,
                "INFERENCE_PRECISION_HINT": "f32",
                "PERF_COUNT": profile,
            }
            return core.compile_model(model, "CPU", settings)
        except Exception as error:  # OpenVINO raises RuntimeError for everything
            raise RuntimeFailedError(
                f"OpenVINO {version} cannot load {path}: {_reason(error)}",
                next_step="try the other runtime, or another recipe",
            ) from error

    def profile(self, path: Path, batch: Tensors, *, threads: int = 1, runs: int = 20) -> list[OperatorTime]:
        request = self._compile(path, threads, None, profile=True).create_infer_request()
        times: dict[tuple[str, str], list[float]] = defaultdict(list)
        for run in range(runs + 3):
            request.infer(batch)
            for item in request.get_profiling_info() if run >= 3 else ():
                if item.real_time.total_seconds() > 0:
                    times[item.node_name, item.node_type].append(item.real_time.total_seconds())
        found = [OperatorTime(name, kind, float(np.sum(values) / runs)) for (name, kind), values in times.items()]
        return sorted(found, key=lambda item: -item.seconds)


def _module() -> Any:
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise RuntimeMissingError(
            "runtime 'openvino' is not installed", next_step="install it with: pip install 'narrowcast[openvino]'"
        ) from error


@functools.cache
def _core() -> Any:
    return _module().Core()


def _info(port: Any) -> TensorInfo:
    shape = tuple(dim.get_length() if dim.is_static else None for dim in port.get_partial_shape())
    return TensorInfo(port.get_any_name(), np.dtype(port.get_element_type().to_dtype()), shape)


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
