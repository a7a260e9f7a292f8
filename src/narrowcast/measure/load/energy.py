"""Energy counters: of processor packages through Linux's powercap, of NVIDIA GPUs through NVML.

Sources: Linux, Documentation/power/powercap/powercap.rst (``energy_uj``, ``max_energy_range_uj``); NVML API reference,
``nvmlDeviceGetTotalEnergyConsumption`` (millijoules since the driver was loaded).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narrowcast.measure.load.values import Energy

__all__ = ["EnergyMeter", "open_meter"]

_POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class _Counter:
    """One counter: its name, what reads it in joules, and the joules after which it begins again at 0 (0: never)."""

    name: str
    read: Callable[[], float]
    wraps: float = 0.0


class EnergyMeter:
    """Counters that were found on this machine.

    Args:
        counters: All of them; none is no error.
        unavailable: Why there are none.
    """

    def __init__(self, counters: list[_Counter], unavailable: str) -> None:
        self._counters = counters
        self._unavailable = "" if counters else unavailable
        self._begun = [counter.read() for counter in counters]

    def start(self) -> None:
        """Count from here."""
        self._begun = [counter.read() for counter in self._counters]

    def spent(self, answers: int) -> Energy:
        """Return what was spent since the start.

        Args:
            answers: Good answers that it was spent on.
        """
        joules: dict[str, float] = {}
        for counter, before in zip(self._counters, self._begun, strict=True):
            spent = counter.read() - before
            joules[counter.name] = spent if spent >= 0 else spent + counter.wraps
        each = sum(joules.values()) / answers if joules and answers else None
        return Energy(joules=joules, per_request=each, unavailable=self._unavailable)


def open_meter(*, local: bool, powercap: Path = _POWERCAP) -> EnergyMeter:
    """Return the counters of this machine that can be read.

    Args:
        local: Whether the server is on this machine; counters say nothing of another.
        powercap: Where the counters of processors are.
    """
    if not local:
        return EnergyMeter([], "unavailable: the server is on another machine")
    packages, closed = _packages(powercap)
    counters = [*packages, *_gpus()]
    why = "its counter may be read by root alone" if closed else "this machine has no energy counter"
    return EnergyMeter(counters, f"unavailable: {why}")


def _packages(powercap: Path) -> tuple[list[_Counter], bool]:
    """Return the counters of processor packages, and whether there are some that must not be read."""
    found: list[_Counter] = []
    closed = False
    for folder in sorted(powercap.glob("intel-rapl:*")):
        if folder.name.count(":") > 1:
            continue  # a part of a package: its energy is the package's too
        try:
            name = (folder / "name").read_text(encoding="ascii").strip()
            wraps = int((folder / "max_energy_range_uj").read_text(encoding="ascii")) / 1e6
            file = folder / "energy_uj"
            file.read_text(encoding="ascii")
        except PermissionError:
            closed = True
            continue
        except OSError:
            continue
        found.append(_Counter(name, lambda file=file: int(file.read_text(encoding="ascii")) / 1e6, wraps))
    return found, closed


def _gpus() -> list[_Counter]:
    """Return the counters of GPUs; none without NVIDIA's library or driver."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return []
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(place) for place in range(nvml.nvmlDeviceGetCount())]
        for handle in handles:
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:
        return []
    read = nvml.nvmlDeviceGetTotalEnergyConsumption
    return [_Counter(f"gpu-{place}", lambda handle=handle: read(handle) / 1e3) for place, handle in enumerate(handles)]
