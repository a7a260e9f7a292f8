"""Closed forms: what a layer of given sizes costs. A traced count equals them, and the tests hold it to that.

Conventions, everywhere in this package: one MAC is one multiplication and one addition, so ``flops = 2 * macs``; the
additions of a bias are counted apart (``bias_adds``), as are elementwise operations, normalisation and softmax
(``other_flops``). With a bias, the additions of a dot product and of its bias together equal the multiplications.

A model is the sum of its layers, here Llama-2-7B on 2,048 tokens:

>>> block = attention(4096, 2048, heads=32, bias=False)
>>> block += feed_forward(4096, 11_008, rows=2048, gated=True, bias=False)
>>> block += normalisation(4096, bias=False).times(2)
>>> head = normalisation(4096, bias=False) + linear(4096, 32_000, rows=2048, bias=False)
>>> model = embedding(32_000, 4096) + block.times(32) + head
>>> model.parameters, model.flops
(6738415616, 29261612187648)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "Cost",
    "attention",
    "convolution",
    "convolution_output",
    "embedding",
    "feed_forward",
    "latent_attention",
    "linear",
    "mixture_of_experts",
    "normalisation",
    "recurrent",
    "transposed_convolution",
]

GATES = {"rnn": 1, "gru": 3, "lstm": 4}


@dataclass(frozen=True)
class Cost:
    """Parameters and work of a layer.

    Args:
        parameters: Trainable numbers, all of them.
        macs: Multiplications that are each added to a sum.
        bias_adds: Additions of a bias.
        active_parameters: Those that one input meets; differs from ``parameters`` in mixtures of experts.
    """

    parameters: int
    macs: int
    bias_adds: int = 0
    active_parameters: int = -1

    def __post_init__(self) -> None:
        if self.active_parameters < 0:
            object.__setattr__(self, "active_parameters", self.parameters)

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.parameters + other.parameters,
            self.macs + other.macs,
            self.bias_adds + other.bias_adds,
            self.active_parameters + other.active_parameters,
        )

    def times(self, count: int) -> Cost:
        """Return the cost of ``count`` such layers."""
        return Cost(self.parameters * count, self.macs * count, self.bias_adds * count, self.active_parameters * count)

    @property
    def flops(self) -> int:
        """Two for each MAC."""
        return 2 * self.macs

    @property
    def multiplications(self) -> int:
        """Multiplications: one for each MAC."""
        return self.macs

    def additions(self, outputs: int) -> int:
        """Return the additions for ``outputs`` sums: the first product of a sum is added to nothing but a bias."""
        return self.macs - outputs + self.bias_adds


def linear(inputs: int, outputs: int, *, rows: int = 1, bias: bool = True) -> Cost:
    """Return the cost of ``y = W x + b`` on ``rows`` vectors.

    Source: Molchanov et al. 2017 (Pruning convolutional neural networks for resource efficient inference), appendix A.1:
    ``(2 I - 1) O`` operations without bias, which is one addition for each sum less than two for each MAC.
    """
    return Cost(inputs * outputs + bias * outputs, rows * inputs * outputs, bias * rows * outputs)


def convolution_output(
    size: int, kernel: int, *, stride: int = 1, padding: int = 0, dilation: int = 1, transposed: bool = False
) -> int:
    """Return the length of a convolution's output along one axis (no output padding).

    Source: Dumoulin and Visin 2016 (A guide to convolution arithmetic for deep learning), relationships 6, 14 and 15.
    """
    if transposed:
        return (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def convolution(
    inputs: int,
    outputs: int,
    kernel: Sequence[int],
    positions: Sequence[int],
    *,
    groups: int = 1,
    bias: bool = True,
    batch: int = 1,
) -> Cost:
    """Return the cost of a convolution.

    Every output position takes ``inputs / groups * prod(kernel)`` MACs in each output channel. Dilation and stride change
    the positions, not the work at each; padding counts like pixels.

    Source: Molchanov et al. 2017, appendix A.1; in groups and depthwise Howard et al. 2017 (MobileNets), equations 2 to 5.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        kernel: Kernel size along each axis.
        positions: Output size along each axis, see :func:`convolution_output`.
        groups: Groups; ``inputs`` of them make a depthwise convolution.
        bias: Whether each output channel has a bias.
        batch: Samples.
    """
    weights = inputs // groups * outputs * math.prod(kernel)
    places = batch * math.prod(positions)
    return Cost(weights + bias * outputs, places * weights, bias * places * outputs)


def transposed_convolution(
    inputs: int,
    outputs: int,
    kernel: Sequence[int],
    positions: Sequence[int],
    output_positions: Sequence[int],
    *,
    groups: int = 1,
    bias: bool = True,
    batch: int = 1,
) -> Cost:
    """Return the cost of a transposed convolution, which multiplies every *input* position with the whole kernel.

    Products that padding cuts off the output count: the kernels compute them.

    Source: Dumoulin and Visin 2016, section 4: the backward pass of a convolution from the output to the input.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        kernel: Kernel size along each axis.
        positions: Input size along each axis.
        output_positions: Output size along each axis, where the bias is added.
        groups: Groups.
        bias: Whether each output channel has a bias.
        batch: Samples.
    """
    weights = inputs // groups * outputs * math.prod(kernel)
    return Cost(
        weights + bias * outputs,
        batch * math.prod(positions) * weights,
        bias * batch * math.prod(output_positions) * outputs,
    )


def recurrent(
    kind: str, inputs: int, hidden: int, *, steps: int = 1, batch: int = 1, biases: int = 2, directions: int = 1
) -> Cost:
    """Return the cost of one layer of an ``rnn``, ``gru`` or ``lstm``.

    Source: Elman 1990; Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000; Cho et al. 2014. Gates
    without peepholes, each ``W x + U h + b``.

    Args:
        kind: ``rnn`` has one gate block, ``gru`` three, ``lstm`` four.
        inputs: Input width.
        hidden: Hidden width.
        steps: Time steps.
        batch: Sequences.
        biases: Bias vectors per gate block: 2 in PyTorch and cuDNN (one for the input, one for the hidden state), 1 in
            textbooks, 0 without.
        directions: 2 if bidirectional.
    """
    gates = GATES[kind]
    weights = gates * hidden * (inputs + hidden)
    one = Cost(weights + biases * gates * hidden, batch * steps * weights, batch * steps * biases * gates * hidden)
    return one.times(directions)


def attention(
    width: int,
    tokens: int,
    *,
    heads: int,
    kv_heads: int | None = None,
    head_width: int | None = None,
    keys: int | None = None,
    batch: int = 1,
    causal: bool = False,
    bias: bool = True,
) -> Cost:
    """Return the cost of multi-head attention: four projections, scores, and the weighted sum of values.

    Source: Vaswani et al. 2017 (Attention is all you need), section 3.2; multi-query Shazeer 2019, grouped-query Ainslie et
    al. 2023. Causal: Dao 2023 (FlashAttention-2), section 4.1, which halves the pairs; here the diagonal counts whole.

    Args:
        width: Model width.
        tokens: Query tokens.
        heads: Query heads.
        kv_heads: Key and value heads; fewer than ``heads`` in grouped-query attention, 1 in multi-query.
        head_width: Width of a head; ``width / heads`` unless given.
        keys: Key tokens; ``tokens`` unless given.
        batch: Sequences.
        causal: Whether to count only the keys that a query may see; else all of them, as dense kernels compute.
        bias: Whether the projections have biases.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    head_width = width // heads if head_width is None else head_width
    keys = tokens if keys is None else keys
    inner, kv = heads * head_width, kv_heads * head_width
    rows, key_rows = batch * tokens, batch * keys
    projections = (
        linear(width, inner, rows=rows, bias=bias)
        + linear(width, kv, rows=key_rows, bias=bias).times(2)
        + linear(inner, width, rows=rows, bias=bias)
    )
    pairs = tokens * keys if not causal else tokens * (keys - tokens) + tokens * (tokens + 1) // 2
    return projections + Cost(0, 2 * batch * pairs * inner)


def latent_attention(
    width: int,
    tokens: int,
    *,
    heads: int,
    rank: int,
    head_widths: tuple[int, int, int],
    query_rank: int | None = None,
    batch: int = 1,
    causal: bool = False,
) -> Cost:
    """Return the cost of multi-head latent attention without biases, its latents expanded to keys and values of each head.

    The norms of the latents are part of it. Kernels for decoding that multiply latents with queries instead cost otherwise.

    Source: DeepSeek-V2 (DeepSeek-AI 2024), section 2.1 and appendix C.

    Args:
        width: Model width.
        tokens: Tokens.
        heads: Heads.
        rank: Width of the latent of keys and values.
        head_widths: Of the part of queries and keys without positions, of their rotary part, and of values.
        query_rank: Width of the latent of queries; None if they are projected at once.
        batch: Sequences.
        causal: Whether to count only the keys that a query may see.
    """
    plain, rotary, value = head_widths
    rows = batch * tokens

    def project(inputs: int, outputs: int) -> Cost:
        return linear(inputs, outputs, rows=rows, bias=False)

    queries = heads * (plain + rotary)
    if query_rank is None:
        query = project(width, queries)
    else:
        query = project(width, query_rank) + normalisation(query_rank, bias=False) + project(query_rank, queries)
    compressed = project(width, rank + rotary) + normalisation(rank, bias=False)
    expanded = project(rank, heads * (plain + value)) + project(heads * value, width)
    pairs = tokens * (tokens + 1) // 2 if causal else tokens * tokens
    return query + compressed + expanded + Cost(0, batch * pairs * heads * (plain + rotary + value))


def feed_forward(width: int, hidden: int, *, rows: int = 1, gated: bool = False, bias: bool = True) -> Cost:
    """Return the cost of a feed-forward block: two products, three if gated (SwiGLU and its kin).

    Source: Vaswani et al. 2017, section 3.3; gated Shazeer 2020 (GLU variants improve transformer), equation 6.
    """
    up = linear(width, hidden, rows=rows, bias=bias).times(1 + gated)
    return up + linear(hidden, width, rows=rows, bias=bias)


def mixture_of_experts(
    width: int, hidden: int, *, experts: int, chosen: int, rows: int = 1, gated: bool = True, bias: bool = False
) -> Cost:
    """Return the cost of a layer of experts with a linear router, ``chosen`` of which each row goes through.

    Experts that all rows share (DeepSeekMoE, Dai et al. 2024) are a feed-forward block to be added.

    Source: Shazeer et al. 2017 (Outrageously large neural networks), section 2; Jiang et al. 2024 (Mixtral), section 2.1.
    """
    router = linear(width, experts, rows=rows, bias=False)
    one = feed_forward(width, hidden, rows=rows, gated=gated, bias=bias)
    return router + Cost(experts * one.parameters, chosen * one.macs, chosen * one.bias_adds, chosen * one.parameters)


def embedding(entries: int, width: int) -> Cost:
    """Return the cost of a look-up table: parameters, and no arithmetic.

    Source: Bengio et al. 2003 (A neural probabilistic language model), section 2: the rows of its matrix ``C``.
    """
    return Cost(entries * width, 0)


def normalisation(width: int, *, bias: bool = True) -> Cost:
    """Return the parameters of a batch, layer, group or RMS norm (without bias); its arithmetic is no MAC.

    Source: Ioffe and Szegedy 2015; Ba et al. 2016; Wu and He 2018; RMS norm Zhang and Sennrich 2019.
    """
    return Cost(width * (1 + bias), 0)
