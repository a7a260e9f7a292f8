"""What NVIDIA GPUs do, as NVML says; nothing where there is no such GPU, driver or package.

``python -m narrowcast.serving.watching.gpus`` prints what it finds on this machine.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

__all__ = ["Gpu", "Gpus", "Nvml"]


class Nvml(Protocol):
    """What is used of the package ``nvidia-ml-py``, whose module has these functions."""

    NVMLError: type[Exception]

    def nvmlInit(self) -> None: ...  # noqa: N802  NVML's names
    def nvmlShutdown(self) -> None: ...  # noqa: N802
    def nvmlDeviceGetCount(self) -> int: ...  # noqa: N802
    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any: ...  # noqa: N802
    def nvmlDeviceGetUUID(self, handle: Any) -> str: ...  # noqa: N802
    def nvmlDeviceGetName(self, handle: Any) -> str: ...  # noqa: N802
    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any: ...  # noqa: N802
    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any: ...  # noqa: N802
    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int: ...  # noqa: N802
    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Any) -> int: ...  # noqa: N802
    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int: ...  # noqa: N802


@dataclass(frozen=True)
class Gpu:
    """One GPU now; None is what this GPU does not say.

    Attributes:
        uuid: Its name for programs.
        name: Its name for people.
        utilization: Share of the last sampling period (between 1/6 s and 1 s, by product) in which a kernel ran.
        memory_total: Bytes.
        memory_used: Bytes.
        power: Watts.
        power_limit: Watts.
        energy: Joules since it was first looked at.
    """

    uuid: str
    name: str
    utilization: float | None = None
    memory_total: int | None = None
    memory_used: int | None = None
    power: float | None = None
    power_limit: float | None = None
    energy: float | None = None


class Gpus:
    """All GPUs of the machine that NVML shows.

    Args:
        nvml: NVML, not yet initialised.

    Raises:
        Exception: ``nvml.NVMLError``, where the driver is missing or refuses.
    """

    def __init__(self, nvml: Nvml) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        indices = range(self._ask(lambda _: nvml.nvmlDeviceGetCount(), None) or 0)
        found = [self._ask(nvml.nvmlDeviceGetHandleByIndex, index) for index in indices]
        self._handles = [handle for handle in found if handle is not None]
        self._energy_before = [self._ask(nvml.nvmlDeviceGetTotalEnergyConsumption, handle) for handle in self._handles]

    @staticmethod
    def find() -> Gpus | None:
        """Return the GPUs of this machine, or None where the package, the driver or a GPU is missing."""
        try:
            import pynvml
        except ImportError:
            return None
        nvml = cast(Nvml, pynvml)
        try:
            gpus = Gpus(nvml)
        except nvml.NVMLError:
            return None
        if gpus.read():
            return gpus
        gpus.close()
        return None

    def read(self) -> list[Gpu]:
        """Return what the GPUs do now; it takes about a millisecond for each."""
        found = zip(self._handles, self._energy_before, strict=True)
        return [gpu for gpu in (self._read(handle, before) for handle, before in found) if gpu is not None]

    def _read(self, handle: Any, energy_before: int | None) -> Gpu | None:
        """Return one GPU; None where it does not even say its name: it has fallen off its bus."""
        nvml, ask = self._nvml, self._ask
        uuid, name = ask(nvml.nvmlDeviceGetUUID, handle), ask(nvml.nvmlDeviceGetName, handle)
        if uuid is None:
            return None
        rates = ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        memory = ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        power, limit = ask(nvml.nvmlDeviceGetPowerUsage, handle), ask(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        energy = ask(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        return Gpu(
            uuid,
            name or "",
            None if rates is None else rates.gpu / 100,
            None if memory is None else memory.total,
            None if memory is None else memory.used,
            None if power is None else power / 1000,
            None if limit is None else limit / 1000,
            None if energy is None or energy_before is None else (energy - energy_before) / 1000,
        )

    def _ask(self, question: Callable[[Any], Any], handle: Any) -> Any:
        """Return an answer of NVML, or None where this GPU has none."""
        try:
            return question(handle)
        except self._nvml.NVMLError:
            return None

    def close(self) -> None:
        """Let go of the driver."""
        self._nvml.nvmlShutdown()


def main() -> int:
    """Print the GPUs of this machine as JSON; the exit code is 1 where there is none."""
    gpus = Gpus.find()
    found = [] if gpus is None else gpus.read()
    sys.stdout.write(json.dumps([asdict(gpu) for gpu in found], indent=1) + "\n")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
