"""One pass over the calibration samples: statistics of every tensor, in memory that does not grow with the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrowcast.data.dataset import Dataset, Tensors
from narrowcast.models.execution import StagedExecutor
from narrowcast.transforms.ranges import TensorStatistics

__all__ = ["calibrate", "live_bytes", "sample_batch", "spread", "walk_samples"]

#: Samples that run through the graph at once.
BATCH = 8
#: Bytes that samples may take that go through the graph together.
WALK_BYTES = 500_000_000


def calibrate(
    executor: StagedExecutor, data: Dataset, tensors: Iterable[str], progress: Callable[[int], None] | None = None
) -> dict[str, TensorStatistics]:
    """Return the statistics of some tensors over all samples of a dataset.

    Args:
        executor: The FP32 graph, cut so that each wanted tensor is an input or output of a stage.
        data: Calibration samples.
        tensors: Names of FP32 tensors.
        progress: Called with the number of samples done.
    """
    statistics = {name: TensorStatistics() for name in tensors}
    for indices, feeds in data.batches(BATCH):
        _update(statistics, feeds)
        for index, alive in executor.walk(feeds):
            _update(statistics, {name: alive[name] for name in executor.stages[index].outputs})
        if progress is not None:
            progress(int(indices[-1]) + 1)
    return statistics


def _update(statistics: dict[str, TensorStatistics], values: Tensors) -> None:
    for name in statistics.keys() & values.keys():
        array = values[name]
        statistics[name].update(array, channel_axis=None if array.ndim < 2 else (1 if array.ndim > 3 else -1))


def live_bytes(executor: StagedExecutor, sample: Tensors) -> int:
    """Return the most bytes of tensors alive at once while one sample runs through the stages."""
    return max((sum(value.nbytes for value in alive.values()) for _, alive in executor.walk(sample)), default=1)


def walk_samples(executor: StagedExecutor, data: Dataset, most: int) -> Tensors:
    """Return at most so many samples, spread evenly, as fit in memory with two values of all tensors alive together."""
    fitting = int(WALK_BYTES / (2 * live_bytes(executor, sample_batch(data, 1))))
    return sample_batch(data, max(2, min(most, data.size, fitting)))


def spread(size: int, count: int) -> NDArray[np.int64]:
    """Return at most so many places, spread evenly from the first to the last of a number of samples."""
    return np.unique(np.linspace(0, size - 1, min(count, size)).astype(np.int64))


def sample_batch(data: Dataset, count: int) -> dict[str, NDArray[Any]]:
    """Return samples spread evenly over a dataset, as one batch."""
    return data.load(spread(data.size, count))
