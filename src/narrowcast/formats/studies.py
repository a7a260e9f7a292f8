"""Two questions about four bits that people ask, answered by measuring: what a block costs, and which table fits best."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from narrowcast.errors import FormatError, choices
from narrowcast.formats.analysis import error
from narrowcast.formats.arrays import on_device, opened
from narrowcast.formats.blocks import BlockFormat
from narrowcast.formats.checks import check_words, whole
from narrowcast.formats.fast import codebook_edges
from narrowcast.formats.kinds import Codebook, ElementFormat
from narrowcast.formats.quantized import quantize
from narrowcast.formats.scales import absmax, safe
from narrowcast.formats.table import ELEMENTS

__all__ = ["FOUR_BIT", "BlockCost", "block_costs", "four_bit_errors", "sample"]

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NF4 = ELEMENTS["nf4"]
assert isinstance(_NF4, Codebook)

# Four-bit tables as shares of the block's largest magnitude. INT4's error depends on where the largest magnitude goes,
# so its usual choices are all here.
FOUR_BIT: dict[str, Codebook] = {
    "nf4": _NF4,
    "int4, step max/7": Codebook("int4_7", tuple(i / 7 for i in range(-7, 8))),
    "int4, step max/8 without -8": Codebook("int4_8_narrow", tuple(i / 8 for i in range(-7, 8))),
    "int4, step max/8": Codebook("int4_8", tuple(i / 8 for i in range(-8, 8))),
    "e2m1": Codebook("e2m1_1", tuple(sorted({sign * value / 6 for value in _E2M1 for sign in (-1, 1)}))),
}


class BlockCost(NamedTuple):
    """What one block size costs."""

    block: int
    bits_per_element: float
    relative_mse: float
    sqnr_db: float


def block_costs(
    x: Any, format: str | ElementFormat | BlockFormat = "nf4", blocks: Iterable[int] = (16, 32, 64, 128, 256, 512)
) -> list[BlockCost]:
    """Return bits and error of ``x`` quantised with each block size, scales included.

    Args:
        x: Numbers; the last axis is a multiple of every block.
        format: What is quantised to.
        blocks: Block sizes.

    Raises:
        FormatError: A block that does not divide the last axis.
    """
    if not isinstance(blocks, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise FormatError(f"blocks = {blocks!r:.100}", allowed="whole numbers, such as (16, 32, 64)")
    costs: list[BlockCost] = []
    for block in blocks:
        quantized = quantize(x, format, block=block)
        report = error(x, quantized)
        costs.append(BlockCost(block, quantized.bits_per_element, report.relative**2, report.sqnr_db))
    return costs


def four_bit_errors(x: Any, block: int = 64) -> dict[str, float]:
    """Return the squared error over the signal of each 4-bit table on ``x``, with scales that are not rounded.

    Args:
        x: Numbers, as many as a multiple of ``block``.
        block: Elements that share a scale, in C order.

    Raises:
        FormatError: A block that does not divide the number of elements.
    """
    block = whole("block", block, least=1)
    numbers = opened(x.cpu() if on_device(x) else x).array.astype(np.float64)
    if not numbers.size or numbers.size % block:
        raise FormatError(f"{numbers.size} elements in blocks of {block}", allowed="a multiple of the block")
    rows = numbers.reshape(-1, block)
    largest = safe(absmax(rows))[:, None]
    signal = float(np.square(rows).sum())
    errors: dict[str, float] = {}
    for name, table in FOUR_BIT.items():
        nearest = np.array(table.values)[np.searchsorted(codebook_edges(table, "float64"), rows / largest)]
        errors[name] = float(np.square(rows - nearest * largest).sum()) / signal
    return errors


def sample(distribution: str, count: int, seed: int = 0) -> np.ndarray:
    """Return random float64 numbers: ``gaussian`` or ``laplace``, of mean 0 and scale 1.

    Raises:
        FormatError: Another distribution.
    """
    rng = np.random.default_rng(whole("seed", seed, least=0))
    draws = {"gaussian": rng.standard_normal, "laplace": lambda size: rng.laplace(size=size)}
    check_words({"distribution": distribution})
    if distribution not in draws:
        raise FormatError(f"unknown distribution {distribution!r}", allowed=choices(distribution, draws))
    return draws[distribution](whole("count", count, least=0))
