"""How far a run is; apart from the other values, so that sender processes load little."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Progress"]


@dataclass(frozen=True)
class Progress:
    """How far a run is: seconds after its start, requests due, good answers, others, and latencies since the last report."""

    seconds: float
    due: int
    ok: int
    failed: int
    latencies: tuple[float, ...]
