"""Spreading a training step over devices: what each still holds, and what communication holds beside.

Each device runs the whole model on its own part of the batch, and holds a share of what the others hold too. The closed forms
are those of Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models (SC 2020), section 5:
with the optimizer's states and master weights (stage 1), then gradients (stage 2), then weights (stage 3) divided by the number
of devices.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from narrowcast.errors import ModelError, choices

__all__ = ["BUCKET", "SHARDINGS", "Sharding", "communication", "largest_unit", "sharding"]

#: Bytes that DistributedDataParallel and ZeRO 1 and 2 send at a time (``bucket_cap_mb`` of PyTorch, 25 MiB).
BUCKET = 25 << 20


class Sharding(NamedTuple):
    """What is divided by the number of devices.

    Args:
        name: What commands take.
        divided: Parts of :data:`narrowcast.accounting.memory.PARTS`.
        copies: Whether all gradients have a copy in buckets that stay.
        bucket: Whether one bucket of gradients is under way at a time.
        gathered: Whether the weights of one unit are gathered from all devices while it runs.
    """

    name: str
    divided: frozenset[str] = frozenset()
    copies: bool = False
    bucket: bool = False
    gathered: bool = False


#: PyTorch's DistributedDataParallel keeps a copy of all gradients in its buckets, unless gradients are views of them.
SHARDINGS: dict[str, Sharding] = {
    entry.name: entry
    for entry in (
        Sharding("replicated", copies=True),
        Sharding("replicated-views"),
        Sharding("zero1", frozenset({"optimizer_state"}), bucket=True),
        Sharding("zero2", frozenset({"optimizer_state", "gradients"}), bucket=True),
        Sharding("zero3", frozenset({"optimizer_state", "gradients", "weights", "master"}), gathered=True),
    )
}


def sharding(name: str) -> Sharding:
    """Return a way of sharding by its name.

    Raises:
        ModelError: There is none of that name.
    """
    key = name.strip().casefold().replace("_", "-").replace("zero-", "zero")
    if key not in SHARDINGS:
        raise ModelError(f"sharding {name!r} is unknown", allowed=choices(key, SHARDINGS))
    return SHARDINGS[key]


def communication(how: Sharding, devices: int, gradients: int, unit: int) -> int:
    """Return the bytes that communication holds on each device.

    Args:
        how: The way of sharding.
        devices: Devices.
        gradients: Bytes of all gradients.
        unit: Bytes of the weights of the largest unit, see :func:`largest_unit`.
    """
    if devices == 1:
        return 0
    return how.copies * gradients + how.bucket * min(BUCKET, gradients) + how.gathered * unit


def largest_unit(module: nn.Module, bytes_per_number: int) -> int:
    """Return the bytes of the weights that are gathered at once: the largest block, or all that is in none.

    Blocks are the children of module lists, as wrapping policies choose them.
    """
    blocks = [child for part in module.modules() if isinstance(part, nn.ModuleList | nn.Sequential) for child in part]
    inside = {id(tensor) for block in blocks for tensor in block.parameters()}
    sizes = [sum(tensor.numel() for tensor in block.parameters()) for block in blocks]
    rest = sum(tensor.numel() for tensor in module.parameters() if id(tensor) not in inside)
    return max([rest, *sizes]) * bytes_per_number
