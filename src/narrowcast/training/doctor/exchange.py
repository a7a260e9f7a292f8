"""Texts between ranks, as bytes in tensors."""

from __future__ import annotations

import torch
import torch.distributed as dist

__all__ = ["gather", "ranks"]


def ranks() -> int:
    """Return how many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(text: str, device: torch.device) -> list[str]:
    """Return every rank's text, in order of ranks; every rank has to call it.

    Args:
        text: This rank's.
        device: Of the model: where the group's backend takes tensors from, if it is not gloo.
    """
    world = ranks()
    if world == 1:
        return [text]
    place = torch.device("cpu") if dist.get_backend() == "gloo" else device
    data = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8).to(place)
    sizes = [torch.zeros((), dtype=torch.int64, device=place) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor(data.numel(), dtype=torch.int64, device=place))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=place)
    padded[: data.numel()] = data
    parts = [torch.zeros_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return [
        bytes(part[: int(size)].cpu().tolist()).decode().rstrip("\0") for part, size in zip(parts, sizes, strict=True)
    ]
