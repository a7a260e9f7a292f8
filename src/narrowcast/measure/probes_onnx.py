"""Probes on ONNX Runtime: blocks as networks have them, and what its profiler says of each of their nodes.

Blocks rather than single operators, because ONNX Runtime chooses layouts and fuses by what stands side by side.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from narrowcast.accounting.classes import OperatorClass, Shape, convolution_class
from narrowcast.measure.probes import Case, Sample

__all__ = ["Block", "blocks", "node_seconds", "options_of", "run_block"]


class Block(NamedTuple):
    """A small graph.

    Args:
        name: What it is like.
        model: The graph; its one input is ``x``.
        shape: Of the input.
    """

    name: str
    model: onnx.ModelProto
    shape: tuple[int, ...]


class _Builder:
    """Adds nodes to a graph; each method takes a tensor's name and returns the result's."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(0)

    def node(self, kind: str, *inputs: str, part: str = "", **attributes: Any) -> str:
        """Add a node; nodes of one ``part`` count as one operator."""
        made = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [made], name=f"{part}_{kind}_{made}", **attributes))
        return made

    def weight(self, *shape: int) -> str:
        """Add a constant of random numbers, small enough for sums to stay in range."""
        name = f"w{len(self.weights)}"
        depth = math.prod(shape[1:]) or 1
        values = self._rng.standard_normal(shape, np.float32) / np.float32(math.sqrt(depth))
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def integers(self, values: Sequence[int]) -> str:
        """Add a constant of integers."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def conv(self, x: str, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> str:
        """Add a square convolution with a bias."""
        pad = 0 if stride == kernel else kernel // 2
        weights = self.weight(outputs, inputs // groups, kernel, kernel), self.weight(outputs)
        return self.node("Conv", x, *weights, strides=[stride] * 2, pads=[pad] * 4, group=groups)

    def dense(self, x: str, inputs: int, outputs: int) -> str:
        """Add a matrix product with a bias."""
        return self.node("Add", self.node("MatMul", x, self.weight(inputs, outputs)), self.weight(outputs))

    def norm(self, x: str, width: int) -> str:
        """Add a layer normalisation."""
        return self.node("LayerNormalization", x, self.weight(width), self.weight(width), axis=-1)

    def build(self, name: str, out: str) -> Block:
        """Return the graph that ends in ``out``."""
        graph = helper.make_graph(
            self.nodes,
            name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        return Block(name, model, self.shape)


# Blocks ---------------------------------------------------------------------------------------------------------------

_GATES = {"LSTM": 4, "GRU": 3}
_STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels, pixels along an edge


def blocks() -> Iterator[Block]:
    """Yield blocks of convolutional networks, transformers and recurrent networks."""
    for channels, pixels in _STAGES:
        yield _basic(channels, pixels)
        yield _bottleneck(channels, pixels, 1)
    for channels, pixels in ((128, 56), (256, 28), (512, 14)):
        yield _bottleneck(channels // 2, pixels, 32)
    for channels, pixels, kernel, gate in (
        (24, 56, 3, "Relu"),
        (32, 28, 5, "HardSwish"),
        (96, 14, 3, "Sigmoid"),
        (160, 7, 5, "HardSwish"),
    ):
        yield _inverted(channels, pixels, kernel, gate)
    for outputs, kernel, stride in ((64, 7, 2), (32, 3, 2), (384, 16, 16)):
        yield _stem(outputs, kernel, stride)
    for channels, pixels in ((96, 56), (192, 28), (384, 14), (768, 7)):
        yield _depthwise_then_products(channels, pixels)
    yield _dense_layer(128, 28)
    yield _dense_layer(512, 14)
    for tokens, width in ((32, 256), (128, 256), (197, 192), (64, 512), (128, 384), (50, 768)):
        yield _transformer(tokens, width)
    for inputs, outputs in ((512, 1000), (1280, 1000), (4096, 4096)):
        yield _classifier(1, inputs, outputs)
    yield _classifier(64, 512, 32000)
    for kind in ("LSTM", "GRU"):
        yield _recurrent(kind, 48, 192, 384)


def _basic(channels: int, pixels: int) -> Block:
    make = _Builder(1, channels, pixels, pixels)
    y = make.node("Relu", make.conv("x", channels, channels, 3))
    z = make.node("Relu", make.node("Add", make.conv(y, channels, channels, 3), "x"))
    z = make.node("Relu", make.conv(z, channels, 2 * channels, 3, stride=2))
    return make.build(f"basic {channels}", make.node("GlobalAveragePool", z))


def _bottleneck(channels: int, pixels: int, groups: int) -> Block:
    make = _Builder(1, 4 * channels, pixels, pixels)
    y = make.node("Relu", make.conv("x", 4 * channels, channels, 1))
    y = make.node("Relu", make.conv(y, channels, channels, 3, groups=groups))
    z = make.node("Relu", make.node("Add", make.conv(y, channels, 4 * channels, 1), "x"))
    z = make.node("AveragePool", z, kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4)
    z = make.node("Relu", make.conv(z, 4 * channels, channels, 1))
    return make.build(f"bottleneck {channels} groups {groups}", z)


def _inverted(channels: int, pixels: int, kernel: int, gate: str) -> Block:
    make = _Builder(1, channels, pixels, pixels)
    wide, narrow = 6 * channels, 6 * channels // 16

    def activate(x: str) -> str:
        return make.node("Mul", x, make.node("Sigmoid", x)) if gate == "Sigmoid" else make.node(gate, x)

    y = activate(make.conv("x", channels, wide, 1))
    y = activate(make.conv(y, wide, wide, kernel, groups=wide))
    squeezed = make.node("Relu", make.conv(make.node("GlobalAveragePool", y), wide, narrow, 1))
    y = make.node("Mul", y, make.node("Sigmoid", make.conv(squeezed, narrow, wide, 1)))
    return make.build(f"inverted {channels}", make.node("Add", make.conv(y, wide, channels, 1), "x"))


def _stem(outputs: int, kernel: int, stride: int) -> Block:
    make = _Builder(1, 3, 224, 224)
    y = make.node("Relu", make.conv("x", 3, outputs, kernel, stride=stride))
    y = make.node("MaxPool", y, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    return make.build(f"stem {kernel}x{kernel}", make.conv(y, outputs, 64, 1))


def _depthwise_then_products(channels: int, pixels: int) -> Block:
    make = _Builder(1, channels, pixels, pixels)
    y = make.conv("x", channels, channels, 7, groups=channels)
    y = make.norm(make.node("Transpose", y, perm=[0, 2, 3, 1]), channels)
    y = make.node("Gelu", make.dense(y, channels, 4 * channels))
    y = make.node("Transpose", make.dense(y, 4 * channels, channels), perm=[0, 3, 1, 2])
    return make.build(f"depthwise 7x7 {channels}", make.node("Add", y, "x"))


def _dense_layer(channels: int, pixels: int) -> Block:
    make = _Builder(1, channels, pixels, pixels)
    statistics = [make.weight(channels) for _ in range(3)]
    variance = f"w{len(make.weights)}"
    make.weights.append(numpy_helper.from_array(np.ones(channels, np.float32), variance))
    y = make.node("Relu", make.node("BatchNormalization", "x", *statistics, variance))
    y = make.node("Relu", make.conv(y, channels, 128, 1))
    y = make.node("Concat", "x", make.conv(y, 128, 32, 3), axis=1)
    return make.build(f"dense layer {channels}", y)


def _transformer(tokens: int, width: int) -> Block:
    make = _Builder(1, tokens, width)
    heads = width // 64
    y = make.norm("x", width)
    sizes = make.integers([1, tokens, heads, 64])

    def heads_of(order: list[int], scaled: bool) -> str:
        z = make.node("Reshape", make.dense(y, width, width), sizes, part="view")
        z = make.node("Transpose", z, perm=order, part="attention")
        return make.node("Mul", z, make.weight(1), part="attention") if scaled else z

    scores = make.node("MatMul", heads_of([0, 2, 1, 3], True), heads_of([0, 2, 3, 1], False), part="attention")
    scores = make.node("Softmax", scores, axis=-1, part="attention")
    z = make.node("MatMul", scores, heads_of([0, 2, 1, 3], False), part="attention")
    z = make.node("Transpose", z, perm=[0, 2, 1, 3], part="attention")
    z = make.node("Reshape", z, make.integers([1, tokens, width]), part="view")
    y = make.node("Add", make.dense(z, width, width), "x")
    z = make.node("Gelu", make.dense(make.norm(y, width), width, 4 * width))
    return make.build(f"transformer {tokens} x {width}", make.node("Add", make.dense(z, 4 * width, width), y))


def _classifier(rows: int, inputs: int, outputs: int) -> Block:
    make = _Builder(rows, inputs)
    y = make.node("Gemm", "x", make.weight(outputs, inputs), make.weight(outputs), transB=1)
    return make.build(f"classifier {rows} x {inputs} x {outputs}", y)


def _recurrent(kind: str, steps: int, inputs: int, hidden: int) -> Block:
    make = _Builder(steps, 1, inputs)
    gates = _GATES[kind]
    weights = (make.weight(1, gates * hidden, inputs), make.weight(1, gates * hidden, hidden))
    y = make.node(kind, "x", *weights, make.weight(1, 2 * gates * hidden), hidden_size=hidden)
    return make.build(f"{kind} {hidden}", y)


# Running --------------------------------------------------------------------------------------------------------------

_KINDS = {
    "Gemm": OperatorClass.PRODUCT,
    "FusedGemm": OperatorClass.PRODUCT,
    "MatMul": OperatorClass.PRODUCT,
    "LSTM": OperatorClass.RECURRENT,
    "GRU": OperatorClass.RECURRENT,
    "LayerNormalization": OperatorClass.NORMALISATION,
    "SkipLayerNormalization": OperatorClass.NORMALISATION,
    "BatchNormalization": OperatorClass.NORMALISATION,
    "Softmax": OperatorClass.SOFTMAX,
    "Gelu": OperatorClass.TRANSCENDENTAL,
    "BiasGelu": OperatorClass.TRANSCENDENTAL,
    "Sigmoid": OperatorClass.TRANSCENDENTAL,
    "QuickGelu": OperatorClass.TRANSCENDENTAL,
    "HardSwish": OperatorClass.ELEMENTWISE,
    "HardSigmoid": OperatorClass.ELEMENTWISE,
    "Add": OperatorClass.ELEMENTWISE,
    "Mul": OperatorClass.ELEMENTWISE,
    "Relu": OperatorClass.ELEMENTWISE,
    "GlobalAveragePool": OperatorClass.REDUCTION,
    "AveragePool": OperatorClass.POOLING,
    "MaxPool": OperatorClass.POOLING,
    "Concat": OperatorClass.MOVE,
    "Transpose": OperatorClass.MOVE,
}


class _Node(NamedTuple):
    kind: str
    inputs: list[list[int]]
    outputs: list[list[int]]
    seconds: list[float]


def options_of(threads: int) -> ort.SessionOptions:
    """Return the options that blocks and networks run with."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return options


def run_block(block: Block, *, threads: int, runs: int = 20) -> list[Sample]:
    """Return what each node of a block takes.

    Args:
        block: What to run.
        threads: Of ONNX Runtime.
        runs: Runs that are timed; three more come first.
    """
    x = np.random.default_rng(0).standard_normal(block.shape, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        options = options_of(threads)
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "block")
        session = ort.InferenceSession(block.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for _ in range(runs + 3):
            session.run(None, {"x": x})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return list(_samples(_nodes(events, runs)))


def _nodes(events: list[dict[str, Any]], runs: int) -> dict[str, _Node]:
    """Return the nodes of a profile by name, with the times of its last runs."""
    found: dict[str, _Node] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
            continue
        args = event["args"]
        inputs, outputs = (
            [next(iter(part.values())) for part in args.get(f"{way}_type_shape", [])] for way in ("input", "output")
        )
        node = found.setdefault(name.removesuffix("_kernel_time"), _Node(args["op_name"], inputs, outputs, []))
        node.seconds.append(event["dur"] * 1e-6)
    return {name: node._replace(seconds=node.seconds[-runs:]) for name, node in found.items()}


def _samples(nodes: dict[str, _Node]) -> Iterator[Sample]:
    attention: list[_Node] = []
    for name, node in nodes.items():
        if name.startswith("attention"):
            attention.append(node)
        elif node.kind in ("Conv", "FusedConv"):
            yield _sample(_convolution(node), node.seconds)
        elif node.kind in _KINDS:
            yield _sample(_case(node), node.seconds)
    if attention:
        yield _sample(_attention(attention), _sum([node.seconds for node in attention]))


def _sum(times: Sequence[Sequence[float]]) -> list[float]:
    return [math.fsum(parts) for parts in zip(*times, strict=True)]


def _sample(case: Case, seconds: Sequence[float]) -> Sample:
    """Return the lower quartile: what other processes take from the machine is not the runtime's."""
    low, quartile, high = np.percentile(seconds, [10, 25, 90])
    return Sample(case, 4, float(quartile), float(low), float(high))


def _numbers(shapes: Sequence[Sequence[int]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _convolution(node: _Node) -> Case:
    x, weight = node.inputs[:2]
    out = node.outputs[0]
    channels, depth = weight[0], math.prod(weight[1:])
    groups = max(1, x[1] // weight[1])
    kind = convolution_class(x[1], groups, math.prod(weight[2:]))
    shape = Shape(groups, math.prod(out) / out[1], channels / groups, depth)
    moved = _numbers([x, *node.outputs, *node.inputs[3:]])
    return Case(kind, "Conv", (*x, *weight), shape, moved, channels * depth)


def _case(node: _Node) -> Case:
    kind = _KINDS[node.kind]
    if kind is OperatorClass.PRODUCT:
        *rows, depth = node.inputs[0]
        columns = node.outputs[0][-1]
        moved = _numbers([node.inputs[0], node.outputs[0]])
        shape = Shape(1, math.prod(rows), columns, depth)
        return Case(kind, node.kind, (*node.inputs[0], columns), shape, moved, depth * columns)
    if kind is OperatorClass.RECURRENT:
        steps, batch, inputs = node.inputs[0]
        hidden = node.outputs[0][-1]
        gates = _GATES[node.kind] * hidden
        shape, moved = Shape(steps, batch, gates, inputs + hidden), steps * batch * (inputs + hidden)
        return Case(kind, node.kind, (steps, batch, inputs, hidden), shape, moved, gates * (inputs + hidden))
    moved = _numbers([*node.inputs[:2], *node.outputs[:1]])
    return Case(kind, node.kind, tuple(node.inputs[0]), None, moved)


def _attention(nodes: Sequence[_Node]) -> Case:
    scores = next(node for node in nodes if node.kind == "Softmax").outputs[0]
    batch, heads, tokens, keys = scores
    value = [node for node in nodes if node.kind.endswith("MatMul")][-1].outputs[0]
    shape = Shape(batch * heads, tokens, keys, 2 * value[-1])
    return Case(OperatorClass.ATTENTION, "attention", tuple(scores), shape, 4 * math.prod(value))


def node_seconds(*, threads: int, rounds: int = 31) -> float:
    """Return the seconds that each node costs however small it is: the slope over chains of small nodes.

    Args:
        threads: Of ONNX Runtime.
        rounds: Times that the chains are timed, in turns; medians count.
    """
    lengths = (50, 250)
    chains = [_chain(length, threads) for length in lengths]
    times: list[list[float]] = [[] for _ in chains]
    for _ in range(rounds + 3):
        for chain, found in zip(chains, times, strict=True):
            begin = time.perf_counter()
            chain()
            found.append(time.perf_counter() - begin)
    short, long = (median(found[3:]) for found in times)
    return max(long - short, 0.0) / (lengths[1] - lengths[0])


def _chain(length: int, threads: int) -> Callable[[], Any]:
    make = _Builder(1, 8)
    y = "x"
    for place in range(length):
        y = make.node("Sigmoid" if place % 2 else "Softmax", y)
    model = make.build("chain", y).model.SerializeToString()
    session = ort.InferenceSession(model, options_of(threads), providers=["CPUExecutionProvider"])
    x = np.zeros((1, 8), np.float32)
    return lambda: session.run(None, {"x": x})
