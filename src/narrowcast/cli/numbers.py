"""Numbers as the format commands write them: e-notation that can be typed back, powers of two, and plain ASCII."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

from rich.console import Console
from rich.text import Text

__all__ = ["brief", "count", "dyadic", "json_number", "plain", "power_of_two", "signed"]

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_LOWERED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_ASCII = str.maketrans(
    {"×": "x", "−": "-", "–": "-", "…": "...", "→": ">", "·": "-", "●": "#", "○": "o", "◆": "X", "┼": "+", "─": "-"}
    | {"≈": "~", "≤": "<", "│": "|", "├": "|", "┤": "|"}
)


def brief(value: float, width: int = 15) -> str:
    """Return a number exactly where that takes up to ``width`` characters, else to six digits."""
    if not math.isfinite(value):
        return str(value)
    exact = f"{Decimal(value)}".lower()
    return exact if len(exact) <= width else f"{value:.6g}"


def signed(value: Fraction | float) -> str:
    """Return a number with its sign, to four digits."""
    return "0" if not value else f"{_float(value):+.4g}"


def _float(value: Fraction | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def power_of_two(value: float, *, raised: bool = True) -> str:
    """Return 2⁻⁹ for such a power; "" for other numbers.

    >>> power_of_two(0.001953125), power_of_two(3.0)
    ('2⁻⁹', '')
    """
    if value <= 0 or math.frexp(value)[0] != 0.5:
        return ""
    exponent = str(math.frexp(value)[1] - 1)
    return f"2{exponent.translate(_RAISED)}" if raised else f"2^{exponent}"


def dyadic(value: Fraction) -> str:
    """Return an odd number times a power of two, for example 205 × 2⁻¹¹."""
    twos = (value.numerator & -value.numerator).bit_length() - 1 if value else 0
    exponent = twos - (value.denominator.bit_length() - 1)
    odd = value.numerator >> twos
    return str(odd) if not exponent else f"{odd} × 2{str(exponent).translate(_RAISED)}"


def count(number: int) -> str:
    """Return a count with thousands marked, a huge one as a power of ten.

    >>> count(255), count(65535)
    ('255', '65,535')
    """
    return f"{number:,}" if number < 10**7 else f"{number:.3g}"


def json_number(value: float | Fraction | None) -> float | str | None:
    """Return a number that JSON has, or the name of one that it lacks."""
    if value is None:
        return None
    number = _float(value)
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    return number


def plain(text: str | Text, console: Console) -> Text:
    """Return a text as it is, or in ASCII where the console has no more."""
    if console.options.ascii_only:
        return Text(_ascii(text if isinstance(text, str) else text.plain))
    return Text(text) if isinstance(text, str) else text


def _ascii(text: str) -> str:
    for mark in "⁻⁰¹²³⁴⁵⁶⁷⁸⁹":
        text = text.replace(f"2{mark}", f"2^{mark}")
    return text.translate(_LOWERED).translate(_ASCII).encode("ascii", "replace").decode("ascii")
