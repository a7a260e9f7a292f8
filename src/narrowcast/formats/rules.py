"""What encoding does with what a format cannot hold, by name; and what known systems do, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import Self

from narrowcast.errors import FormatError, choices
from narrowcast.formats.kinds import Codebook, ElementFormat, Format

__all__ = ["CHOICES", "CONVENTIONS", "Below", "NanInput", "Overflow", "Rounding", "Rules"]


CHOICES = ("rounding", "overflow", "nan", "below", "convention")  # what Rules.of takes beside the format, in its order


class _Named(StrEnum):
    @classmethod
    def parse(cls, value: Self | str) -> Self:
        """Return the member of that name.

        Raises:
            FormatError: No such member.
        """
        try:
            return cls(value)
        except ValueError:
            what = "".join(f" {c.lower()}" if c.isupper() else c for c in cls.__name__).strip()
            raise FormatError(f"unknown {what} {value!r}", allowed=choices(str(value), list(cls))) from None


class Rounding(_Named):
    """Which of the two neighbours a number between them becomes (IEEE 754-2019, section 4.3, and two more)."""

    #: A tie goes to the even significand; without significand bits (E8M0) there is none, and it goes away from zero.
    NEAREST_EVEN = "nearest_even"
    #: A tie goes away from zero.
    NEAREST_AWAY = "nearest_away"
    TOWARD_ZERO = "toward_zero"
    #: Toward +infinity.
    UP = "up"
    #: Toward -infinity.
    DOWN = "down"
    #: The neighbour with the odd significand: rounding it again, to fewer bits, is then still right.
    TO_ODD = "to_odd"
    #: Up with the probability of the distance to the lower neighbour.
    STOCHASTIC = "stochastic"


class Overflow(_Named):
    """What becomes of a number beyond the largest finite one."""

    #: Infinity, else NaN, as the format has; the largest number where it has neither.
    IEEE = "ieee"
    #: A finite number becomes the largest one; an infinite one stays so (NaN without infinity).
    SATURATE = "saturate"
    #: Infinite ones become the largest number too.
    CLAMP = "clamp"
    NAN = "nan"
    #: Integers only: the low bits.
    WRAP = "wrap"


class NanInput(_Named):
    """What becomes of NaN in a format without it."""

    ERROR = "error"
    ZERO = "zero"
    MAX = "max"


class Below(_Named):
    """What becomes of zero and negative numbers in E8M0, and of negative ones in other unsigned floats."""

    NAN = "nan"
    #: The sign is dropped.
    MAGNITUDE = "magnitude"
    #: The smallest number.
    CLAMP = "clamp"


@dataclass(frozen=True)
class Rules:
    """How one value becomes a code where the format gives a choice."""

    rounding: Rounding = Rounding.NEAREST_EVEN
    overflow: Overflow = Overflow.SATURATE
    nan: NanInput = NanInput.ERROR
    below: Below = Below.NAN

    @staticmethod
    @lru_cache(maxsize=256)
    def of(
        format: ElementFormat,
        rounding: str | None = None,
        overflow: str | None = None,
        nan: str | None = None,
        below: str | None = None,
        convention: str | None = None,
    ) -> Rules:
        """Return the rules for ``format``: its defaults, a convention over them, the named choices over both.

        Raises:
            FormatError: An unknown name, or a choice that the format cannot follow.
        """
        rules = Rules(overflow=Overflow(format.default_overflow), below=Below.NAN)
        if isinstance(format, Format) and not format.has_nan:
            rules = replace(rules, below=Below.CLAMP)
        if convention is not None:
            if convention not in CONVENTIONS:
                raise FormatError(f"unknown convention {convention!r}", allowed=choices(str(convention), CONVENTIONS))
            known = CONVENTIONS[convention]
            if format.name not in known:
                raise FormatError(
                    f"convention {convention!r} says nothing of {format.name}",
                    allowed=f"{', '.join(known)}, or no convention",
                )
            rules = known[format.name]
        if rounding is not None:
            rules = replace(rules, rounding=Rounding.parse(rounding))
        if overflow is not None:
            rules = replace(rules, overflow=Overflow.parse(overflow))
        if nan is not None:
            rules = replace(rules, nan=NanInput.parse(nan))
        if below is not None:
            rules = replace(rules, below=Below.parse(below))
        rules._check(format)
        return rules

    def _check(self, format: ElementFormat) -> None:
        floating = isinstance(format, Format)
        if self.overflow is Overflow.WRAP and (floating or isinstance(format, Codebook)):
            raise FormatError(f"overflow = 'wrap' with {format.name}", allowed="'wrap' with integers only")
        if self.overflow is Overflow.NAN and not (floating and format.has_nan):
            raise FormatError(
                f"overflow = 'nan' with {format.name}, which has no NaN",
                allowed=", ".join(o for o in Overflow if o not in (Overflow.NAN, Overflow.WRAP)),
            )
        if self.below is Below.NAN and floating and not format.signed and not format.has_nan:
            raise FormatError(f"below = 'nan' with {format.name}, which has no NaN", allowed="magnitude, clamp")


def _same(names: str, rules: Rules) -> dict[str, Rules]:
    return dict.fromkeys(names.split(), rules)


_IEEE = Rules(overflow=Overflow.IEEE)
_CLAMP = Rules(overflow=Overflow.CLAMP)
_WIDE = "fp64 fp32 tf32 fp16 bf16"
_INTEGERS = "int2 int3 int4 int8 int16 uint2 uint3 uint4 uint8 uint16"

# Observed: ml_dtypes 0.6.0, torch 2.15.0 (CPU; older torch gives NaN for E4M3FN over 464), onnx 1.23.2's reference
# with saturate=1 for FP8 and QuantizeLinear's rule for integers, the C++ constructors of CUDA 13.2's headers.
CONVENTIONS: dict[str, dict[str, Rules]] = {
    "ml_dtypes": _same(f"{_WIDE} e5m2 e4m3fn e4m3 e3m4 e4m3fnuz e5m2fnuz e4m3b11fnuz", _IEEE)
    | _same("e3m2 e2m3 e2m1", Rules(overflow=Overflow.CLAMP, nan=NanInput.ZERO))
    | _same("e8m0", Rules(overflow=Overflow.IEEE, below=Below.NAN))
    | _same(_INTEGERS, Rules(Rounding.TOWARD_ZERO, Overflow.WRAP, NanInput.ZERO)),
    "torch": _same(f"{_WIDE} e5m2 e4m3fnuz e5m2fnuz", _IEEE)
    | _same("e4m3fn", _CLAMP)
    | _same("e8m0", Rules(overflow=Overflow.IEEE, below=Below.MAGNITUDE)),
    "onnx": _same(_WIDE, _IEEE)
    | _same("e5m2 e4m3fn e4m3fnuz e5m2fnuz", _CLAMP)
    | _same("e3m2 e2m3 e2m1", Rules(overflow=Overflow.CLAMP, nan=NanInput.ZERO))
    | _same("e8m0", Rules(Rounding.UP, Overflow.SATURATE, below=Below.MAGNITUDE))
    | _same(_INTEGERS, _CLAMP),
    "cuda": _same(_WIDE, _IEEE)
    | _same("e5m2 e4m3fn", _CLAMP)
    | _same("e3m2 e2m3 e2m1", Rules(overflow=Overflow.CLAMP, nan=NanInput.MAX))
    | _same("e8m0", Rules(Rounding.UP, Overflow.CLAMP, below=Below.MAGNITUDE)),
}
