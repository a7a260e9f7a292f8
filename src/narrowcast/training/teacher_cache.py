"""What a teacher says of every sample of a data set, once and for all, on disk.

A teacher that is larger than its student costs most of a distillation's time, and says the same in each epoch as long as the
inputs are the same. The cache asks it once, sample by sample in order, and gives the answers back by sample index::

    distillation.cache = TeacherCache.fill(
        folder, distillation, data=CachedData(sha256, size, lambda index: images[index], augmentation=""),
    )
    trainer.step(distillation.batch(images[index], labels[index], index))

In ``folder`` there is a folder for each teacher and data set, named by a hash over both: ``cache.json`` says what it is, and
``00000.safetensors`` and so on hold the outputs of `SHARD` samples each. Every file is written beside its place and renamed, so
a run that is killed leaves whole shards; the next one asks the teacher for those that are missing.

An augmented sample is not the sample that the teacher was asked about, so a cache is refused where data are augmented; and
since a loop of one's own may do that unsaid, each shard keeps a fingerprint of its inputs, which the first batches are held
against.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from narrowcast.errors import TrainingError
from narrowcast.training.distillation import Taught
from narrowcast.training.features import Inputs, first, tensors
from narrowcast.training.writing import written

if TYPE_CHECKING:
    from narrowcast.training.distillation import Distillation

__all__ = ["SHARD", "CachedData", "TeacherCache", "check_augmentation", "fingerprint", "teacher_hash"]

#: Samples of a file.
SHARD = 1024

_VERSION = 1  # of the layout
_CHECKED = 16  # batches whose inputs are held against the fingerprints
_TOLERANCE = 1e-3  # relative: inputs that were scaled on another device differ in their last bits


@dataclass(frozen=True)
class CachedData:
    """The samples that a teacher is asked about.

    Args:
        sha256: Hash over the samples, or over what decides them: `narrowcast.data.dataset.Dataset.sha256`.
        size: Number of samples.
        inputs: From sample indices, int64 [N], to the networks' inputs, on the teacher's device.
        augmentation: What is done to the inputs in training, in words; empty for nothing.
    """

    sha256: str
    size: int
    inputs: Callable[[Tensor], Inputs]
    augmentation: str = ""


class TeacherCache:
    """The outputs of a teacher by sample index; made by `fill`."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.size = size
        self._shards: dict[int, dict[str, Tensor]] = {}
        self._left = _CHECKED

    @classmethod
    def fill(
        cls,
        folder: str | Path,
        distillation: Distillation,
        data: CachedData,
        *,
        batch: int = 256,
        note: Callable[[int, int], None] = lambda done, size: None,
    ) -> TeacherCache:
        """Return the cache of a teacher's outputs, after asking the teacher for the samples that are not in it.

        Args:
            folder: Where caches lie; it is made if it is not there.
            distillation: Whose teacher is asked, in its precision, for its outputs and the features that are compared.
            data: The samples.
            batch: Samples that the teacher is asked about at a time.
            note: Called with how many samples of how many are there, after each file.

        Raises:
            TrainingError: The data are augmented, or the teacher's answer to a sample is not finite.
            OutputError: The folder cannot be written.
        """
        check_augmentation(data.augmentation)
        about = {
            "version": _VERSION,
            "teacher": teacher_hash(distillation.teacher),
            "precision": distillation.precision.name,
            "features": [item.teacher for item in distillation.features],
            "data": data.sha256,
            "size": data.size,
            "shard": SHARD,
        }
        place = Path(folder) / hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
        with written(f"the teacher's outputs in {place}"):
            place.mkdir(parents=True, exist_ok=True)
            _write(place / "cache.json", json.dumps(about, indent=1).encode())
            for number, start in enumerate(range(0, data.size, SHARD)):
                index = torch.arange(start, min(start + SHARD, data.size))
                file = place / f"{number:05}.safetensors"
                if not _whole(file, len(index)):
                    _write(file, safetensors.torch.save(_asked(distillation, data, index, batch)))
                note(int(index[-1]) + 1, data.size)
        return cls(place, data.size)

    def look_up(self, inputs: Inputs, index: Tensor | None) -> Taught:
        """Return what the teacher said of samples, on the device of the inputs.

        Args:
            inputs: Of the samples; the first batches are held against what the teacher was asked about.
            index: Sample indices, int64 [N].

        Raises:
            TrainingError: There is no index, one that is out of range, or inputs that differ from those in the cache.
        """
        if index is None:
            raise TrainingError(
                "a batch without sample indices, which the teacher's outputs are looked up by",
                next_step="give them: distillation.batch(inputs, labels, index)",
            )
        wanted = index.cpu()
        if wanted.numel() and not (int(wanted.min()) >= 0 and int(wanted.max()) < self.size):
            raise TrainingError(
                f"sample indices {int(wanted.min())} to {int(wanted.max())} in the teacher's cache",
                allowed=f"0 to {self.size - 1}: the data that it was filled with",
            )
        found = self._rows(wanted)
        prints = found.pop("fingerprint")
        if self._left:
            self._left -= 1
            self._check(fingerprint(inputs).cpu(), prints, wanted)
        device = first(inputs).device
        logits = found.pop("logits").to(device)
        return Taught(None, logits, tuple(found[name].to(device) for name in sorted(found)))

    def _rows(self, index: Tensor) -> dict[str, Tensor]:
        """Return the entries of samples, each [N, ...]; of the files, only what is read comes into memory."""
        shards = index // SHARD
        found: dict[str, Tensor] = {}
        for number in shards.unique().tolist():
            held = self._shard(number)
            at = shards == number
            for name, entries in held.items():
                rows = found.setdefault(name, entries.new_empty((len(index), *entries.shape[1:])))
                rows[at] = entries[index[at] % SHARD]
        return found

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._shards:
            # The tensors are views of the file in memory.
            with safe_open(self.folder / f"{number:05}.safetensors", "pt") as file:
                self._shards[number] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return self._shards[number]

    def _check(self, given: Tensor, known: Tensor, index: Tensor) -> None:
        differs = (given - known).abs() > _TOLERANCE
        if bool(differs.any()):
            raise TrainingError(
                f"sample {int(index[differs][0])} is not what the teacher's cache holds the outputs of: its inputs were "
                "altered, or its index is another's",
                next_step="give the inputs as they are in the data, with their indices, or train without the cache",
            )


def check_augmentation(augmentation: str) -> None:
    """Check that the inputs that a cache is asked for will be those that the teacher was asked about.

    Args:
        augmentation: What is done to the inputs in training, in words; empty for nothing.

    Raises:
        TrainingError: They will not.
    """
    if augmentation:
        raise TrainingError(
            f"a cache of the teacher's outputs with augmented inputs ({augmentation}): the teacher would be asked about other "
            "inputs than the student",
            next_step="train without the augmentation, or without the cache, so that the teacher sees each batch",
        )


def teacher_hash(teacher: nn.Module) -> str:
    """Return the SHA-256 over a network: its modules with their settings, and its parameters and buffers."""
    digest = hashlib.sha256(repr(teacher).encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint(inputs: Inputs) -> Tensor:
    """Return a number between -1 and 1 for each sample, shape [N], FP32, which depends on what is where in it.

    It is the cosine of the angle between the sample and a wave of growing pitch, so no shift or mirror image leaves it alone.
    """
    rows = torch.cat([tensor.detach().flatten(1).float() for tensor in tensors(inputs)], dim=1)
    place = torch.arange(rows.shape[1], device=rows.device, dtype=torch.float32)
    wave = torch.sin(0.7 * place + 0.013 * place.square().remainder(1000.0))
    return (rows @ wave) / (rows.norm(dim=1) * wave.norm()).clamp(min=torch.finfo(torch.float32).tiny)


def _asked(distillation: Distillation, data: CachedData, index: Tensor, batch: int) -> dict[str, Tensor]:
    """Return what the teacher says of samples, with fingerprints of their inputs.

    Raises:
        TrainingError: An answer is not finite.
    """
    found: dict[str, list[Tensor]] = {}
    for part in index.split(batch):
        inputs = data.inputs(part)
        for name, tensor in _answers(distillation.teach(inputs)):
            broken = ~tensor.reshape(len(tensor), -1).isfinite().all(dim=1)
            if bool(broken.any()):
                raise TrainingError(
                    f"the teacher's {name} of sample {int(part[broken][0])} are not finite",
                    next_step=f"run the teacher in a wider precision than {distillation.precision.name}, or mend the sample",
                )
            found.setdefault(name, []).append(tensor)
        found.setdefault("fingerprint", []).append(fingerprint(inputs).cpu())
    return {name: torch.cat(parts).contiguous() for name, parts in found.items()}


def _answers(taught: Taught) -> Iterator[tuple[str, Tensor]]:
    yield "logits", taught.logits.cpu()
    for number, feature in enumerate(taught.features):
        yield f"feature {number:03}", feature.cpu()


# Files ----------------------------------------------------------------------------------------------------------------


def _whole(file: Path, rows: int) -> bool:
    """Return whether a shard is there, can be read, and has so many samples."""
    if not file.is_file():
        return False
    try:
        with safe_open(file, "pt") as opened:
            shapes: list[list[int]] = [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118
    except SafetensorError:
        return False
    return bool(shapes) and all(shape[0] == rows for shape in shapes)


def _write(file: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with partial.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
