"""The largest batch that fits a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from narrowcast.accounting.memory import Buildable, memory
from narrowcast.errors import ModelError

__all__ = ["largest_batch"]

_FIRST = 2  # normalisation over a batch of one cannot be trained
_MOST = 1 << 20


def largest_batch(source_of: Callable[[int], Buildable], device_bytes: int, **setting: Any) -> int:
    """Return the most samples that a device holds at a time.

    Memory grows with the batch almost like a line, so that two traced runs tell where to look; the answer fits, and one
    sample more does not, both by runs traced at those batches.

    Args:
        source_of: Gives the model with inputs of so many samples.
        device_bytes: Bytes that the run may take. What the driver and fragmentation take is not part of it.
        setting: What :func:`narrowcast.accounting.memory.memory` takes.

    Returns:
        The batch; 0 if not even one sample fits.

    Raises:
        ModelError: As for ``memory``; or memory does not grow with the batch.
    """
    found: dict[int, int] = {}

    def peak(batch: int) -> int:
        if batch not in found:
            found[batch] = memory(source_of(batch), **setting).peak
        return found[batch]

    if peak(_FIRST) > device_bytes:
        return int(_fits_one(peak, device_bytes))
    fits, too_many = _FIRST, _MOST
    step = 2 * _FIRST
    while fits + 1 < too_many:
        guess = min(max(step, fits + 1), too_many - 1)
        if peak(guess) <= device_bytes:
            fits = guess
        else:
            too_many = guess
        step = _crossing(found, device_bytes, fits, too_many)
    if too_many == _MOST:
        raise ModelError(
            f"{_MOST} samples still fit {device_bytes} bytes",
            next_step="see that the source's inputs grow with the batch",
        )
    return fits


def _fits_one(peak: Callable[[int], int], device_bytes: int) -> bool:
    try:
        return peak(1) <= device_bytes
    except ModelError:
        return False


def _crossing(found: dict[int, int], device_bytes: int, fits: int, too_many: int) -> int:
    """Return where the line through the two runs nearest to the limit crosses it."""
    low, high = sorted(sorted(found, key=lambda batch: abs(found[batch] - device_bytes))[:2])
    slope = (found[high] - found[low]) / (high - low) if high > low else 0
    if slope <= 0:
        return (fits + too_many) // 2
    return int(low + (device_bytes - found[low]) / slope)
