"""What a line of the log says to programs, beside the words that it says to people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["fields"]


def fields(event: str, **values: str | float | Mapping[str, float]) -> dict[str, Any]:
    """Return what a call of the standard logger takes as ``extra``.

    Args:
        event: What happened, a name that stays the same from version to version, such as ``model_ready``.
        values: What it happened to.

    >>> fields("model_ready", model="net", version="3")
    {'event': 'model_ready', 'values': {'model': 'net', 'version': '3'}}
    """
    return {"event": event, "values": values}
