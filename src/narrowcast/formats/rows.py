"""A tensor as rows, each of which shares a scale, and the way back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from narrowcast.errors import FormatError
from narrowcast.formats.granularity import Granularity, PerBlock, PerChannel, PerTensor

__all__ = ["Rows"]


@dataclass(frozen=True)
class Rows:
    """How a tensor is laid out so that each row shares a scale, and the way back.

    Args:
        shape: The tensor's shape.
        axis: The axis that blocks run along (moved last) or channels are counted by (moved first); None without one.
        last: Whether that axis is moved last.
        padded: Length of the axis after padding.
        length: Elements in a row.
    """

    shape: tuple[int, ...]
    axis: int | None
    last: bool
    padded: int
    length: int

    @staticmethod
    def of(shape: tuple[int, ...], granularity: Granularity, *, pad: bool) -> Rows:
        """Return the layout of a tensor of ``shape``.

        Raises:
            FormatError: An axis that the tensor does not have, or a block that does not divide it.
        """
        if isinstance(granularity, PerTensor):
            return Rows(shape, None, False, 0, math.prod(shape))
        if isinstance(granularity, PerBlock) and shape == ():
            shape = (1,)
        if not -len(shape) <= granularity.axis < len(shape):
            raise FormatError(
                f"axis {granularity.axis} of a tensor of shape {list(shape)}",
                allowed=f"{-len(shape)} to {len(shape) - 1}",
            )
        axis = granularity.axis % len(shape)
        if isinstance(granularity, PerChannel):
            return Rows(shape, axis, False, shape[axis], math.prod(shape) // max(shape[axis], 1))
        size, length = granularity.size, shape[axis]
        if length % size and not pad:
            divisors = [d for d in range(1, min(length, 256) + 1) if length % d == 0]
            raise FormatError(
                f"a block of {size} does not divide axis {axis}, of length {length}",
                allowed=f"a divisor: {', '.join(map(str, divisors[-6:]))}",
                next_step="or pad=True, which fills the last block with zeros and stores them",
            )
        return Rows(shape, axis, True, -(-length // size) * size, size)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The tensor's shape with its padding."""
        if self.axis is None:
            return self.shape
        return (*self.shape[: self.axis], self.padded, *self.shape[self.axis + 1 :])

    @property
    def count(self) -> int:
        """Number of rows, which is the number of scales."""
        if self.axis is None:
            return 1
        return math.prod(self.stored_shape) // self.length if self.last else self.padded

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the scales: the tensor's with blocks in place of elements; [channels]; or [] for a tensor's one."""
        if self.axis is None:
            return ()
        if not self.last:
            return (self.padded,)
        return (*self.shape[: self.axis], self.padded // self.length, *self.shape[self.axis + 1 :])

    @property
    def in_order(self) -> bool:
        """Whether rows lie in memory as the tensor does."""
        return self.axis is None or (self.axis == len(self.shape) - 1 if self.last else self.axis == 0)

    def apart(self, x: np.ndarray) -> np.ndarray:
        """Return the tensor as rows, padded with zeros: shape [count, length]; without a copy where memory allows."""
        x = x.reshape(self.shape)
        if self.axis is None:
            return np.ascontiguousarray(x).reshape(1, -1)
        if self.padded != self.shape[self.axis]:
            widths = [(0, self.padded - size if axis == self.axis else 0) for axis, size in enumerate(self.shape)]
            x = np.pad(x, widths)
        moved = np.moveaxis(x, self.axis, -1 if self.last else 0)
        return np.ascontiguousarray(moved).reshape(self.count, self.length)

    def together(self, rows: np.ndarray) -> np.ndarray:
        """Return rows in the tensor's own order, still padded: shape ``stored_shape``."""
        if self.axis is None:
            return rows.reshape(self.shape)
        target, source = list(self.stored_shape), self.axis
        target.append(target.pop(source)) if self.last else target.insert(0, target.pop(source))
        return np.ascontiguousarray(np.moveaxis(rows.reshape(target), -1 if self.last else 0, source))

    def rows_of_stored(self, stored: np.ndarray) -> np.ndarray:
        """Return what :meth:`together` gave as rows again."""
        if self.axis is None:
            return stored.reshape(1, -1)
        moved = np.moveaxis(stored.reshape(self.stored_shape), self.axis, -1 if self.last else 0)
        return np.ascontiguousarray(moved).reshape(self.count, self.length)

    def scales_apart(self, scales: np.ndarray) -> np.ndarray:
        """Return scales of ``scale_shape`` in the order of the rows: shape [count]."""
        if self.axis is None or not self.last:
            return scales.reshape(-1)
        return np.ascontiguousarray(np.moveaxis(scales.reshape(self.scale_shape), self.axis, -1)).reshape(-1)

    def scales_together(self, scales: np.ndarray) -> np.ndarray:
        """Return one scale per row in ``scale_shape``."""
        if self.axis is None or not self.last:
            return scales.reshape(self.scale_shape)
        shape = list(self.scale_shape)
        shape.append(shape.pop(self.axis))
        return np.ascontiguousarray(np.moveaxis(scales.reshape(shape), -1, self.axis))

    def without_padding(self, stored: np.ndarray) -> np.ndarray:
        """Return a tensor of ``stored_shape`` in its own shape."""
        if self.axis is None or self.padded == self.shape[self.axis]:
            return stored.reshape(self.shape)
        return np.ascontiguousarray(stored.take(np.arange(self.shape[self.axis]), axis=self.axis))
