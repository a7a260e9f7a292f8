"""Number formats as data: a floating-point format, an integer, a codebook. They know no array.

A *code* is the unsigned integer whose low ``bits`` bits are stored. Every value of every format here is exact in
float64 (formats wider than that are refused), so float64 is what decoding gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from narrowcast.errors import FormatError
from narrowcast.formats.checks import check_words, truth, whole

__all__ = ["Codebook", "ElementFormat", "Format", "Integer", "Nan"]

_USUAL_BIAS = -(1 << 31)


class Nan(StrEnum):
    """Which codes of a floating-point format are NaN."""

    #: Largest exponent field, significand not zero; with a zero significand it is infinity.
    IEEE = "ieee"
    #: Exponent and significand all ones: the "FN" formats and E8M0.
    ALL_ONES = "all_ones"
    #: The sign bit alone: the "FNUZ" formats.
    NEGATIVE_ZERO = "negative_zero"
    #: No code is NaN.
    NONE = "none"


@dataclass(frozen=True)
class Format:
    """A binary floating-point format: sign, exponent and significand fields, and what its special codes mean.

    A code with exponent field ``e`` and significand field ``m`` is worth ``(1 + m / 2**mantissa_bits) *
    2**(e - bias)``; with ``e = 0`` it is the subnormal ``m / 2**mantissa_bits * 2**(1 - bias)``. A format with
    ``has_zero=False`` (E8M0) has neither zero nor subnormals: ``e = 0`` is a normal number there.

    Args:
        exponent_bits: Width of the exponent field, 1 to 11.
        mantissa_bits: Width of the significand field without the hidden bit, 0 to 52.
        bias: What is subtracted from the exponent field; ``2**(exponent_bits - 1) - 1`` unless given.
        name: What errors and tables call it.
        signed: Whether there is a sign bit.
        nan: Which codes are NaN. With ``"ieee"`` the largest exponent field with a zero significand is infinity;
            the other kinds have no infinity.
        has_zero: Whether the exponent field 0 holds zero and the subnormals.
        source: The specification, with its section.

    Raises:
        FormatError: A width or bias out of range, or special codes that contradict each other.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int = _USUAL_BIAS
    name: str = ""
    signed: bool = True
    nan: Nan = Nan.IEEE
    has_zero: bool = True
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in ("exponent_bits", "mantissa_bits", "bias"):
            object.__setattr__(self, name, whole(name, getattr(self, name)))
        for name in ("signed", "has_zero"):
            truth(name, getattr(self, name))
        check_words({"name": self.name})
        if not 1 <= self.exponent_bits <= 11:
            raise FormatError(f"exponent_bits = {self.exponent_bits}", allowed="1 to 11")
        if not 0 <= self.mantissa_bits <= 52:
            raise FormatError(f"mantissa_bits = {self.mantissa_bits}", allowed="0 to 52")
        if self.bias == _USUAL_BIAS:
            object.__setattr__(self, "bias", 2 ** (self.exponent_bits - 1) - 1)
        object.__setattr__(self, "nan", _nan(self.nan))
        if not self.name:
            object.__setattr__(self, "name", f"e{self.exponent_bits}m{self.mantissa_bits}b{self.bias}")
        if self.nan is Nan.IEEE and self.mantissa_bits == 0:
            raise FormatError(
                f"{self.name} has nan = 'ieee' and no significand bits to tell NaN from infinity",
                allowed="nan = 'all_ones', 'negative_zero' or 'none' with mantissa_bits = 0",
            )
        if self.nan is Nan.NEGATIVE_ZERO and not (self.signed and self.has_zero):
            raise FormatError(f"{self.name} has nan = 'negative_zero' without a negative zero to give away")
        if self.minimum_exponent - self.mantissa_bits < -1074 or self.minimum_exponent < -1022:
            raise FormatError(f"{self.name}: smallest exponent {self.minimum_exponent}", allowed="-1022 or more")
        if self.maximum_exponent > 1023:
            raise FormatError(f"{self.name}: largest exponent {self.maximum_exponent}", allowed="1023 or less")
        if self.max_code < self.first_normal_code:
            raise FormatError(f"{self.name} has no normal number", next_step="give it more exponent bits")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def last_code(self) -> int:
        """The largest code, whatever it stands for."""
        return (1 << self.bits) - 1

    @property
    def magnitude_mask(self) -> int:
        """The exponent and significand fields' bits."""
        return (1 << (self.exponent_bits + self.mantissa_bits)) - 1

    @property
    def sign_bit(self) -> int:
        """The sign bit's mask; 0 in an unsigned format."""
        return (self.magnitude_mask + 1) if self.signed else 0

    @cached_property
    def max_code(self) -> int:
        """Code of the largest finite number."""
        if self.has_inf:
            return self.infinity_code - 1
        return self.magnitude_mask - (self.nan is Nan.ALL_ONES)

    @property
    def infinity_code(self) -> int:
        """Code of +infinity, in a format that has it."""
        return ((1 << self.exponent_bits) - 1) << self.mantissa_bits

    @property
    def first_normal_code(self) -> int:
        """Code of the smallest normal number."""
        return (1 << self.mantissa_bits) if self.has_zero else 0

    @property
    def nan_code(self) -> int | None:
        """Code of a positive NaN, quiet and without payload; None in a format without NaN."""
        match self.nan:
            case Nan.IEEE:
                return self.infinity_code | (1 << (self.mantissa_bits - 1))
            case Nan.ALL_ONES:
                return self.magnitude_mask
            case Nan.NEGATIVE_ZERO:
                return self.sign_bit
            case Nan.NONE:
                return None

    @property
    def minimum_exponent(self) -> int:
        """Exponent of the smallest normal number (IEEE 754's emin)."""
        return (1 if self.has_zero else 0) - self.bias

    @property
    def maximum_exponent(self) -> int:
        """Exponent of the largest finite number (IEEE 754's emax)."""
        return max(self.max_code >> self.mantissa_bits, 1 if self.has_zero else 0) - self.bias

    @property
    def has_inf(self) -> bool:
        """Whether some code is infinity."""
        return self.nan is Nan.IEEE

    @property
    def has_nan(self) -> bool:
        """Whether some code is NaN."""
        return self.nan is not Nan.NONE

    @property
    def has_negative_zero(self) -> bool:
        """Whether there are two zeros."""
        return self.signed and self.has_zero and self.nan is not Nan.NEGATIVE_ZERO

    @property
    def has_subnormals(self) -> bool:
        """Whether numbers below the smallest normal one are kept with fewer digits."""
        return self.has_zero and self.mantissa_bits > 0

    @property
    def max(self) -> float:
        """Largest finite number."""
        return self._magnitude(self.max_code)

    @property
    def min(self) -> float:
        """Smallest (most negative) finite number."""
        return -self.max if self.signed else (0.0 if self.has_zero else self.smallest_normal)

    @property
    def smallest_normal(self) -> float:
        """Smallest positive number of full precision."""
        return math.ldexp(1.0, self.minimum_exponent)

    @property
    def smallest_subnormal(self) -> float:
        """Smallest positive number; the smallest normal one where there are no subnormals."""
        return math.ldexp(1.0, self.minimum_exponent - (self.mantissa_bits if self.has_subnormals else 0))

    @property
    def eps(self) -> float:
        """Distance from 1 to the next larger number, as if 1 were in range (two to the minus mantissa_bits)."""
        return math.ldexp(1.0, -self.mantissa_bits)

    @property
    def decimal_digits(self) -> float:
        """Decimal digits that the significand is worth: ``(mantissa_bits + 1) * log10(2)``."""
        return (self.mantissa_bits + 1) * math.log10(2)

    @property
    def default_overflow(self) -> str:
        """What encoding does with too large a number unless told: infinity where there is one, else the limit."""
        return "ieee" if self.has_inf else "saturate"

    def _magnitude(self, code: int) -> float:
        exponent, significand = code >> self.mantissa_bits, code & ((1 << self.mantissa_bits) - 1)
        if exponent or not self.has_zero:
            significand |= 1 << self.mantissa_bits
        else:
            exponent = 1
        return math.ldexp(significand, exponent - self.bias - self.mantissa_bits)


@dataclass(frozen=True)
class Integer:
    """An integer in two's complement, or an unsigned one; with fraction bits, a fixed-point number.

    Args:
        bits: 1 to 16 unsigned, 2 to 16 signed.
        signed: Whether it is two's complement.
        fraction_bits: The code ``c`` is worth ``c / 2**fraction_bits`` (6 in MXINT8, whose elements stay below 2).
        name: What errors and tables call it.

    Raises:
        FormatError: A width out of range.
    """

    bits: int
    signed: bool = True
    fraction_bits: int = 0
    name: str = ""
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in ("bits", "fraction_bits"):
            object.__setattr__(self, name, whole(name, getattr(self, name)))
        truth("signed", self.signed)
        check_words({"name": self.name})
        if not 1 + self.signed <= self.bits <= 16:
            raise FormatError(f"bits = {self.bits} of an integer", allowed="2 to 16 signed, 1 to 16 unsigned")
        if not 0 <= self.fraction_bits <= 64:
            raise FormatError(f"fraction_bits = {self.fraction_bits} of an integer", allowed="0 to 64")
        if not self.name:
            point = f"q{self.fraction_bits}" if self.fraction_bits else ""
            object.__setattr__(self, "name", f"{'int' if self.signed else 'uint'}{self.bits}{point}")

    @property
    def last_code(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def step(self) -> float:
        """Distance between neighbouring values."""
        return math.ldexp(1.0, -self.fraction_bits)

    @property
    def max(self) -> float:
        """Largest value."""
        return ((1 << (self.bits - self.signed)) - 1) * self.step

    @property
    def min(self) -> float:
        """Smallest value."""
        return -(1 << (self.bits - 1)) * self.step if self.signed else 0.0

    @property
    def default_overflow(self) -> str:
        """Integers clamp unless told otherwise."""
        return "saturate"


@dataclass(frozen=True)
class Codebook:
    """A table of values; a code is a position in it.

    Args:
        name: What errors and tables call it.
        values: Finite, strictly increasing, 2 to 65,536 of them.

    Raises:
        FormatError: Values that are not finite and increasing.
    """

    name: str
    values: tuple[float, ...]
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        check_words({"name": self.name})
        try:
            object.__setattr__(self, "values", tuple(float(value) for value in self.values))
        except (TypeError, ValueError) as error:
            raise FormatError(f"codebook {self.name!r}: {error}", allowed="numbers") from None
        if not 2 <= len(self.values) <= 65_536:
            raise FormatError(f"codebook {self.name!r} has {len(self.values)} values", allowed="2 to 65,536")
        for before, after in zip(self.values, self.values[1:], strict=False):
            if not (math.isfinite(before) and math.isfinite(after) and before < after):
                raise FormatError(
                    f"codebook {self.name!r} has {after!r} after {before!r}",
                    allowed="finite, strictly increasing values",
                )

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (len(self.values) - 1).bit_length()

    @property
    def last_code(self) -> int:
        """The largest code, which a table of no power of two ends at."""
        return len(self.values) - 1

    @property
    def max(self) -> float:
        """Largest value."""
        return self.values[-1]

    @property
    def min(self) -> float:
        """Smallest value."""
        return self.values[0]

    @property
    def default_overflow(self) -> str:
        """A table has no infinity: the ends hold what lies beyond them."""
        return "saturate"


ElementFormat = Format | Integer | Codebook


def _nan(value: Nan | str) -> Nan:
    try:
        return Nan(value)
    except ValueError:
        raise FormatError(f"nan = {value!r}", allowed=", ".join(Nan)) from None
