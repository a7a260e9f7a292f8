"""Models and helpers that the tests of serving share."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from narrowcast.artifacts.manifest import Manifest
from narrowcast.artifacts.store import save_artifact
from narrowcast.serving.datatypes import DATATYPES
from narrowcast.serving.signature import Signature, Tensors, TensorSpec
from narrowcast.serving.workers.loading import FunctionModel
from narrowcast.serving.workers.sources import FunctionSource

FP32 = DATATYPES["FP32"]


def spec(name: str, *shape: int, datatype: str = "FP32") -> TensorSpec:
    return TensorSpec(name, DATATYPES[datatype], shape)


#: FP32 [n, 4] to FP32 [n, 4].
FOURS = Signature((spec("x", -1, 4),), (spec("y", -1, 4),), batched=True)


def doubled(inputs: Tensors) -> Tensors:
    return {"y": inputs["x"] * np.float32(2)}


def function(call: Callable[[Tensors], Tensors] = doubled, signature: Signature = FOURS) -> FunctionSource:
    return FunctionSource(lambda: FunctionModel(signature, call))


def echo(datatype: str) -> FunctionSource:
    """A model without a batch axis that gives back a vector of one element type."""
    signature = Signature((spec("x", -1, datatype=datatype),), (spec("y", -1, datatype=datatype),), batched=False)
    return function(lambda inputs: {"y": inputs["x"]}, signature)


class Gate:
    """A model that waits until it is let through, and remembers what it ran."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.open = threading.Semaphore(0)
        self.ran: list[list[float]] = []

    def __call__(self, inputs: Tensors) -> Tensors:
        self.ran.append(inputs["x"][:, 0].tolist())
        self.entered.release()
        assert self.open.acquire(timeout=30)
        return doubled(inputs)


def request(*rows: float, **more: Any) -> bytes:
    """A JSON request for a model from FOURS whose rows begin with these numbers."""
    data = [value for row in rows for value in (row, 0.0, 0.0, 0.0)]
    item = {"name": "x", "shape": [len(rows), 4], "datatype": "FP32", "data": data}
    return json.dumps({"inputs": [item], **more}).encode()


def write_artifact(folder: Path, manifest: Manifest, factor: float = 2.0) -> Path:
    """Write an artifact that multiplies FP32 [n, 4] by a number."""
    folder.mkdir(parents=True)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    constant = helper.make_tensor("k", TensorProto.FLOAT, [], [factor])
    graph = helper.make_graph([helper.make_node("Mul", ["x", "k"], ["y"])], "g", values[:1], values[1:], [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    save_artifact(folder, manifest)
    return folder


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to pass"
        await asyncio.sleep(0.01)
