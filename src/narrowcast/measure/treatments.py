"""What the name of a number format means for a weight: a cast, or codes with scales, and who shares a scale."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from narrowcast.errors import FormatError
from narrowcast.formats import (
    BlockFormat,
    Codebook,
    ElementFormat,
    Granularity,
    Integer,
    PerBlock,
    PerChannel,
    QuantizedTensor,
    Scheme,
    cast,
    get,
    quantize,
)
from narrowcast.formats.packing import packed_size
from narrowcast.formats.ranges import has_zero_points
from narrowcast.formats.rows import Rows

__all__ = ["DEFAULT_FORMATS", "Treatment", "treatments"]

DEFAULT_FORMATS = ("fp16", "bf16", "e4m3fn", "int8", "int4", "nf4", "mxfp4", "nvfp4")

_BYTE = 8  # bits from which on one scale for each output channel is what is used in practice
_BLOCK = 32  # elements that share a scale below that
_TABLE_BLOCK = 64  # of a codebook: QLoRA's
_WORDS = (16, 32, 64)  # bits that a cast number is stored in: TF32 lies in 32


@dataclass(frozen=True)
class Treatment:
    """One format as it is applied to weights.

    Args:
        name: The format's name.
        words: What is done, for people.
        format: The elements' format.
        scheme: How elements are scaled; None for a cast.
    """

    name: str
    words: str
    format: ElementFormat
    scheme: Scheme | None

    def apply(self, rows: np.ndarray, tensor_max: float) -> QuantizedTensor | np.ndarray:
        """Return numbers in the format.

        Args:
            rows: Finite numbers, one row per output channel: shape [rows, length].
            tensor_max: Largest magnitude of the whole tensor that the rows are a part of.

        Raises:
            FormatError: Numbers beyond what FP32 scales reach.
        """
        if self.scheme is None:
            return cast(rows, self.format)
        found = get(self.name)
        return quantize(
            rows,
            found,
            granularity=None if isinstance(found, BlockFormat) else self.scheme.granularity,
            symmetric=self.scheme.symmetric,
            range=self.scheme.range,
            pad=self.scheme.pad,
            tensor_max=tensor_max if self.scheme.tensor_scale else None,
        )

    def nbytes(self, matrix: tuple[int, int]) -> int:
        """Return the bytes that a weight of so many rows and columns takes: codes, padding, scales and zero points."""
        if self.scheme is None:
            return math.prod(matrix) * next(word for word in _WORDS if self.format.bits <= word) // 8
        rows = Rows.of(matrix, self.scheme.granularity, pad=self.scheme.pad)
        codes = packed_size(math.prod(rows.stored_shape), self.format.bits)
        zero_points = packed_size(rows.count, self.format.bits) if has_zero_points(self.scheme) else 0
        return codes + zero_points + rows.count * self.scheme.scale.bits // 8 + 4 * self.scheme.tensor_scale


def treatments(names: Iterable[str], range: str = "minmax") -> tuple[Treatment, ...]:
    """Return what the names of formats mean, each format once.

    Args:
        names: Names or aliases.
        range: How scales are chosen: ``minmax``, ``percentile`` or ``mse``.

    Raises:
        FormatError: No name, an unknown one, a format that cannot hold weights, or an unknown range.
    """
    made = {treatment.name: treatment for treatment in (_treatment(name, range) for name in names)}
    if not made:
        raise FormatError("no format to compare", allowed="one or more of those that `narrowcast formats` lists")
    return tuple(made.values())


def _treatment(name: str, range: str) -> Treatment:
    found = get(name)
    if isinstance(found, BlockFormat):
        scale = f"{found.scale.name.upper()} scale" + (", FP32 scale per tensor" if found.tensor_scale else "")
        return _scaled(found, f"blocks of {found.block}, {scale}", None, range)
    if found.bits > _BYTE and not isinstance(found, Integer):
        _scaled(get("int8"), "", PerChannel(0), range)  # a wrong range is refused with casts too
        stored = next(word for word in _WORDS if found.bits <= word)
        words = "cast" if stored == found.bits else f"cast, kept in {stored}-bit words"
        return Treatment(found.name, words, found, None)
    if found.bits >= _BYTE:
        return _scaled(found, "one FP32 scale per output channel", PerChannel(0), range)
    size = _TABLE_BLOCK if isinstance(found, Codebook) else _BLOCK
    return _scaled(found, f"blocks of {size}, FP32 scale", PerBlock(size), range)


def _scaled(found: ElementFormat | BlockFormat, words: str, granularity: Granularity | None, range: str) -> Treatment:
    """Return a treatment with scales; unsigned integers get zero points, since weights have both signs."""
    symmetric = not isinstance(found, Integer) or found.signed
    padded = not isinstance(granularity, PerChannel)
    scheme = Scheme.of(
        found, block=None, axis=-1, granularity=granularity, symmetric=symmetric, range=range, pad=padded
    )
    return Treatment(found.name, words if symmetric else f"{words} and zero point", scheme.element, scheme)
