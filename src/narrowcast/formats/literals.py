"""Numbers and codes as people type them, read without rounding."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from narrowcast.errors import FormatError
from narrowcast.formats.kinds import Codebook, ElementFormat

__all__ = ["Value", "exact_value", "is_finite", "parse_code", "parse_value"]

#: An exact number; a float only where a fraction has no word for it: infinities, NaN and minus zero.
Value = Fraction | float

_ALLOWED = "a decimal (0.1, -1e-8), a fraction (1/3), a power (2^-24), a hexadecimal float (0x1.8p-3), inf, nan or -0"
_DECIMAL = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e([+-]?\d+))?")
_HEXADECIMAL = re.compile(r"([+-]?)0x([0-9a-f]*)\.?([0-9a-f]*)(?:p([+-]?\d+))?")
_POWER = re.compile(r"([+-]?)2(?:\^|\*\*)\(?([+-]?\d+)\)?")
_WORDS = {"inf": math.inf, "infinity": math.inf, "nan": math.nan}
_LONGEST = 1200  # characters: the smallest float64 in full has 1,076
_LARGEST_EXPONENT = 10_000


def parse_value(text: str) -> Value:
    """Return the number that ``text`` writes, exactly.

    Raises:
        FormatError: It writes none, or one whose exponent is beyond anything a format could tell from zero or infinity.
    """
    plain = text.strip().lower().replace("\N{MINUS SIGN}", "-").replace("_", "")
    sign = -1 if plain.startswith("-") else 1
    word = _WORDS.get(plain.lstrip("+-") if len(plain) - len(plain.lstrip("+-")) <= 1 else "")
    if word is not None:
        return math.copysign(word, sign)
    try:
        value = _fraction(plain) if len(plain) <= _LONGEST else None
    except ZeroDivisionError:
        value = None
    except OverflowError:
        raise FormatError(
            f"value {text!r}", allowed=f"exponents from -{_LARGEST_EXPONENT} to {_LARGEST_EXPONENT}"
        ) from None
    if value is None:
        shown = text if len(text) <= 60 else f"{text[:60]}..."
        raise FormatError(f"value {shown!r} is not a number", allowed=_ALLOWED)
    return -0.0 if value == 0 and sign < 0 else value


def _fraction(text: str) -> Fraction | None:
    above, slash, below = text.partition("/")
    if slash:
        parts = (_fraction(above), _fraction(below) if "/" not in below else None)
        return None if parts[0] is None or parts[1] is None else parts[0] / parts[1]
    if found := _DECIMAL.fullmatch(text):
        _check_exponent(found.group(4))
        return Fraction(text)
    if found := _POWER.fullmatch(text):
        _check_exponent(found.group(2))
        return Fraction(2) ** int(found.group(2)) * (-1 if found.group(1) == "-" else 1)
    if (found := _HEXADECIMAL.fullmatch(text)) and (found.group(2) or found.group(3)):
        sign, whole, rest, exponent = found.groups()
        _check_exponent(exponent)
        magnitude = int(whole + rest, 16) * Fraction(2) ** (int(exponent or 0) - 4 * len(rest))
        return -magnitude if sign == "-" else magnitude
    return None


def _check_exponent(text: str | None) -> None:
    if text and (len(text) > 8 or abs(int(text)) > _LARGEST_EXPONENT):
        raise OverflowError


def exact_value(value: float | Fraction) -> Value:
    """Return a Python number as an exact one."""
    if isinstance(value, Fraction):
        return value
    number = float(value)
    finite = math.isfinite(number) and not (number == 0 and math.copysign(1.0, number) < 0)
    return Fraction(value) if finite else number


def is_finite(value: Value) -> bool:
    """Return whether a value is neither infinite nor NaN."""
    return isinstance(value, Fraction) or math.isfinite(value)


def parse_code(text: str, format: ElementFormat) -> int:
    """Return the code that ``text`` writes in hexadecimal (0x), binary (0b) or decimal.

    Raises:
        FormatError: It writes no whole number, or one that is no code of the format.
    """
    last = (len(format.values) if isinstance(format, Codebook) else 1 << format.bits) - 1
    try:
        code = int(text.strip(), 0)
    except ValueError:
        raise FormatError(
            f"code {text[:80]!r} is not a whole number", allowed=f"0x{last:x}, 0b{last:b} or {last}, for example"
        ) from None
    if not 0 <= code <= last:
        raise FormatError(f"code {text[:80]} of {format.name}", allowed=f"0 to {last} (0x{last:x})")
    return code
