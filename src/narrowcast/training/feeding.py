"""Batches of a data reference: the three parts, the order by seed, any place of it, and what images go through.

The whole stream follows from the seed: batch number n is the same whether or not training was interrupted before it, and
however many processes share it. So the position of the data is one number.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from narrowcast.data.dataset import Dataset, split
from narrowcast.data.loaders import load_data
from narrowcast.errors import ConfigError, DataError, TrainingError, choices
from narrowcast.models.reference import Model
from narrowcast.training.config import Augment, Data
from narrowcast.training.distributed import Ranks

__all__ = ["Batch", "Feeder", "Parts", "parts_of"]

Indices = NDArray[np.int64]


class Parts(NamedTuple):
    """What is trained on, what validates, and what is reported; the last is never trained on."""

    train: Dataset
    validation: Dataset | None
    report: Dataset


class Batch(NamedTuple):
    """Samples for one forward pass, on the device.

    Attributes:
        inputs: Arguments of the network: one tensor, or a tuple of them in its order, each ``[N, ...]``.
        targets: What the loss compares with, ``[N, ...]``.
        samples: Which samples of the part they are, int64 ``[N]``, on the CPU.
    """

    inputs: torch.Tensor | tuple[torch.Tensor, ...]
    targets: torch.Tensor
    samples: torch.Tensor


def parts_of(settings: Data, model: Model) -> Parts:
    """Return the three parts of the data.

    Args:
        settings: References. Without one of the report part, the samples are split as ``narrowcast optimize`` splits them.
        model: What the samples have to fit.

    Raises:
        DataError: Data cannot be read, do not fit, lack targets, or the report part is what is trained on.
    """
    train = load_data(settings.train, model)
    if settings.report is None:
        shares = split(train, settings.split_seed)
        parts = Parts(shares.calibration, shares.search, shares.report)
    else:
        report = load_data(settings.report, model)
        validation = None if settings.validation is None else load_data(settings.validation, model)
        _check_apart(train, report, "reported")
        if validation is not None:
            _check_apart(train, validation, "validated on")
        parts = Parts(train, validation, report)
    for part in parts:
        if part is not None:
            _check_targets(part, settings.targets)
    return parts


class Feeder:
    """Batches of a part.

    Args:
        data: The part.
        names: The network's inputs, in its order.
        targets: ``labels``, or the name of an array of the data.
        size: Samples of a batch, over all processes.
        seed: Seed of order and augmentation.
        augment: What images go through.
        ranks: The processes that share batches, and this one's device.

    Raises:
        ConfigError: The batch is larger than the part, or cannot be shared by the processes, or inputs are no images.
    """

    def __init__(
        self, data: Dataset, names: list[str], targets: str, *, size: int, seed: int, augment: Augment, ranks: Ranks
    ) -> None:
        if size > data.size:
            raise ConfigError(
                f"batch = {size}, and {data.source} has {data.size} samples to train on",
                allowed=f"1 to {data.size}",
                next_step=f"--set batch={data.size}",
            )
        if size % ranks.world:
            raise ConfigError(
                f"batch = {size} for {ranks.world} processes",
                allowed=f"a multiple of {ranks.world}: the batch is shared by all",
                next_step=f"--set batch={max(size // ranks.world, 1) * ranks.world}",
            )
        self.data = data
        self.size = size
        self.per_epoch = data.size // size
        self._names = names
        self._targets = targets
        self._seed = seed
        self._augment = augment
        self._ranks = ranks
        self._order: tuple[int, Indices] = (-1, np.empty(0, np.int64))
        if augment != Augment():
            _check_images(data, names, augment)

    def indices(self, number: int) -> Indices:
        """Return which samples batch ``number`` holds, of all processes; each epoch leaves out what fills no batch."""
        epoch, place = divmod(number, self.per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self._seed, epoch]).permutation(self.data.size))
        return self._order[1][place * self.size : (place + 1) * self.size]

    def batch(self, number: int) -> Batch:
        """Return this process's share of batch ``number``, on the device.

        Raises:
            TrainingError: The data end before their size is reached.
        """
        wanted = self.indices(number)
        share = self.size // self._ranks.world
        mine = slice(self._ranks.rank * share, (self._ranks.rank + 1) * share)
        arrays = load(self.data, wanted[mine], f"batch {number}")
        if self._augment != Augment():
            rng = np.random.default_rng([self._seed, 1, number])
            name = self._names[0]
            arrays[name] = augmented(arrays[name], self._augment, rng, len(wanted), mine)
        return on_device(self.data, arrays, self._names, self._targets, wanted[mine], self._ranks.device)

    def batches(self, first: int, end: int | None) -> Generator[Batch]:
        """Yield batches ``first`` to ``end - 1``, or without end; the next one is loaded while one is computed with."""
        numbers = itertools.count(first) if end is None else range(first, end)
        with ThreadPoolExecutor(1, thread_name_prefix="data") as thread:
            coming: Future[Batch] | None = None
            for number in numbers:
                following = thread.submit(self.batch, number)
                if coming is not None:
                    yield coming.result()
                coming = following
            if coming is not None:
                yield coming.result()


def in_order(data: Dataset, names: list[str], targets: str, *, size: int, device: torch.device) -> Iterator[Batch]:
    """Yield all samples of a part in order, the last batch as it comes."""
    for start in range(0, data.size, size):
        wanted = np.arange(start, min(start + size, data.size), dtype=np.int64)
        yield on_device(data, load(data, wanted, f"samples from {start}"), names, targets, wanted, device)


def load(data: Dataset, wanted: Indices, what: str) -> dict[str, NDArray[Any]]:
    """Return samples, and make sure that they are as many as were asked for.

    Raises:
        TrainingError: They are not: the data end early, or say a size that they do not have.
    """
    try:
        arrays = data.load(wanted)
    except (IndexError, StopIteration, EOFError, OSError) as error:
        raise TrainingError(
            f"{data.source} fails at {what}: {type(error).__name__}: {error}",
            allowed=f"all of the {data.size} samples that it says it has",
            next_step="mend the data; --resume then goes on from the last checkpoint",
        ) from error
    short = next((name for name, array in arrays.items() if len(array) != len(wanted)), None)
    if short is not None:
        raise TrainingError(
            f"{data.source} ends early: at {what} it gave {len(arrays[short])} of {len(wanted)} samples of {short!r}",
            allowed=f"all of the {data.size} samples that it says it has",
            next_step="mend the data; --resume then goes on from the last checkpoint",
        )
    return dict(arrays)


def on_device(
    data: Dataset,
    arrays: dict[str, NDArray[Any]],
    names: list[str],
    targets: str,
    wanted: Indices,
    device: torch.device,
) -> Batch:
    """Return arrays as a batch."""
    if targets == "labels":
        assert data.labels is not None
        target = data.labels[wanted]
    else:
        target = arrays[targets]
    moved = [_moved(array, device) for array in (*(arrays[name] for name in names), target)]
    inputs = moved[0] if len(names) == 1 else tuple(moved[:-1])
    return Batch(inputs, moved[-1], torch.from_numpy(wanted))


def augmented(
    images: NDArray[Any], augment: Augment, rng: np.random.Generator, whole: int, mine: slice
) -> NDArray[Any]:
    """Return images after random shifts, mirroring and noise.

    Draws are made for the whole batch, so that each sample gets its own whoever computes it.

    Args:
        images: This process's share, ``[N, C, H, W]``.
        augment: What is done.
        rng: Of this batch.
        whole: Samples of the batch over all processes.
        mine: Which of them the images are.
    """
    if augment.shift:
        shifts = rng.integers(-augment.shift, augment.shift + 1, (whole, 2))[mine]
        images = np.stack([_shifted(image, *shift) for image, shift in zip(images, shifts, strict=True)])
    if augment.flip:
        mirrored = rng.random(whole)[mine] < 0.5
        images = np.where(mirrored[:, None, None, None], images[..., ::-1], images)
    if augment.noise:
        noise = rng.standard_normal((whole, *images.shape[1:]), np.float32)[mine]
        images = images + np.float32(augment.noise) * noise
    return np.ascontiguousarray(images)


def _shifted(image: NDArray[Any], down: int, right: int) -> NDArray[Any]:
    """Return an image ``[C, H, W]`` moved by whole pixels, with zeros where nothing is known."""
    moved = np.zeros_like(image)
    height, width = image.shape[1:]
    rows, columns = slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), width + min(right, 0))
    from_rows, from_columns = (
        slice(max(-down, 0), height + min(-down, 0)),
        slice(max(-right, 0), width + min(-right, 0)),
    )
    moved[:, rows, columns] = image[:, from_rows, from_columns]
    return moved


def _moved(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _check_apart(train: Dataset, other: Dataset, use: str) -> None:
    if train.sha256 == other.sha256:
        raise DataError(
            f"{other.source} is {use}, and trained on as well",
            allowed="samples that are not trained on",
            next_step="leave data.report out, and data.train is split in three",
        )


def _check_targets(data: Dataset, targets: str) -> None:
    if targets == "labels":
        if data.labels is None:
            raise DataError(
                f"{data.source} has no labels",
                allowed="data with labels, or data.targets: the name of an array of the data",
                next_step="add the array 'labels', or set data.targets",
            )
        return
    arrays = data.load(np.zeros(1, np.int64))
    if targets not in arrays:
        raise DataError(
            f"{data.source} has no array {targets!r} (data.targets)", allowed=choices(targets, [*arrays, "labels"])
        )


def _check_images(data: Dataset, names: list[str], augment: Augment) -> None:
    sample = data.load(np.zeros(1, np.int64))[names[0]]
    needs = 4 if augment.shift or augment.flip else 0
    if (needs and sample.ndim != needs) or sample.dtype.kind != "f":
        raise ConfigError(
            f"data.augment with {data.source}, whose {names[0]!r} is {sample.dtype} {list(sample.shape[1:])}",
            allowed="images [channels, height, width] of floating-point numbers",
            next_step="leave data.augment out",
        )
