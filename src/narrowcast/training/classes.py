"""Class indices and the outputs that they choose from: whether they go together.

Indices are held against the outputs on the host, where data are loaded: a GPU that meets one that has no output stops for
good, and says nothing of where.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from narrowcast.data.dataset import Dataset
from narrowcast.errors import DataError, TrainingError

__all__ = ["Classes", "cross_entropy_sum"]


@dataclass(frozen=True)
class Classes:
    """The class indices that a network has outputs for.

    Attributes:
        count: Outputs of a sample, or of a position in it.
        ignore: The index of what is not learnt from, which needs no output.
    """

    count: int
    ignore: int

    def checked(self, data: Dataset, targets: str) -> Dataset:
        """Return a part of the data that refuses indices without an output: labels now, an array whenever it is loaded.

        Args:
            data: The part.
            targets: ``labels``, or the name of an array of the data.

        Raises:
            DataError: A label has no output.
        """
        if targets == "labels":
            assert data.labels is not None
            self._check(data.labels, data.source, "label")
            return data
        load = data.load

        def loaded(wanted: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
            arrays = load(wanted)
            self._check(arrays[targets], data.source, targets)
            return arrays

        return replace(data, load=loaded)

    def _check(self, indices: NDArray[Any], source: str, what: str) -> None:
        beyond = (indices != self.ignore) & ((indices < 0) | (indices >= self.count))
        if not beyond.any():
            return
        found = indices[beyond]
        raise DataError(
            f"{source} has {what} {found.max() if found.max() >= self.count else found.min()}, and the network has "
            f"{self.count} outputs",
            allowed=f"0 to {self.count - 1}, and {self.ignore} for what is not learnt from",
            next_step="give the network as many outputs as there are classes (often network.arguments.num_classes), or mend "
            "the data",
        )


def cross_entropy_sum(
    logits: Tensor, targets: Tensor, *, ignore: int, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the sum of the cross-entropy over targets that count, and how many those are; both 0-d.

    Args:
        logits: ``[N, C]``, or dense ``[N, C, ...]``, of any floating-point dtype; computed in FP32.
        targets: Class indices, int64, ``[N]`` or ``[N, ...]``.
        ignore: The index that does not count.
        label_smoothing: Share of a label that goes to all classes alike.

    Raises:
        TrainingError: The shapes do not go together; or, on the CPU, an index has no output.
    """
    wanted = [*logits.shape[:1], *logits.shape[2:]]
    if logits.dim() < 2 or list(targets.shape) != wanted or targets.is_floating_point():
        kind = str(targets.dtype).removeprefix("torch.")
        raise TrainingError(
            f"cross-entropy of outputs {list(logits.shape)} with targets {kind} {list(targets.shape)}",
            allowed="outputs [N, C] with class indices [N], or [N, C, ...] with [N, ...], as whole numbers",
            next_step="check data.targets and the network's outputs, or give a loss of your own",
        )
    try:
        total = functional.cross_entropy(
            logits.float(), targets, ignore_index=ignore, label_smoothing=label_smoothing, reduction="sum"
        )
    except IndexError as error:  # of the CPU; a GPU says it later, in words of its own
        found = targets[targets != ignore]
        worst = int(found.max() if int(found.max()) >= logits.shape[1] else found.min())
        raise TrainingError(
            f"a target is class {worst}, and the network has {logits.shape[1]} outputs",
            allowed=f"0 to {logits.shape[1] - 1}, and {ignore} for what is not learnt from",
            next_step="give the network as many outputs as there are classes, or mend the data",
        ) from error
    return total, (targets != ignore).sum()
