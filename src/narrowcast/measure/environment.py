"""The machine and the software, as far as they decide what a number means."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from narrowcast.artifacts.manifest import Environment

__all__ = ["environment", "versions_of"]

_INSTRUCTIONS = [
    "avx2",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "sve",
    "bf16",
]
_PACKAGES = [
    "narrowcast",
    "numpy",
    "onnx",
    "onnxruntime",
    "openvino",
    "torch",
    "torchvision",
    "timm",
    "onnxscript",
    "scikit-image",
    "scikit-learn",
]


def environment() -> Environment:
    """Return what this process can read of its machine and its libraries."""
    flags = _cpu_field("flags", "Features").split()
    return Environment(
        processor=_cpu_field("model name", "Hardware") or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1),
        instructions=tuple(name for name in _INSTRUCTIONS if name in flags),
        governor=_governor(),
        memory_bytes=int(psutil.virtual_memory().total),
        system=f"{platform.system()} {platform.release()}",
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        versions={"python": platform.python_version(), **versions_of(_PACKAGES)},
    )


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found: dict[str, str] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu_field(*names: str) -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() in names:
            return value.strip()
    return ""


def _governor() -> str | None:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
