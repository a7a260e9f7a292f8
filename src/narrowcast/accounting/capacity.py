"""The largest batch that fits a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

from narrowcast.accounting.memory import Buildable, MemoryOptions, memory
from narrowcast.errors import ModelError

__all__ = ["largest_batch"]

_FIRST = 2  # normalisation over a batch of one cannot be trained
_MOST = 1 << 20


def largest_batch(source_of: Callable[[int], Buildable], device_bytes: int, **options: Unpack[MemoryOptions]) -> int:
    """Return the most samples that a device holds at a time.

    Memory grows with the batch almost like a line, so that two traced runs tell where to look; the answer fits, and one
    sample more does not, both by runs traced at those batches.

    Args:
        source_of: Gives the model with inputs of so many samples.
        device_bytes: Bytes that the run may take. What the driver and fragmentation take is not part of it.
        options: As :func:`narrowcast.accounting.memory.memory` takes them.

    Returns:
        The batch; 0 if not even one sample fits.

    Raises:
        ModelError: As for ``memory``; or memory does not grow with the batch.
    """
    found: dict[int, int] = {}

    def peak(batch: int) -> int:
        if batch not in found:
            found[batch] = memory(source_of(batch), **options).peak
        return found[batch]

    if peak(_FIRST) > device_bytes:
        return int(_fits_one(peak, device_bytes))
    before, fits, too_many, turn = 0, _FIRST, _MOST, 0
    while fits + 1 < too_many:
        if too_many == _MOST:
            line = _crossing(found, device_bytes, before, fits)
            guess = min(max(line, 2 * fits), _MOST - 1)
        elif turn % 3 == 2:  # where memory bends, lines would creep
            guess = (fits + too_many) // 2
        else:
            guess = min(max(_crossing(found, device_bytes, fits, too_many), fits + 1), too_many - 1)
        if peak(guess) <= device_bytes:
            before, fits = fits, guess
        else:
            too_many = guess
        turn += 1
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


def _crossing(found: dict[int, int], device_bytes: int, low: int, high: int) -> int:
    """Return where the line through two batches crosses the limit; the lower one if it is flat or unknown."""
    if low not in found or found[high] <= found[low]:
        return low
    return low + int((device_bytes - found[low]) * (high - low) / (found[high] - found[low]))
