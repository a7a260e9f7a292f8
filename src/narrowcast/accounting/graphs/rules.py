"""What one node of an ONNX graph costs, from the shapes of its inputs and outputs.

A rule per operator type, as data: what is not here is reported as not counted. Conventions are those of
:mod:`narrowcast.accounting.counting`, so that a graph and the module that it was exported from cost the same. The shapes
that rules rely on are those of the operators' specifications: ``onnx/docs/Operators.md`` of the ONNX project, and
``docs/ContribOperators.md`` of ONNX Runtime for the domain ``com.microsoft``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from narrowcast.accounting.counting import Work
from narrowcast.accounting.graphs.einsum import einsum
from narrowcast.accounting.kinds import Kind

__all__ = ["Call", "Entry", "ShapeError", "Tensor", "attributes_of", "entry_of", "numbers_in"]


class ShapeError(ValueError):
    """Shapes that an operator cannot take."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of a graph.

    Args:
        shape: Its sizes.
        dtype: Such as ``float32``; PyTorch's names.
        bits: What one number takes.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    bits: int = 32

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return -(-self.size * self.bits // 8)


@dataclass(frozen=True)
class Call:
    """A node and the tensors that it reads and makes.

    Args:
        operator: Its operator type.
        attributes: Its attributes, subgraphs left out.
        inputs: Its inputs; None for one that is left out.
        outputs: Its outputs; None for one that nobody asked for.
    """

    operator: str
    attributes: Mapping[str, Any]
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor | None, ...]

    def has(self, place: int) -> bool:
        """Return whether an input is given."""
        return place < len(self.inputs) and self.inputs[place] is not None

    def input(self, place: int) -> Tensor:
        """Return an input.

        Raises:
            ShapeError: It is left out.
        """
        found = self.inputs[place] if place < len(self.inputs) else None
        if found is None:
            raise ShapeError(f"{self.operator} lacks input {place}")
        return found

    @property
    def out(self) -> Tensor:
        """The first output that was asked for.

        Raises:
            ShapeError: There is none.
        """
        for found in self.outputs:
            if found is not None:
                return found
        raise ShapeError(f"{self.operator} makes nothing")


Rule = Callable[[Call], Work]


class Entry(NamedTuple):
    """What is known of an operator type.

    Args:
        kind: What sort of work it does.
        rule: What it computes.
        weights: Inputs that are parameters if they are constants, whatever their dtype and size.
        settings: Inputs that are never parameters: shapes, axes, bounds, scales and zero points, running statistics.
    """

    kind: Kind
    rule: Rule
    weights: tuple[int, ...] = ()
    settings: tuple[int, ...] = ()


# Convolutions ---------------------------------------------------------------------------------------------------------


def _convolution(weight: int = 1, bias: int | None = 2, *, each: int = 0) -> Rule:
    """Return the rule of a convolution; ``each`` more operations per output requantise it."""

    def rule(call: Call) -> Work:
        x, kernel, out = call.input(0), call.input(weight), call.out
        groups = call.attributes.get("group", 1)
        if len(x.shape) != len(kernel.shape) or x.shape[1] != kernel.shape[1] * groups or kernel.shape[0] % groups:
            raise ShapeError(
                f"weights {list(kernel.shape)} in {groups} group(s) take {kernel.shape[1] * groups} channels, and the "
                f"input is {list(x.shape)}"
            )
        per_output = math.prod(kernel.shape[1:])
        added = out.size if bias is not None and call.has(bias) else 0
        return Work(out.size * per_output, added, each * out.size, out.size)

    return rule


def _transposed_convolution(call: Call) -> Work:
    x, kernel, out = call.input(0), call.input(1), call.out
    if len(x.shape) != len(kernel.shape) or x.shape[1] != kernel.shape[0]:
        raise ShapeError(
            f"weights {list(kernel.shape)} take {kernel.shape[0]} channels, and the input is {list(x.shape)}"
        )
    return Work(x.size * math.prod(kernel.shape[1:]), call.has(2) * out.size, 0, out.size)


def _deformable_convolution(call: Call) -> Work:
    x, kernel, out = call.input(0), call.input(1), call.out
    samples = out.size // out.shape[1] * x.shape[1] * math.prod(kernel.shape[2:])
    # Bilinear interpolation of a sample: four products, three additions; and the mask.
    other = samples * (7 + call.has(4))
    return Work(out.size * math.prod(kernel.shape[1:]), call.has(3) * out.size, other, out.size)


# Products -------------------------------------------------------------------------------------------------------------


def _matmul(second: int = 1, bias: int | None = None, *, each: int = 0) -> Rule:
    """Return the rule of ``numpy.matmul``: batched, broadcast, and of vectors."""

    def rule(call: Call) -> Work:
        a, b, out = call.input(0), call.input(second), call.out
        inner = a.shape[-1]
        if inner != b.shape[-2 if len(b.shape) > 1 else 0]:
            raise ShapeError(f"the product of {list(a.shape)} and {list(b.shape)}")
        added = out.size if bias is not None and call.has(bias) else 0
        return Work(out.size * inner, added, each * out.size, out.size)

    return rule


def _gemm(second: int = 1, bias: int = 2) -> Rule:
    def rule(call: Call) -> Work:
        a, b, out = call.input(0), call.input(second), call.out
        inner = a.shape[0 if call.attributes.get("transA") else 1]
        if inner != b.shape[1 if call.attributes.get("transB") else 0]:
            raise ShapeError(f"the product of {list(a.shape)} and {list(b.shape)}")
        biased = call.has(bias) and call.attributes.get("beta", 1.0) != 0
        return Work(out.size * inner, biased * out.size, 0, out.size)

    return rule


def _fused_matmul(call: Call) -> Work:
    a, out = call.input(0), call.out
    inner = a.shape[-2 if call.attributes.get("transA") else -1]
    return Work(out.size * inner, 0, 0, out.size)


def _matmul_bits(call: Call) -> Work:
    rows, columns, out = call.attributes["K"], call.attributes["N"], call.out
    if call.input(0).shape[-1] != rows:
        raise ShapeError(f"the product of {list(call.input(0).shape)} and [{rows}, {columns}]")
    return Work(out.size * rows, call.has(5) * out.size, DEQUANTISE * rows * columns, out.size)


def _einsum(call: Call) -> Work:
    try:
        return einsum(call.attributes["equation"], [tensor.shape for tensor in call.inputs if tensor is not None])
    except (KeyError, ValueError) as error:
        raise ShapeError(str(error)) from error


# Recurrent layers: gates, and operations of a step for each hidden number (additions of both products, activations, and
# the new state). ------------------------------------------------------------------------------------------------------


def _recurrent(gates: int, each: int) -> Rule:
    def rule(call: Call) -> Work:
        x, weight, recurrence = call.input(0), call.input(1), call.input(2)
        directions, rows, width = weight.shape  # rows: gates * hidden
        hidden = recurrence.shape[-1]
        if width != x.shape[-1] or rows != gates * hidden:
            raise ShapeError(f"weights {list(weight.shape)} and {list(recurrence.shape)} for an input {list(x.shape)}")
        steps = x.shape[0] * x.shape[1] * directions  # of all sequences, whichever axis is time
        peepholes = 2 * 3 * hidden if call.has(7) else 0
        return Work(
            steps * rows * (width + hidden),
            call.has(3) * steps * 2 * rows,
            steps * (each * hidden + peepholes),
            steps * 2 * rows,
        )

    return rule


# Attention ------------------------------------------------------------------------------------------------------------


def _dot_product(rows: int, keys: int, key_width: int, value_width: int, *, masked: bool = False) -> Work:
    """Return the work of attention: ``rows`` queries (of all heads and sequences) that each meet ``keys`` keys."""
    pairs = rows * keys
    return Work(pairs * (key_width + value_width), 0, (5 + masked) * pairs, pairs + rows * value_width)


def _attention(call: Call) -> Work:
    query, key, value = call.input(0), call.input(1), call.input(2)
    if len(query.shape) == 4:  # [batch, heads, tokens, width]
        rows, keys = math.prod(query.shape[:3]), key.shape[2]
        widths = query.shape[3], value.shape[3]
    else:  # [batch, tokens, heads * width]
        heads, kv_heads = call.attributes["q_num_heads"], call.attributes["kv_num_heads"]
        rows, keys = query.shape[0] * query.shape[1] * heads, key.shape[1]
        widths = query.shape[2] // heads, value.shape[2] // kv_heads
    past = call.input(4).shape[2] if call.has(4) else 0
    return _dot_product(rows, keys + past, *widths, masked=call.has(3))


def _projected_attention(past: int, mask: int | None) -> Rule:
    """Return the rule of attention that projects its input to queries, keys and values itself."""

    def rule(call: Call) -> Work:
        x, weight = call.input(0), call.input(1)
        batch, tokens, width = x.shape
        columns, heads = weight.shape[1], call.attributes["num_heads"]
        sizes = call.attributes.get("qkv_hidden_sizes") or [columns // 3] * 3
        keys = tokens + (call.input(past).shape[3] if call.has(past) else 0)
        masked = mask is not None and call.has(mask)
        pairs = _dot_product(batch * tokens * heads, keys, sizes[0] // heads, sizes[2] // heads, masked=masked)
        projected = batch * tokens * columns
        return Work(projected * width + pairs.macs, call.has(2) * projected, pairs.other, projected + pairs.sums)

    return rule


def _multi_head_attention(call: Call) -> Work:
    query, heads = call.input(0), call.attributes["num_heads"]
    batch, tokens = query.shape[:2]
    if len(query.shape) == 5:  # packed: [batch, tokens, heads, 3, width]
        keys, widths, biased = tokens, (query.shape[4], query.shape[4]), query.size
    else:
        key = call.input(
            1
        )  # [batch, keys, width], [batch, heads, keys, width], or packed [batch, keys, heads, 2, width]
        keys = key.shape[2] if len(key.shape) == 4 else key.shape[1]
        value = call.input(2) if call.has(2) else key
        value_width = value.shape[-1] // heads if len(value.shape) == 3 else value.shape[-1]
        widths = query.shape[2] // heads, value_width
        biased = query.size + batch * keys * heads * (widths[0] + widths[1])
    past = call.input(6).shape[2] if call.has(6) else 0
    work = _dot_product(batch * tokens * heads, keys + past, *widths, masked=call.has(5))
    return work._replace(bias_adds=call.has(3) * biased)


def _grouped_query_attention(call: Call) -> Work:
    query, heads, kv_heads = call.input(0), call.attributes["num_heads"], call.attributes["kv_num_heads"]
    batch, tokens, columns = query.shape
    width = columns // heads if call.has(1) else columns // (heads + 2 * kv_heads)  # packed without keys
    past = call.input(3).shape[2] if call.has(3) else 0
    work = _dot_product(batch * tokens * heads, tokens + past, width, width)
    turned = 3 * batch * tokens * (heads + kv_heads) * width if call.attributes.get("do_rotary") else 0
    return work._replace(other=work.other + turned)


# Everything else: operations for each number of the result, or of what is read ------------------------------------------


def _each(operations: int) -> Rule:
    return lambda call: Work(0, 0, operations * call.out.size)


def _each_input(operations: int) -> Rule:
    return lambda call: Work(0, 0, operations * call.input(0).size)


def _between(call: Call) -> Work:
    """Return the work of an operator that joins all its inputs, two at a time."""
    return Work(0, 0, max(1, sum(tensor is not None for tensor in call.inputs) - 1) * call.out.size)


def _normalisation(operations: int, *added: int) -> Rule:
    """Return the rule of a normalisation that first adds the given inputs, where they are there."""
    return lambda call: Work(0, 0, (operations + sum(map(call.has, added))) * call.out.size)


def _batch_norm(call: Call) -> Work:
    return Work(0, 0, (8 if call.attributes.get("training_mode") else 2) * call.out.size)


def _biased(operations: int) -> Rule:
    """Return the rule of an activation that adds a bias (input 1) first."""
    return lambda call: Work(0, call.has(1) * call.out.size, operations * call.out.size)


def _nothing(call: Call) -> Work:
    return Work()


#: Operations for each number: subtract the zero point and scale; divide, round, add the zero point and clamp.
DEQUANTISE, QUANTISE = 2, 4
_REQUANTISE = 4

_LAYER_NORM, _RMS_NORM, _SOFTMAX = 8, 5, 5


def _entries(kind: Kind, rule: Rule, names: str, **slots: tuple[int, ...]) -> dict[str, Entry]:
    return dict.fromkeys(names.split(), Entry(kind, rule, **slots))


_AFTER_FIRST = tuple(range(1, 12))  # settings: all inputs but the first

#: Operators of the standard domain.
_STANDARD: dict[str, Entry] = {
    **_entries(Kind.CONVOLUTION, _convolution(), "Conv", weights=(1, 2)),
    **_entries(Kind.CONVOLUTION, _transposed_convolution, "ConvTranspose", weights=(1, 2)),
    **_entries(Kind.CONVOLUTION, _deformable_convolution, "DeformConv", weights=(1, 3)),
    **_entries(Kind.CONVOLUTION, _convolution(bias=None), "ConvInteger", weights=(1,), settings=(2, 3)),
    **_entries(
        Kind.CONVOLUTION,
        _convolution(3, 8, each=_REQUANTISE),
        "QLinearConv",
        weights=(3, 8),
        settings=(1, 2, 4, 5, 6, 7),
    ),
    **_entries(Kind.PRODUCT, _matmul(), "MatMul", weights=(1,)),
    **_entries(Kind.PRODUCT, _matmul(), "MatMulInteger", weights=(1,), settings=(2, 3)),
    **_entries(Kind.PRODUCT, _matmul(3, each=_REQUANTISE), "QLinearMatMul", weights=(3,), settings=(1, 2, 4, 5, 6, 7)),
    **_entries(Kind.PRODUCT, _gemm(), "Gemm", weights=(1, 2)),
    **_entries(Kind.PRODUCT, _einsum, "Einsum"),
    **_entries(Kind.RECURRENT, _recurrent(1, 2), "RNN", weights=(1, 2, 3), settings=(4, 5)),
    **_entries(Kind.RECURRENT, _recurrent(3, 10), "GRU", weights=(1, 2, 3), settings=(4, 5)),
    **_entries(Kind.RECURRENT, _recurrent(4, 13), "LSTM", weights=(1, 2, 3, 7), settings=(4, 5, 6)),
    **_entries(Kind.ATTENTION, _attention, "Attention", settings=(3,)),
    **_entries(Kind.NORMALISATION, _batch_norm, "BatchNormalization", weights=(1, 2), settings=(3, 4)),
    **_entries(
        Kind.NORMALISATION,
        _normalisation(_LAYER_NORM),
        "LayerNormalization InstanceNormalization GroupNormalization MeanVarianceNormalization",
        weights=(1, 2),
    ),
    **_entries(
        Kind.NORMALISATION, _normalisation(_RMS_NORM), "RMSNormalization SimplifiedLayerNormalization", weights=(1,)
    ),
    **_entries(Kind.NORMALISATION, _normalisation(3), "LpNormalization"),
    **_entries(
        Kind.NORMALISATION,
        lambda call: Work(0, 0, (2 * call.attributes["size"] + 3) * call.out.size),  # squares, their sum, and a power
        "LRN",
    ),
    **_entries(Kind.SOFTMAX, _each(_SOFTMAX), "Softmax LogSoftmax"),
    # One operation for each element that is read, as in PyTorch's table.
    **_entries(
        Kind.POOLING,
        _each_input(1),
        "MaxPool AveragePool LpPool GlobalMaxPool GlobalAveragePool GlobalLpPool MaxRoiPool",
        settings=(1,),
    ),
    **_entries(Kind.POOLING, _each(4), "RoiAlign", settings=(1, 2)),  # a bilinear sample, accumulated
    **_entries(
        Kind.REDUCTION,
        _each_input(1),
        """ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
        ReduceSumSquare ArgMax ArgMin CumSum CumProd TopK Hardmax NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss""",
        settings=(1,),
    ),
    **_entries(
        Kind.ELEMENTWISE,
        _each(1),
        """Abs Acos Acosh Add And Asin Asinh Atan Atanh Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Ceil
        Celu Cos Cosh Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish IsInf IsNaN LeakyRelu
        Less LessOrEqual Log Mish Mod Mul Neg Not Or Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus
        Softsign Sqrt Sub Swish Tan Tanh ThresholdedRelu Where Xor""",
    ),
    **_entries(Kind.ELEMENTWISE, _each(1), "Clip Pow Trilu", settings=_AFTER_FIRST),
    **_entries(Kind.ELEMENTWISE, _each(1), "PRelu", weights=(1,)),
    **_entries(Kind.ELEMENTWISE, _between, "Max Mean Min Sum"),
    **_entries(Kind.ELEMENTWISE, _each(2), "SwiGLU"),
    **_entries(Kind.ELEMENTWISE, _each(3), "RotaryEmbedding", settings=_AFTER_FIRST),  # two products, one addition
    **_entries(Kind.ELEMENTWISE, _each(QUANTISE), "QuantizeLinear", settings=(1, 2)),
    **_entries(Kind.ELEMENTWISE, _each(DEQUANTISE), "DequantizeLinear", weights=(0,), settings=(1, 2)),
    **_entries(Kind.ELEMENTWISE, _each(QUANTISE + 2), "DynamicQuantizeLinear"),  # and the smallest and largest number
    **_entries(
        Kind.MOVE,
        _nothing,
        """BitCast Cast CastLike CenterCropPad Col2Im Compress DepthToSpace Expand EyeLike GatherElements GatherND
        GridSample MaxUnpool NonZero OneHot Pad RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Resize
        ReverseSequence Slice SpaceToDepth Split Tile Transpose Unique Upsample ConstantOfShape TensorScatter""",
        settings=_AFTER_FIRST,
    ),
    **_entries(
        Kind.MOVE, _nothing, "SplitToSequence ConcatFromSequence SequenceInsert SequenceErase", settings=_AFTER_FIRST
    ),
    **_entries(Kind.MOVE, _nothing, "Gather", weights=(0,), settings=(1,)),
    **_entries(Kind.MOVE, _nothing, "Concat Scatter ScatterElements ScatterND", settings=()),
    **_entries(
        Kind.VIEW,
        _nothing,
        """Reshape Flatten Squeeze Unsqueeze Identity Dropout Shape Size SequenceAt SequenceConstruct SequenceEmpty
        SequenceLength Optional OptionalGetElement OptionalHasElement""",
        settings=_AFTER_FIRST,
    ),
}

#: Operators of ONNX Runtime's own domain, where they differ from the standard ones of the same name.
_MICROSOFT: dict[str, Entry] = {
    **_entries(Kind.CONVOLUTION, _convolution(), "FusedConv", weights=(1, 2)),
    **_entries(Kind.PRODUCT, _gemm(), "FusedGemm", weights=(1, 2)),
    **_entries(Kind.PRODUCT, _fused_matmul, "FusedMatMul TransposeMatMul", weights=(1,)),
    **_entries(Kind.PRODUCT, _matmul_bits, "MatMulNBits", weights=(1, 5), settings=(2, 3, 4)),
    **_entries(
        Kind.PRODUCT,
        _matmul(1, 6, each=DEQUANTISE),
        "MatMulIntegerToFloat",
        weights=(1, 6),
        settings=(2, 3, 4, 5),
    ),
    **_entries(Kind.PRODUCT, _matmul(1, 4, each=DEQUANTISE), "DynamicQuantizeMatMul", weights=(1, 4), settings=(2, 3)),
    **_entries(Kind.PRODUCT, _gemm(3, 6), "QGemm", weights=(3, 6), settings=(1, 2, 4, 5, 7, 8)),
    **_entries(Kind.ATTENTION, _projected_attention(past=4, mask=5), "Attention", weights=(1, 2), settings=(3, 5, 6)),
    **_entries(
        Kind.ATTENTION, _projected_attention(past=8, mask=None), "QAttention", weights=(1, 2), settings=(3, 4, 5, 6, 7)
    ),
    **_entries(Kind.ATTENTION, _multi_head_attention, "MultiHeadAttention", weights=(3,), settings=(4, 5, 8)),
    **_entries(Kind.ATTENTION, _grouped_query_attention, "GroupQueryAttention", settings=(5, 6, 7, 8, 9, 10)),
    **_entries(Kind.NORMALISATION, _normalisation(_LAYER_NORM, 1, 4), "SkipLayerNormalization", weights=(2, 3, 4)),
    **_entries(Kind.NORMALISATION, _normalisation(_RMS_NORM, 1, 3), "SkipSimplifiedLayerNormalization", weights=(2, 3)),
    **_entries(Kind.NORMALISATION, _normalisation(_LAYER_NORM), "GroupNorm", weights=(1, 2)),
    **_entries(Kind.NORMALISATION, _normalisation(_LAYER_NORM, 3, 4), "SkipGroupNorm", weights=(1, 2, 4)),
    **_entries(
        Kind.NORMALISATION, _normalisation(_LAYER_NORM, 3, 4), "EmbedLayerNormalization", weights=(2, 3, 4, 5, 6)
    ),
    **_entries(Kind.SOFTMAX, _each(_SOFTMAX + 1), "BiasSoftmax", settings=(1,)),
    **_entries(Kind.SOFTMAX, _each(_SOFTMAX), "QLinearSoftmax", settings=_AFTER_FIRST),
    **_entries(Kind.ELEMENTWISE, _biased(1), "BiasGelu FastGelu", weights=(1,)),
    **_entries(Kind.ELEMENTWISE, _biased(0), "BiasAdd", weights=(1,)),
    **_entries(Kind.ELEMENTWISE, _each(1), "QuickGelu"),
    **_entries(
        Kind.ELEMENTWISE,
        _each(1 + 2 * DEQUANTISE + QUANTISE),
        "QLinearAdd QLinearMul",
        weights=(3,),
        settings=(1, 2, 4, 5, 6, 7),
    ),
    **_entries(
        Kind.ELEMENTWISE, _each(1), "QLinearSigmoid QLinearLeakyRelu", settings=_AFTER_FIRST
    ),  # a table of codes
    **_entries(Kind.POOLING, _each_input(1), "QLinearAveragePool QLinearGlobalAveragePool", settings=_AFTER_FIRST),
    **_entries(Kind.MOVE, _nothing, "QLinearConcat QLinearWhere"),
    **_entries(Kind.MOVE, _each(DEQUANTISE), "GatherBlockQuantized", weights=(0,), settings=(1, 2, 3)),
}


def entry_of(domain: str, operator: str) -> Entry | None:
    """Return what is known of an operator type; None if nothing is.

    Args:
        domain: Its domain; empty for the standard one.
        operator: Its name.
    """
    if domain in ("", "ai.onnx"):
        return _STANDARD.get(operator)
    return _MICROSOFT.get(operator) or _STANDARD.get(operator) if domain == "com.microsoft" else None


_WEIGHT_OF = {"Conv": 1, "FusedConv": 1, "ConvTranspose": 1, "DeformConv": 1, "ConvInteger": 1, "QLinearConv": 3}


def attributes_of(call: Call) -> dict[str, Any]:
    """Return of a convolution what :func:`narrowcast.accounting.kinds.attributes_of` says; of all others nothing."""
    place = _WEIGHT_OF.get(call.operator)
    if place is None:
        return {}
    own, per_group, *kernel = call.input(place).shape
    groups, transposed = int(call.attributes.get("group", 1)), call.operator == "ConvTranspose"
    inputs, outputs = (own, per_group * groups) if transposed else (per_group * groups, own)
    return {
        "inputs": inputs,
        "outputs": outputs,
        "kernel": tuple(kernel),
        "stride": tuple(call.attributes.get("strides", [1] * len(kernel))),
        "dilation": tuple(call.attributes.get("dilations", [1] * len(kernel))),
        "groups": groups,
        "transposed": transposed,
    }


def numbers_in(call: Call, place: int) -> int:
    """Return how many numbers an input holds, packed ones counted each."""
    if (call.operator, place) == ("MatMulNBits", 1):
        return call.attributes["K"] * call.attributes["N"]
    return call.input(place).size
