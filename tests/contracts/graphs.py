"""Small ONNX graphs, one for each thing that a runtime must get right, built with nothing but ``onnx.helper``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
OPSET = 17


class Builder:
    """Collects nodes and constants; every method returns the name of the tensor that it makes."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}
        self.inputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, *shape: int, dtype: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, ["batch", *shape]))
        return name

    def constant(self, name: str, value: Array) -> str:
        assert name not in self.constants
        self.constants[name] = value
        return name

    def weight(self, name: str, *shape: int, fan_in: int) -> str:
        """A normal weight scaled so that values keep their size from layer to layer."""
        values = self.rng.normal(size=shape) * np.sqrt(2 / fan_in)
        return self.constant(name, values.astype(np.float32))

    def node(self, op: str, *inputs: str, out: str, outputs: int = 1, **attributes: Any) -> str:
        names = [out] if outputs == 1 else [f"{out}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=out, **attributes))
        return names[0]

    def conv(
        self, x: str, out: str, channels: tuple[int, int], *kernel: int, group: int = 1, bias: bool = True, **attrs: Any
    ) -> str:
        inside, outside = channels
        fan_in = inside // group * int(np.prod(kernel))
        inputs = [x, self.weight(f"{out}.w", outside, inside // group, *kernel, fan_in=fan_in)]
        if bias:
            inputs.append(self.constant(f"{out}.b", (0.1 * self.rng.normal(size=outside)).astype(np.float32)))
        if "auto_pad" not in attrs:
            attrs.setdefault("pads", [k // 2 for k in kernel] * 2)
        return self.node("Conv", *inputs, out=out, group=group, kernel_shape=list(kernel), **attrs)

    def clip(self, x: str, out: str, low: float = 0.0, high: float = 6.0) -> str:
        ends = [self.constant(f"{out}.{side}", np.array(v, np.float32)) for side, v in (("low", low), ("high", high))]
        return self.node("Clip", x, *ends, out=out)

    def matmul(self, x: str, out: str, inside: int, outside: int, *, bias: bool = True) -> str:
        made = self.node(
            "MatMul", x, self.weight(f"{out}.w", inside, outside, fan_in=inside), out=f"{out}.product" if bias else out
        )
        if not bias:
            return made
        values = (0.1 * self.rng.normal(size=outside)).astype(np.float32)
        return self.node("Add", made, self.constant(f"{out}.b", values), out=out)

    def gemm(self, x: str, out: str, inside: int, outside: int, *, transposed: bool = True) -> str:
        shape = (outside, inside) if transposed else (inside, outside)
        weight = self.weight(f"{out}.w", *shape, fan_in=inside)
        bias = self.constant(f"{out}.b", (0.1 * self.rng.normal(size=outside)).astype(np.float32))
        return self.node("Gemm", x, weight, bias, out=out, transB=int(transposed))

    def model(self, **outputs: tuple[int | str, ...]) -> onnx.ModelProto:
        """Return the checked model; outputs are given as name=(shape without the batch axis)."""
        graph = helper.make_graph(
            self.nodes,
            "contract",
            self.inputs,
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", *shape]) for n, shape in outputs.items()],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
        onnx.checker.check_model(made, full_check=True)
        return made


@dataclass(frozen=True)
class Case:
    """A graph and how to make inputs for it."""

    name: str
    build: Callable[[Builder], onnx.ModelProto]

    def model(self) -> onnx.ModelProto:
        return self.build(Builder(seed=sum(map(ord, self.name))))

    def feeds(self, size: int, seed: int = 0) -> dict[str, Array]:
        """Return random inputs: normal where they are real, 0 to 31 where they are whole."""
        rng, made = np.random.default_rng([seed, size]), dict[str, Array]()
        for value in self.model().graph.input:
            shape = (size, *(dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]))
            if value.type.tensor_type.elem_type == TensorProto.INT64:
                made[value.name] = rng.integers(0, 32, shape)
            else:
                made[value.name] = rng.normal(size=shape).astype(np.float32)
        return made

    def __str__(self) -> str:
        return self.name


def _conv_relu6(b: Builder) -> onnx.ModelProto:
    x = b.clip(b.conv(b.input("image", 3, 9, 9), "first", (3, 12), 3, 3), "relu6")
    b.conv(x, "out", (12, 8), 3, 3)
    return b.model(out=(8, 9, 9))


def _conv_geometry(b: Builder) -> onnx.ModelProto:
    x = b.conv(b.input("image", 3, 11, 10), "a", (3, 16), 3, 3, bias=False, strides=[2, 1], pads=[0, 1, 2, 1])
    x = b.node("Relu", x, out="a.relu")
    b.conv(x, "out", (16, 8), 3, 3, dilations=[2, 2], pads=[2, 2, 2, 2])
    return b.model(out=(8, 6, 10))


def _conv_same_pad(b: Builder) -> onnx.ModelProto:
    x = b.conv(b.input("image", 3, 8, 8), "a", (3, 16), 3, 3, auto_pad="SAME_UPPER", strides=[2, 2])
    b.conv(b.node("Relu", x, out="a.relu"), "out", (16, 8), 3, 3, auto_pad="SAME_LOWER", strides=[2, 2])
    return b.model(out=(8, 2, 2))


def _conv_1d(b: Builder) -> onnx.ModelProto:
    x = b.node("Relu", b.conv(b.input("signal", 4, 20), "a", (4, 16), 5), out="a.relu")
    b.conv(x, "out", (16, 8), 3, strides=[2])
    return b.model(out=(8, 10))


def _depthwise(b: Builder) -> onnx.ModelProto:
    x = b.clip(b.conv(b.input("image", 8, 8, 8), "expand", (8, 32), 1, 1), "expand.relu6")
    x = b.clip(b.conv(x, "depthwise", (32, 32), 3, 3, group=32, strides=[2, 2]), "depthwise.relu6")
    b.conv(x, "out", (32, 8), 1, 1)
    return b.model(out=(8, 4, 4))


def _grouped_conv(b: Builder) -> onnx.ModelProto:
    x = b.node("Relu", b.conv(b.input("image", 8, 7, 7), "a", (8, 16), 3, 3, group=2), out="a.relu")
    b.conv(x, "out", (16, 12), 3, 3, group=4)
    return b.model(out=(12, 7, 7))


def _matmul_bias(b: Builder) -> onnx.ModelProto:
    x = b.node("Relu", b.matmul(b.input("tokens", 5, 16), "first", 16, 32), out="relu")
    b.matmul(x, "out", 32, 12)
    return b.model(out=(5, 12))


def _matmul_without_bias(b: Builder) -> onnx.ModelProto:
    x = b.node("Tanh", b.matmul(b.input("x", 24), "first", 24, 20, bias=False), out="tanh")
    b.matmul(x, "out", 20, 16, bias=False)
    return b.model(out=(16,))


def _gemm(b: Builder) -> onnx.ModelProto:
    x = b.node("Relu", b.gemm(b.input("x", 24), "first", 24, 32), out="relu")
    b.gemm(x, "out", 32, 10, transposed=False)
    return b.model(out=(10,))


def _attention(b: Builder) -> onnx.ModelProto:
    x = b.input("tokens", 6, 24)
    q, k, v = (b.matmul(x, name, 24, 24) for name in ("query", "key", "value"))
    k = b.node("Transpose", k, out="key.transposed", perm=[0, 2, 1])
    scores = b.node("MatMul", q, k, out="scores")
    scores = b.node("Mul", scores, b.constant("scaling", np.array(24**-0.5, np.float32)), out="scaled")
    mixed = b.node("MatMul", b.node("Softmax", scores, out="weights", axis=-1), v, out="mixed")
    b.node("Add", b.matmul(mixed, "projected", 24, 24), x, out="out")
    return b.model(out=(6, 24))


def _residual(b: Builder) -> onnx.ModelProto:
    x = b.node("Relu", b.conv(b.input("image", 3, 8, 8), "stem", (3, 16), 3, 3), out="stem.relu")
    y = b.node("Relu", b.conv(x, "a", (16, 16), 3, 3), out="a.relu")
    x = b.node("Relu", b.node("Add", b.conv(y, "b", (16, 16), 3, 3), x, out="sum"), out="sum.relu")
    b.conv(x, "out", (16, 8), 1, 1)
    return b.model(out=(8, 8, 8))


def _concat(b: Builder) -> onnx.ModelProto:
    x = b.input("image", 3, 8, 8)
    left = b.node("Relu", b.conv(x, "left", (3, 8), 3, 3), out="left.relu")
    right = b.clip(b.conv(x, "right", (3, 8), 1, 1), "right.relu6")
    b.conv(b.node("Concat", left, right, out="joined", axis=1), "out", (16, 8), 3, 3)
    return b.model(out=(8, 8, 8))


def _max_pool(b: Builder) -> onnx.ModelProto:
    x = b.node("Relu", b.conv(b.input("image", 3, 8, 8), "a", (3, 16), 3, 3), out="relu")
    x = b.node("MaxPool", x, out="pooled", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    b.conv(x, "out", (16, 8), 3, 3)
    return b.model(out=(8, 4, 4))


def _average_pool(b: Builder) -> onnx.ModelProto:
    x = b.node("Relu", b.conv(b.input("image", 3, 8, 8), "a", (3, 16), 3, 3), out="relu")
    x = b.node("AveragePool", x, out="pooled", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    b.conv(x, "out", (16, 8), 3, 3)
    return b.model(out=(8, 4, 4))


def _global_pool(b: Builder) -> onnx.ModelProto:
    x = b.node("Relu", b.conv(b.input("image", 3, 8, 8), "a", (3, 32), 3, 3), out="relu")
    x = b.node("Flatten", b.node("GlobalAveragePool", x, out="pooled"), out="flat")
    b.gemm(x, "out", 32, 10)
    return b.model(out=(10,))


def _reduce_mean(b: Builder) -> onnx.ModelProto:
    x = b.node("Relu", b.conv(b.input("image", 3, 8, 8), "a", (3, 32), 3, 3), out="relu")
    b.gemm(b.node("ReduceMean", x, out="mean", axes=[2, 3], keepdims=0), "out", 32, 10)
    return b.model(out=(10,))


def _several_inputs_and_outputs(b: Builder) -> onnx.ModelProto:
    x = b.conv(b.input("left", 3, 8, 8), "a", (3, 16), 3, 3)
    y = b.conv(b.input("right", 2, 8, 8), "b", (2, 16), 3, 3)
    merged = b.node("Relu", b.node("Add", x, y, out="sum"), out="merged")
    pooled = b.node("Flatten", b.node("GlobalAveragePool", merged, out="pooled"), out="flat")
    b.gemm(pooled, "scores", 16, 20)
    b.conv(merged, "mask", (16, 2), 1, 1)
    return b.model(scores=(20,), mask=(2, 8, 8), merged=(16, 8, 8))


def _inner_output(b: Builder) -> onnx.ModelProto:
    x = b.node("Relu", b.conv(b.input("image", 3, 8, 8), "a", (3, 16), 3, 3), out="features")
    b.conv(x, "out", (16, 8), 3, 3)
    return b.model(out=(8, 8, 8), features=(16, 8, 8))


def _moved_values(b: Builder) -> onnx.ModelProto:
    x = b.node("Relu", b.conv(b.input("image", 3, 4, 4), "a", (3, 16), 3, 3), out="relu")
    x = b.node("Transpose", x, out="moved", perm=[0, 2, 3, 1])
    x = b.node("Reshape", x, b.constant("shape", np.array([0, 16, 16], np.int64)), out="rows")
    x = b.matmul(x, "mixed", 16, 20)
    b.node("Reshape", x, b.constant("last", np.array([0, 320], np.int64)), out="out")
    return b.model(out=(320,))


def _shared_weight(b: Builder) -> onnx.ModelProto:
    x = b.node("Relu", b.conv(b.input("image", 3, 8, 8), "stem", (3, 16), 3, 3), out="stem.relu")
    first = b.node("Relu", b.conv(x, "a", (16, 16), 3, 3), out="a.relu")
    b.node("Conv", first, "a.w", "a.b", out="out", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    return b.model(out=(16, 8, 8))


def _gated(b: Builder) -> onnx.ModelProto:
    x = b.conv(b.input("image", 3, 8, 8), "a", (3, 16), 3, 3)
    x = b.node("Mul", x, b.node("Sigmoid", x, out="gate"), out="silu")
    b.conv(x, "out", (16, 8), 3, 3)
    return b.model(out=(8, 8, 8))


def _split(b: Builder) -> onnx.ModelProto:
    x = b.node("Relu", b.conv(b.input("image", 3, 6, 6), "a", (3, 16), 3, 3), out="relu")
    b.node("Split", x, out="half", outputs=2, axis=1)
    left = b.conv("half_0", "left", (8, 8), 3, 3)
    b.node("Add", left, b.conv("half_1", "right", (8, 8), 1, 1), out="out")
    return b.model(out=(8, 6, 6))


def _embedding(b: Builder) -> onnx.ModelProto:
    table = b.weight("table", 32, 16, fan_in=2)
    x = b.node("Gather", table, b.input("ids", 7, dtype=TensorProto.INT64), out="embedded")
    b.matmul(b.node("Relu", b.matmul(x, "first", 16, 24), out="relu"), "out", 24, 16)
    return b.model(out=(7, 16))


CASES = [
    Case(function.__name__.removeprefix("_"), function)
    for function in (
        _conv_relu6,
        _conv_geometry,
        _conv_same_pad,
        _conv_1d,
        _depthwise,
        _grouped_conv,
        _matmul_bias,
        _matmul_without_bias,
        _gemm,
        _attention,
        _residual,
        _concat,
        _max_pool,
        _average_pool,
        _global_pool,
        _reduce_mean,
        _several_inputs_and_outputs,
        _inner_output,
        _moved_values,
        _shared_weight,
        _gated,
        _split,
        _embedding,
    )
]
