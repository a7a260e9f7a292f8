"""Numbers as people read them: bytes, seconds, shares, decibels, intervals and ties.

Everything here takes a value and returns text; a value that is None, NaN or infinite becomes an en dash.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeGuard

from narrowcast.artifacts.manifest import MetricRecord

__all__ = [
    "MISSING",
    "Format",
    "accuracy",
    "apart",
    "ascii_of",
    "byte_rate",
    "count",
    "decibels",
    "drop",
    "finite",
    "flop_rate",
    "format_name",
    "integer",
    "interval",
    "is_percent",
    "label",
    "noise",
    "number",
    "part",
    "portion",
    "printable",
    "quantity",
    "ratio",
    "share",
    "tail",
    "tie",
    "unitless",
    "when",
]

#: What stands where there is no number.
MISSING = "–"

#: From a value and a number of extra digits to text.
Format = Callable[[float, int], str]

_SPACE = "\N{NO-BREAK SPACE}"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_LOWERED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_ASCII = str.maketrans(
    {"–": "-", "−": "-", "×": "x", "µ": "u", "…": "...", "→": ">", "·": "-", "█": "#", "”": '"', _SPACE: " "}
)
_SECONDS = {"s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_BYTES = {
    "b": 1.0,
    "byte": 1.0,
    "bytes": 1.0,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_FACTORS = {"x", "×", "ratio", "times"}


def finite(value: float | None) -> TypeGuard[float]:
    """Return whether there is a number to show."""
    return value is not None and math.isfinite(value)


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits and no exponent that a computer would write.

    >>> number(1234.5), number(0.01234), number(0.0000123), number(-2.0)
    ('1,234', '0.0123', '1.23×10⁻⁵', '−2.00')
    """
    if not finite(value):
        return MISSING
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if -4 <= power < 7:
        text = f"{value:,.{max(0, digits - 1 - power)}f}"
    else:
        text = f"{value / 10.0**power:.{digits - 1}f}×10{str(power).translate(_RAISED)}"
    return text.replace("-", "−")


def integer(value: float | None) -> str:
    """Return a whole number with thousands marked."""
    return f"{round(value):,}".replace("-", "−") if finite(value) else MISSING


def share(value: float | None, extra: int = 0, decimals: int = 1) -> str:
    """Return a share as a percentage.

    >>> share(0.9453), share(0.9453, 1)
    ('94.5%', '94.53%')
    """
    return f"{value * 100:.{decimals + extra}f}%".replace("-", "−") if finite(value) else MISSING


def quantity(value: float | None, unit: str, extra: int = 0) -> str:
    """Return a value with its unit, seconds and bytes scaled to what reads best (1 MB is 1,000,000 bytes).

    >>> quantity(0.01234, "s").replace(chr(160), " "), quantity(4.8e6, "bytes").replace(chr(160), " ")
    ('12.3 ms', '4.80 MB')
    """
    if not finite(value):
        return MISSING
    name = unit.strip()
    if name.lower() in _SECONDS:
        return _scaled(value * _SECONDS[name.lower()], ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")), extra)
    if name.lower() in _BYTES:
        size = value * _BYTES[name.lower()]
        if abs(size) < 1000:
            return f"{integer(size)}{_SPACE}B"
        return _scaled(size, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")), extra)
    if name == "%":
        return f"{value:.{2 + extra}f}%".replace("-", "−")
    if name.lower() in _FACTORS:
        return ratio(value, extra)
    text = integer(value) if float(value).is_integer() else number(value, 3 + extra)
    return f"{text}{_SPACE}{name}" if name else text


def _scaled(value: float, scales: tuple[tuple[float, str], ...], extra: int) -> str:
    for factor, unit in scales:
        if abs(value) >= factor * 0.9995 or (factor, unit) == scales[-1]:
            return f"{number(value / factor, 3 + extra)}{_SPACE}{unit}"
    raise AssertionError("the last scale takes all values")


def count(value: float | None, unit: str = "") -> str:
    """Return a count or a rate with a decimal prefix.

    >>> [count(value).replace(chr(160), " ") for value in (25_557_032, 4_000_000_000, 999, 0.25)]
    ['25.6 M', '4.00 G', '999', '0.250']
    """
    if not finite(value):
        return MISSING
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * 0.9995:
            return f"{number(value / factor)}{_SPACE}{prefix}{unit}"
    shown = integer(value) if float(value).is_integer() else number(value)
    return f"{shown}{_SPACE if unit else ''}{unit}"


def flop_rate(value: float | None) -> str:
    """Return floating-point operations per second."""
    return count(value, "FLOP/s")


def byte_rate(value: float | None) -> str:
    """Return a bandwidth."""
    return count(value, "B/s")


def ratio(value: float | None, extra: int = 0) -> str:
    """Return how many times.

    >>> ratio(2.314), ratio(12.04)
    ('2.31×', '12.0×')
    """
    if finite(value) and 0.1 <= value < 10:
        return f"{value:.{2 + extra}f}×"
    return f"{number(value, 3 + extra)}×" if finite(value) else MISSING


def is_percent(metric: MetricRecord) -> bool:
    """Return whether a metric is a share of samples, which reads best as a percentage."""
    return metric.unit == "" and metric.higher_is_better and not metric.name.startswith(("cosine", "py:"))


def accuracy(metric: MetricRecord) -> Format:
    """Return how values of a metric are written; an infinite SQNR (no noise at all) is "exact"."""
    if metric.unit == "dB":
        return lambda value, extra: decibels(value) if math.isinf(value) else _measured(value, metric.unit, 4 + extra)
    if is_percent(metric):
        return lambda value, extra: share(value, extra, decimals=2)
    return lambda value, extra: _measured(value, metric.unit, 4 + extra)


def drop(metric: MetricRecord) -> Format:
    """Return how differences of a metric are written; those of a percentage are in points."""
    if is_percent(metric):
        return lambda value, extra: (
            f"{value * 100:.{2 + extra}f}{_SPACE}points".replace("-", "−") if finite(value) else MISSING
        )
    return lambda value, extra: _measured(value, metric.unit, 3 + extra)


def _measured(value: float, unit: str, digits: int) -> str:
    return f"{number(value, digits)}{_SPACE}{unit}" if unit and finite(value) else number(value, digits)


def noise(value: float | None) -> str:
    """Return a share of energy over many decades."""
    return number(value, 2)


def decibels(value: float | None) -> str:
    """Return an SQNR without its unit; infinite is "exact" (no noise at all), minus infinity "lost".

    >>> decibels(41.1256), decibels(float("inf"))
    ('41.1', 'exact')
    """
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "exact" if value > 0 else "lost"
    return f"{value:.1f}".replace("-", "−")


def part(value: float | None) -> str:
    """Return a share that may be tiny as a percentage, none at all as 0.

    >>> part(0.1386), part(0.0), part(4.4e-7)
    ('13.9%', '0', '<0.01%')
    """
    if not finite(value):
        return MISSING
    if not value:
        return "0"
    return "<0.01%" if value < 1e-4 else f"{100 * value:.3g}%"


def portion(value: float | None) -> str:
    """Return a share to a tenth of a percent, for columns of shares.

    >>> portion(0.1386), portion(0.0), portion(4.4e-7)
    ('13.9%', '0', '<0.1%')
    """
    return "<0.1%" if finite(value) and 0 < value < 0.0005 else share(value) if value else "0"


def apart(first: float, second: float, form: Format) -> tuple[str, str]:
    """Return two values as texts, with digits added until different values read differently."""
    for extra in range(4):
        texts = form(first, extra), form(second, extra)
        if texts[0] != texts[1] or first == second:
            return texts
    return form(first, 4), form(second, 4)


def interval(low: float | None, high: float | None, form: Format) -> str:
    """Return an interval, its unit written once; empty where there is none.

    >>> interval(0.0121, 0.0129, lambda value, extra: quantity(value, "s", extra)).replace(chr(160), " ")
    '12.1 to 12.9 ms'
    """
    if not (finite(low) and finite(high)):
        return ""
    first, second = apart(low, high, form)
    left, right = _split(first), _split(second)
    return f"{left[0]} to {second}" if left[1] == right[1] else f"{first} to {second}"


def unitless(span: str) -> str:
    """Return an interval without its unit, for where the value before it has the same one.

    >>> unitless("2.28 to 2.33×")
    '2.28 to 2.33'
    """
    first, _, second = span.partition(" to ")
    return f"{first} to {_split(second)[0]}" if second and not _split(first)[1] else span


def _split(text: str) -> tuple[str, str]:
    match = re.fullmatch(r"(−?[\d.,]+(?:×10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)?)(.*)", text)
    return (match.group(1), match.group(2)) if match else (text, "")


def tie(low: float | None, high: float | None, same: float = 1.0) -> bool:
    """Return whether an interval holds the value that means "no difference"."""
    return finite(low) and finite(high) and low <= same <= high


def format_name(name: str) -> str:
    """Return a number format as people write it: ``int8`` is INT8."""
    return name.upper()


def printable(words: str, keep: str = "\xa0") -> str:
    """Return words with a sign in place of each letter that cannot be printed and is not to be kept."""
    return "".join(mark if mark.isprintable() or mark in keep else "\N{REPLACEMENT CHARACTER}" for mark in words)


def label(name: str, width: int = 36) -> str:
    """Return a name that fits: what cannot be printed is replaced, the middle of a long one left out.

    >>> label("/features/features.12/conv/conv.0/Conv_output_0", 24)
    '/features/f…onv_output_0'
    """
    clean = printable(name)
    if len(clean) <= width:
        return clean
    tail = width // 2
    return f"{clean[: width - tail - 1]}…{clean[-tail:]}"


def tail(name: str, width: int = 36) -> str:
    """Return the end of a name that is too long: what tells the tensors of a model apart.

    >>> tail("encoder.layer.0.output.dense.weight", 24)
    '…r.0.output.dense.weight'
    """
    clean = label(name, max(len(name), 1))
    return clean if len(clean) <= width else f"…{clean[1 - width :]}"


def when(created: str) -> str:
    """Return a time for people; a text that is no ISO 8601 time comes back as it is."""
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"


def ascii_of(text: str) -> str:
    """Return a text that a terminal without Unicode can show."""
    plain = re.sub(r"×10(?=[⁻⁰¹²³⁴⁵⁶⁷⁸⁹])", "e", text).replace("✓", "yes").replace("✗", "no")
    return plain.translate(_LOWERED).translate(_ASCII).encode("ascii", "replace").decode("ascii")
