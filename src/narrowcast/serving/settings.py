"""What a person types about serving, as values."""

from __future__ import annotations

import re

from narrowcast.errors import ConfigError, choices
from narrowcast.serving.repository import VersionPolicy
from narrowcast.serving.workers.sources import Placement

__all__ = ["read_placement", "read_versions"]

_NAMED = re.compile(r"=\d{1,18}(,\d{1,18})*")
_LATEST = re.compile(r"[1-9]\d{0,5}")


def read_placement(text: str) -> Placement:
    """Return where models run.

    Raises:
        ConfigError: There is no such place.
    """
    try:
        return Placement(text)
    except ValueError:
        raise ConfigError(f"placement {text!r} is unknown", allowed=choices(text, list(Placement))) from None


def read_versions(text: str) -> VersionPolicy:
    """Return which versions are loaded: ``2`` for the two newest, ``all``, or ``=3,7`` for these.

    Raises:
        ConfigError: The text is none of these.
    """
    if text == "all":
        return VersionPolicy(latest=0)
    if _LATEST.fullmatch(text):
        return VersionPolicy(latest=int(text))
    if _NAMED.fullmatch(text):
        return VersionPolicy(named=tuple(int(number) for number in text[1:].split(",")))
    raise ConfigError(f"versions {text!r} cannot be read", allowed="a number of the newest, all, or numbers as in =3,7")
