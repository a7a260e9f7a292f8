"""Bytes of weights in weight-only formats, scales included."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from narrowcast.accounting.policies import Policy
from narrowcast.formats.blocks import BlockFormat
from narrowcast.formats.table import get

__all__ = ["Packing", "packed_sizes"]

_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Packing:
    """Elements that share a scale.

    Args:
        scale: The scales' format.
        block: Elements of a block; None for one scale to each output channel.
        by_row: Whether blocks end with the row of an output channel, rather than going on through the whole tensor.
        scale_block: Elements of a block of scales, if the scales themselves are quantised to 8 bits.
    """

    scale: str
    block: int | None = None
    by_row: bool = False
    scale_block: int | None = None

    def bytes(self, format: str, rows: int, columns: int) -> int:
        """Return what ``rows * columns`` weights take, with their scales."""
        elements = math.ceil(rows * columns * _bits(format) / 8)
        if self.block is None:
            scales = rows
        elif self.by_row:
            scales = rows * math.ceil(columns / self.block)
        else:
            scales = math.ceil(rows * columns / self.block)
        scale_bytes = _bits(self.scale) // 8
        if self.scale_block is None:
            return elements + scales * scale_bytes
        return elements + scales + math.ceil(scales / self.scale_block) * scale_bytes


def _bits(format: str) -> int:
    found = get(format)
    return found.element.bits if isinstance(found, BlockFormat) else found.bits


#: INT8 as LLM.int8() and most runtimes keep it, INT4 as GPTQ and AWQ, NF4 as QLoRA (Dettmers et al. 2023, section 3), where
#: double quantisation keeps the scales in 8 bits with an FP32 scale for each 256 of them.
_PACKINGS = {
    ("int8", False): Packing("fp32"),
    ("int4", False): Packing("fp16", block=128, by_row=True),
    ("nf4", False): Packing("fp32", block=64),
    ("nf4", True): Packing("fp32", block=64, scale_block=256),
}


def packed_sizes(module: nn.Module, policy: Policy) -> dict[int, int]:
    """Return the bytes of the weights that a policy packs, by their tensors' ids.

    Weights of linear layers and convolutions are packed; one that an embedding shares is not, since it is looked up too.
    """
    packing = _PACKINGS.get((policy.weights, policy.double_quantised))
    if packing is None:
        return {}
    parts = list(module.modules())
    looked_up = {id(part.weight) for part in parts if isinstance(part, nn.Embedding)}
    sizes: dict[int, int] = {}
    for part in parts:
        if isinstance(part, _PRODUCTS) and id(part.weight) not in looked_up:
            rows, *columns = part.weight.shape
            sizes[id(part.weight)] = packing.bytes(policy.weights, rows, math.prod(columns))
    return sizes
