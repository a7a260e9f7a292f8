"""A batch that does not fit memory: what it was estimated to need, and the largest one that fits."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from narrowcast.accounting.capacity import largest_batch
from narrowcast.accounting.memory import memory
from narrowcast.accounting.sources import Source
from narrowcast.errors import NarrowcastError, TrainingError
from narrowcast.models.loaders import fresh_module
from narrowcast.models.runs import Architecture
from narrowcast.training.config import Config, Sgd
from narrowcast.training.distributed import Ranks

__all__ = ["answered", "is_shortage", "shortage"]

#: The accounting's names of what training calls differently.
_POLICIES = {"tf32": "fp32", "bf16-true": "bf16"}
_GIGA = 1e9


@contextmanager
def answered(config: Config, architecture: Architecture, ranks: Ranks) -> Generator[None]:
    """Turn what PyTorch says when memory is missing into an answer, see :func:`shortage`.

    Raises:
        TrainingError: Memory is missing.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        problem = shortage(config, architecture, ranks)
        raise problem from error


def is_shortage(error: BaseException) -> bool:
    """Return whether an error says that memory is missing, on a GPU or for the CPU's allocator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "not enough memory" in text)


def shortage(config: Config, architecture: Architecture, ranks: Ranks) -> TrainingError:
    """Return the error for a batch that does not fit, with the accounting's estimate where it can follow the network.

    Args:
        config: Of the run.
        architecture: The network.
        ranks: The processes that share a batch, and this one's device.
    """
    device, world = ranks.device, ranks.world
    there = _memory_of(device)
    what = f"a batch of {config.batch} does not fit the memory of {device.type} ({there / _GIGA:.1f} GB)"
    samples = -(-config.batch // world)
    next_step = "train with a smaller batch, and with accumulate to keep the step's samples: --set batch=N"
    try:
        estimate = memory(_source(architecture, samples), **_setting(config, device))
        most = largest_batch(lambda batch: _source(architecture, batch), there, **_setting(config, device)) * world
    except (NarrowcastError, RuntimeError) as error:
        reason = error.what if isinstance(error, NarrowcastError) else type(error).__name__
        return TrainingError(what, allowed=f"a smaller one; no estimate: {reason}", next_step=next_step)
    what += f"; it is estimated to need {estimate.peak / _GIGA:.1f} GB, the most at {estimate.when}"
    if most < 1:
        return TrainingError(
            what,
            allowed="nothing: not even one sample fits",
            next_step="take a smaller network, or shard it over several devices: --set ranks=sharded",
        )
    return TrainingError(
        what,
        allowed=f"batches up to {most} samples, by the same estimate",
        next_step=f"--set batch={min(most, config.batch)} --set accumulate={-(-config.batch * config.accumulate // most)}",
    )


def _source(architecture: Architecture, samples: int) -> Source:
    made = fresh_module(architecture)
    examples = [(tuple(example.shape[1:]), example.dtype) for example in made.examples]
    build: Callable[[], torch.nn.Module] = lambda: fresh_module(architecture).module  # noqa: E731
    return Source(
        architecture.name,
        build,
        lambda: tuple(torch.empty((samples, *shape), dtype=dtype) for shape, dtype in examples),
    )


def _setting(config: Config, device: torch.device) -> dict[str, Any]:
    name = config.precision.name
    optimizer = config.optimizer.name
    if isinstance(config.optimizer, Sgd) and config.optimizer.momentum:
        optimizer = "momentum"
    return {
        "policy": _POLICIES.get(name, name),
        "mode": "train",
        "optimizer": optimizer,
        "accumulate": config.accumulate,
        "device": device.type,
        "capability": torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0),
    }


def _memory_of(device: torch.device) -> int:
    """Return the bytes that this process may take: what is free, and on a GPU what it holds already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return int(psutil.virtual_memory().available)
