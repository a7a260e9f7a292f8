"""What sort of work an operator does: the few words that the roofline, the advice and the reports share.

PyTorch's operators and ONNX's are told apart by their names elsewhere; from here on there is one vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from narrowcast.accounting.counting import MOVES, REDUCTIONS

__all__ = ["Kind", "attributes_of", "kind_of"]


class Kind(StrEnum):
    """Sorts of operators, by how their time depends on the device."""

    CONVOLUTION = "convolution"
    DEPTHWISE = "depthwise convolution"
    PRODUCT = "matrix product"  # with weights or between activations
    ATTENTION = "attention"  # one fused kernel
    RECURRENT = "recurrent layer"  # one fused kernel
    NORMALISATION = "normalisation"
    SOFTMAX = "softmax"
    ELEMENTWISE = "elementwise"
    REDUCTION = "reduction"
    POOLING = "pooling"
    MOVE = "data movement"  # copies, gathers, padding, embeddings
    VIEW = "view"  # another shape of the same bytes; costs nothing


# By parts of ATen names; the first that fits.
_NAMES: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    (Kind.CONVOLUTION, ("convolution", "conv1d", "conv2d", "conv3d")),
    (Kind.ATTENTION, ("scaled_dot_product", "flex_attention")),
    (Kind.RECURRENT, ("mkldnn_rnn", "_cudnn_rnn", "_thnn_fused")),
    (Kind.NORMALISATION, ("batch_norm", "layer_norm", "group_norm", "rms_norm")),
    (Kind.SOFTMAX, ("softmax",)),
    (Kind.POOLING, ("pool",)),
    (Kind.MOVE, ("embedding", "im2col", "col2im", "grid_sampler", "upsample")),
)
_PRODUCTS = frozenset(
    """
    mm addmm bmm baddbmm addbmm mv dot vdot addmv _int_mm _scaled_mm _grouped_mm _scaled_grouped_mm _trilinear
    _euclidean_dist linear_dynamic
    """.split()  # noqa: SIM905
)


def kind_of(name: str, attributes: Mapping[str, Any], *, view: bool = False) -> Kind:
    """Return the sort of an ATen operator.

    Args:
        name: Its ATen name without overload.
        attributes: As :func:`attributes_of` gives them.
        view: Whether it makes another shape of the same bytes.
    """
    if view:
        return Kind.VIEW
    if name in _PRODUCTS:
        return Kind.PRODUCT
    for kind, parts in _NAMES:
        if any(part in name for part in parts):
            depthwise = kind is Kind.CONVOLUTION and 1 < attributes.get("groups", 1) == attributes.get("inputs")
            return Kind.DEPTHWISE if depthwise else kind
    if name in MOVES:
        return Kind.MOVE
    return Kind.REDUCTION if name.removesuffix("_") in REDUCTIONS else Kind.ELEMENTWISE


def attributes_of(name: str, args: Sequence[Any]) -> dict[str, Any]:
    """Return what its shapes do not say of an ATen operator.

    Returns:
        For a convolution ``inputs`` and ``outputs`` (channels), ``kernel``, ``stride``, ``dilation``, ``groups``,
        ``transposed``; for all others nothing.
    """
    if name == "deform_conv2d":
        weight, stride, dilation, groups = args[1], args[5:7], args[9:11], args[11]
        return _convolution(weight, stride, dilation, groups=groups, transposed=False)
    if name not in ("convolution", "convolution_backward"):
        return {}
    place = 1 if name == "convolution" else 2
    weight = args[place]
    stride, _, dilation, transposed, _, groups = args[place + 2 : place + 8]
    return _convolution(weight, stride, dilation, groups=groups, transposed=transposed)


def _convolution(
    weight: Any, stride: Sequence[int], dilation: Sequence[int], *, groups: int, transposed: bool
) -> dict[str, Any]:
    own, per_group, *kernel = weight.shape
    inputs, outputs = (own, per_group * groups) if transposed else (per_group * groups, own)
    return {
        "inputs": int(inputs),
        "outputs": int(outputs),
        "kernel": tuple(int(size) for size in kernel),
        "stride": tuple(stride),
        "dilation": tuple(dilation),
        "groups": int(groups),
        "transposed": bool(transposed),
    }
