"""How far a run is; apart from the other values, so that sender processes load little."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Progress"]


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        seconds: Since its start.
        due: Requests until now.
        ok: Good answers until now.
        failed: Requests without one until now.
        latencies: Seconds of the good answers since the last report.
        failures: Seconds from when a request was due until it failed, of those since the last report.
        since: Seconds after the start of the last report; those requests ended after it.
    """

    seconds: float
    due: int
    ok: int
    failed: int
    latencies: tuple[float, ...]
    failures: tuple[float, ...] = ()
    since: float = 0.0
