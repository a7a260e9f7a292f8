"""What a format can hold, in the numbers that people compare formats by."""

from __future__ import annotations

import math
from dataclasses import dataclass

from narrowcast.formats.blocks import BlockFormat
from narrowcast.formats.kinds import Codebook, ElementFormat, Format, Integer
from narrowcast.formats.order import places
from narrowcast.formats.table import ALIASES

__all__ = ["Facts", "facts"]


@dataclass(frozen=True)
class Facts:
    """One row of the table of formats. Of a block format, numbers include the block's scale.

    Args:
        name: The format's name.
        kind: ``float``, ``integer``, ``codebook`` or ``block``.
        bits: Bits per element, a block's scale shared out.
        layout: Sign-exponent-significand bits of a float; what the others are made of.
        bias: What a float's exponent field is reduced by.
        values: How many different finite numbers an element can be.
        smallest: The smallest (most negative) number.
        largest: The largest finite number.
        smallest_normal: The smallest positive number of full precision, of a float.
        smallest_positive: The smallest positive number.
        eps: Distance from 1 to the next larger number, of a float: two to the minus significand bits.
        decimal_digits: Decimal digits that a full significand is worth; None where values are not evenly spaced.
        infinity: Whether some code is infinity.
        nan: Whether some code is NaN.
        aliases: Other names it answers to.
        source: The specification.
    """

    name: str
    kind: str
    bits: float
    layout: str
    bias: int | None
    values: int | None
    smallest: float
    largest: float
    smallest_normal: float | None
    smallest_positive: float
    eps: float | None
    decimal_digits: float | None
    infinity: bool
    nan: bool
    aliases: tuple[str, ...]
    source: str


def facts(format: ElementFormat | BlockFormat) -> Facts:
    """Return a format's range, precision and size."""
    return _of_block(format) if isinstance(format, BlockFormat) else _of_element(format)


def _of_element(format: ElementFormat) -> Facts:
    floating = format if isinstance(format, Format) else None
    known = places(format)
    return Facts(
        name=format.name,
        kind="float" if floating else "integer" if isinstance(format, Integer) else "codebook",
        bits=format.bits,
        layout=_layout(format),
        bias=floating.bias if floating else None,
        values=known.stop - known.start,  # len() of a range ends at 2**63
        smallest=format.min,
        largest=format.max,
        smallest_normal=floating.smallest_normal if floating else None,
        smallest_positive=_smallest_positive(format),
        eps=floating.eps if floating else None,
        decimal_digits=_digits(format),
        infinity=floating is not None and floating.has_inf,
        nan=floating is not None and floating.has_nan,
        aliases=_aliases(format.name),
        source=format.source,
    )


def _of_block(block: BlockFormat) -> Facts:
    element, scale = _of_element(block.element), block.scale
    normal = element.smallest_normal
    return Facts(
        name=block.name,
        kind="block",
        bits=block.bits_per_element,
        layout=f"{block.block} {block.element.name.removesuffix('_element')} + {scale.name}"
        + (" + fp32" if block.tensor_scale else ""),
        bias=None,
        values=element.values,
        smallest=element.smallest * scale.max,
        largest=element.largest * scale.max,
        smallest_normal=None if normal is None else normal * scale.smallest_subnormal,
        smallest_positive=element.smallest_positive * scale.smallest_subnormal,
        eps=element.eps,
        decimal_digits=element.decimal_digits,
        infinity=element.infinity,
        nan=element.nan or scale.has_nan,
        aliases=_aliases(block.name),
        source=block.source,
    )


def _layout(format: ElementFormat) -> str:
    match format:
        case Format():
            return f"{int(format.signed)}-{format.exponent_bits}-{format.mantissa_bits}"
        case Integer():
            point = f", {format.fraction_bits} after the point" if format.fraction_bits else ""
            return ("two's complement" if format.signed else "unsigned") + point
        case Codebook():
            return f"table of {len(format.values)}"


def _smallest_positive(format: ElementFormat) -> float:
    match format:
        case Format():
            return format.smallest_subnormal
        case Integer():
            return format.step
        case Codebook():
            return min((value for value in format.values if value > 0), default=math.nan)


def _digits(format: ElementFormat) -> float | None:
    match format:
        case Format():
            return format.decimal_digits
        case Integer():
            return (format.bits - format.signed) * math.log10(2)
        case Codebook():
            return None


def _aliases(name: str) -> tuple[str, ...]:
    return tuple(alias for alias, target in ALIASES.items() if target == name)
