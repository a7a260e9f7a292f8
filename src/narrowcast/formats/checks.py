"""Options of a wrong type: refused by name, before anything is worked out from them or looked up by them."""

from __future__ import annotations

import operator
from collections.abc import Mapping

from narrowcast.errors import FormatError

__all__ = ["check_words", "real", "truth", "whole"]


def whole(name: str, value: object, least: int | None = None) -> int:
    """Return an option that is a whole number, of Python's or NumPy's, as Python's.

    Raises:
        FormatError: Anything else, or less than ``least``.
    """
    allowed = "a whole number" if least is None else f"a whole number, {least} or more"
    if isinstance(value, bool):
        raise _refused(name, value, allowed)
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise _refused(name, value, allowed) from None
    if least is not None and number < least:
        raise _refused(name, value, allowed)
    return number


def truth(name: str, value: object) -> bool:
    """Return an option that is true or false.

    Raises:
        FormatError: Anything but Python's own ``bool``.
    """
    if not isinstance(value, bool):
        raise _refused(name, value, "True or False")
    return value


def real(name: str, value: object) -> float:
    """Return an option that is a number.

    Raises:
        FormatError: Anything else; text too.
    """
    try:
        if isinstance(value, str | bytes | bool):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise _refused(name, value, "a number") from None


def check_words(options: Mapping[str, object]) -> None:
    """Check that options are text, or None where the caller leaves the choice open.

    Raises:
        FormatError: One is neither.
    """
    for name, value in options.items():
        if not (value is None or isinstance(value, str)):
            raise _refused(name, value, "a name, as text")


def _refused(name: str, value: object, allowed: str) -> FormatError:
    return FormatError(f"{name} = {value!r:.100}", allowed=allowed)
