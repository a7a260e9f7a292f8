"""What a finished run says of itself, and the files that say it."""

from __future__ import annotations

import os
import platform
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from narrowcast.data.dataset import Dataset
from narrowcast.models.reference import RUN_RECORD
from narrowcast.models.runs import WEIGHTS, sha256_of
from narrowcast.training.objectives import Result
from narrowcast.training.writing import written

__all__ = ["Environment", "Part", "RunResult", "environment", "read_result", "write_result", "write_weights"]

_PACKAGES = ("narrowcast", "torch", "torchvision", "timm", "torchao", "triton", "numpy", "safetensors")


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True)


class Part(_Value):
    """A part of the data.

    Attributes:
        source: Its reference.
        samples: How many.
        sha256: Hash of the data that the reference names, before they are split.
    """

    source: str
    samples: int
    sha256: str


class Environment(_Value):
    """Where a run was computed.

    Attributes:
        device: Name of the GPU, or of the processor.
        threads: Threads on the CPU.
        processes: Processes that trained together.
        system: Operating system.
        versions: Versions of Python and of packages.
    """

    device: str
    threads: int
    processes: int
    system: str
    versions: dict[str, str]


class RunResult(_Value):
    """A finished run; ``result.json`` is this value.

    Attributes:
        model: Reference of the network that was trained.
        arguments: Of its constructor.
        input: Shape of a sample, where it was chosen.
        sha256: Of ``model.safetensors``.
        parameters: Parameters that were trained.
        precision: Name of the policy.
        seed: Of everything random.
        split_seed: Of the split: give it to ``narrowcast optimize`` as ``--seed`` if it is not 0.
        parts: ``train``, ``validation`` and ``report``; the last was not trained on.
        validation: The last score on the validation part.
        report: The score on the report part, of ``model.safetensors`` in FP32.
        loss: The last loss that was logged; None if none was.
        steps: Updates of the weights.
        skipped: Updates that were left out.
        seconds: Wall time, over all resumptions.
        doctor: What the doctor says of the numbers; None where it was off.
        environment: Where it was computed.
    """

    model: str
    arguments: dict[str, Any]
    input: tuple[int, ...] | None
    sha256: str
    parameters: int
    precision: str
    seed: int
    split_seed: int
    parts: dict[str, Part]
    validation: Result | None
    report: Result
    loss: float | None
    steps: int
    skipped: int
    seconds: float
    doctor: tuple[str, ...] | None
    environment: Environment


def part_of(data: Dataset) -> Part:
    """Return what a result says of a part of the data."""
    return Part(source=data.source, samples=data.size, sha256=data.sha256)


def environment(device: torch.device, processes: int) -> Environment:
    """Return where this process computes."""
    return Environment(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        threads=torch.get_num_threads(),
        processes=processes,
        system=f"{platform.system()} {platform.release()}",
        versions={"python": platform.python_version(), **_versions()},
    )


def write_weights(folder: Path, state: dict[str, torch.Tensor]) -> str:
    """Write weights as safetensors, whole or not at all, and return the file's SHA-256.

    Raises:
        OutputError: The file cannot be written.
    """
    from safetensors.torch import save_file

    file, partial = folder / WEIGHTS, folder / f".{WEIGHTS}.partial"
    with _written(file):
        # A copy each: tied weights share memory, which the format does not have.
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, partial)
        partial.chmod(0o644)
        partial.replace(file)
        return sha256_of(file)


def write_result(folder: Path, result: RunResult) -> None:
    """Write ``result.json``, whole or not at all.

    Raises:
        OutputError: The file cannot be written.
    """
    file, partial = folder / RUN_RECORD, folder / f".{RUN_RECORD}.partial"
    with _written(file):
        partial.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
        partial.replace(file)


def _written(file: Path) -> AbstractContextManager[None]:
    """Turn what the system says of a file into an error; training is done by then, and in the last checkpoint."""
    return written(str(file), elsewhere="have the folder writable again", then="--resume then writes it")


def read_result(folder: Path) -> RunResult | None:
    """Return what a finished run says of itself; None if it is not finished."""
    file = folder / RUN_RECORD
    return RunResult.model_validate_json(file.read_text(encoding="utf-8")) if file.is_file() else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or os.uname().machine


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
