"""Closed forms: what a layer of given sizes costs. A traced count equals them, and the tests hold it to that.

Conventions, everywhere in this package: one MAC is one multiplication and one addition, so ``flops = 2 * macs``; the
additions of a bias are counted apart (``bias_adds``), as are elementwise operations, normalisation and softmax
(``other_flops``). With a bias, the additions of a dot product and of its bias together equal the multiplications.
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
    "kv_cache_bytes",
    "linear",
    "mixture_of_experts",
    "normalisation",
    "recurrent",
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
    """Return the cost of ``y = W x + b`` on ``rows`` vectors."""
    return Cost(inputs * outputs + bias * outputs, rows * inputs * outputs, bias * rows * outputs)


def convolution_output(
    size: int, kernel: int, *, stride: int = 1, padding: int = 0, dilation: int = 1, transposed: bool = False
) -> int:
    """Return the length of a convolution's output along one axis (no output padding)."""
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
    transposed: bool = False,
) -> Cost:
    """Return the cost of a convolution.

    Every output position takes ``inputs / groups * prod(kernel)`` MACs in each output channel. A transposed convolution
    spreads every *input* position instead, which is what ``positions`` counts then. Dilation and stride change the
    positions, not the work at each.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        kernel: Kernel size along each axis.
        positions: Output size along each axis; input size if transposed.
        groups: Groups; ``inputs`` of them make a depthwise convolution.
        bias: Whether each output channel has a bias.
        batch: Samples.
        transposed: Whether it is a transposed convolution, without stride or padding cutting its output.
    """
    weights = inputs // groups * outputs * math.prod(kernel)
    return Cost(
        weights + bias * outputs,
        batch * weights * math.prod(positions),
        bias * batch * outputs * (0 if transposed else math.prod(positions)),
    )


def recurrent(
    kind: str, inputs: int, hidden: int, *, steps: int = 1, batch: int = 1, biases: int = 2, directions: int = 1
) -> Cost:
    """Return the cost of one layer of an ``rnn``, ``gru`` or ``lstm``.

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


def feed_forward(width: int, hidden: int, *, rows: int = 1, gated: bool = False, bias: bool = True) -> Cost:
    """Return the cost of a feed-forward block: two products, three if gated (SwiGLU and its kin)."""
    up = linear(width, hidden, rows=rows, bias=bias).times(1 + gated)
    return up + linear(hidden, width, rows=rows, bias=bias)


def mixture_of_experts(
    width: int, hidden: int, *, experts: int, chosen: int, rows: int = 1, gated: bool = True, bias: bool = False
) -> Cost:
    """Return the cost of a layer of experts with a linear router, ``chosen`` of which each row goes through."""
    router = linear(width, experts, rows=rows, bias=False)
    one = feed_forward(width, hidden, rows=rows, gated=gated, bias=bias)
    return router + Cost(experts * one.parameters, chosen * one.macs, chosen * one.bias_adds, chosen * one.parameters)


def embedding(entries: int, width: int) -> Cost:
    """Return the cost of a look-up table: parameters, and no arithmetic."""
    return Cost(entries * width, 0)


def normalisation(width: int, *, bias: bool = True) -> Cost:
    """Return the parameters of a batch, layer, group or RMS norm (without bias); its arithmetic is no MAC."""
    return Cost(width * (1 + bias), 0)


def kv_cache_bytes(
    layers: int,
    kv_heads: int,
    head_width: int,
    tokens: int,
    *,
    batch: int = 1,
    bytes_per_number: float = 2,
    window: int | None = None,
    latent_width: int | None = None,
) -> float:
    """Return the bytes that keys and values of past tokens take.

    Args:
        layers: Attention layers.
        kv_heads: Key and value heads: all heads, the groups of grouped-query attention, or 1 in multi-query.
        head_width: Width of a head.
        tokens: Tokens in the cache.
        batch: Sequences.
        bytes_per_number: 2 for FP16 and BF16, 1 for FP8.
        window: Tokens that sliding-window attention keeps at most.
        latent_width: Width of the compressed latent (its decoupled rotary part included) that latent attention keeps
            in place of keys and values.
    """
    kept = min(tokens, window) if window else tokens
    numbers = latent_width if latent_width else 2 * kv_heads * head_width
    return layers * batch * kept * numbers * bytes_per_number
