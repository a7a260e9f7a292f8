"""What the machine and the server's own process do."""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil

__all__ = ["Host", "HostMeter"]

#: Two looks at the processor that are closer than this would say little; the first is said again.
_SHORTEST_SECONDS = 1.0


@dataclass(frozen=True)
class Host:
    """The machine and this process now.

    Attributes:
        utilization: Share of the processors' time that was used since the look before, 0 to 1.
        memory_total: Bytes of the machine.
        memory_used: Bytes of the machine that nobody else can have.
        process_seconds: Processor time of this process so far.
        process_memory: Resident bytes of this process.
        started: When this process began, in seconds since the epoch.
        descriptors: Open files and sockets of this process.
    """

    utilization: float
    memory_total: int
    memory_used: int
    process_seconds: float
    process_memory: int
    started: float
    descriptors: int


class HostMeter:
    """Looks at the machine; utilisation is that between two looks."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._looked = time.monotonic()
        self._busy, self._all = _times()
        self._utilization = 0.0

    def read(self) -> Host:
        """Return what the machine does now."""
        now = time.monotonic()
        if now - self._looked >= _SHORTEST_SECONDS:
            busy, total = _times()
            if total > self._all:
                self._utilization = min(1.0, max(0.0, (busy - self._busy) / (total - self._all)))
            self._looked, self._busy, self._all = now, busy, total
        memory = psutil.virtual_memory()
        with self._process.oneshot():
            times = self._process.cpu_times()
            return Host(
                self._utilization,
                memory.total,
                memory.total - memory.available,
                times.user + times.system,
                self._process.memory_info().rss,
                self._process.create_time(),
                self._process.num_fds(),
            )


def _times() -> tuple[float, float]:
    """Return the processors' seconds that were used, and all of them, since the machine began."""
    times: dict[str, float] = psutil.cpu_times()._asdict()  # which there are depends on the system
    total = sum(
        seconds for kind, seconds in times.items() if not kind.startswith("guest")
    )  # users' time has guests' too
    return total - times["idle"] - times.get("iowait", 0.0), total
