"""The device catalogue: what a device can compute and move per second, and where each number comes from.

>>> device("h100").memory.bandwidth  # GB/s, from clock, bus and memory type
3352.32
>>> device("rtx-4090").peak("fp16").tflops  # FP32 accumulation, what frameworks use
165.2
>>> device("rtx-4090").peak("fp16", accumulator="fp16").tflops
330.3

The numbers lie in ``devices.toml`` beside this file. Devices in the user's own ``narrowcast/devices.toml``, in the same
form, are added, and replace those of the same name; among them this machine as measured, ``auto`` (:func:`save_device`).
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from narrowcast.accounting.efficiencies import RuntimeModel
from narrowcast.errors import DeviceError, FormatError
from narrowcast.formats.blocks import BlockFormat
from narrowcast.formats.table import get

__all__ = [
    "FAMILIES",
    "MEASURED",
    "Accumulator",
    "Device",
    "Launch",
    "Memory",
    "MemoryType",
    "Peak",
    "Unit",
    "device",
    "devices",
    "memory_types",
    "save_device",
    "user_catalogue",
]

Accumulator = Literal["fp16", "fp32", "fp64", "int32"]
Unit = Literal["tensor core", "vector", "matrix extension", "npu"]

#: Formats that run at one rate, by the name under which peaks state it.
FAMILIES: dict[str, tuple[str, ...]] = {
    "fp8": ("e4m3fn", "e5m2", "e4m3", "e4m3fnuz", "e5m2fnuz"),
    "fp6": ("e3m2", "e2m3"),
    "fp4": ("e2m1",),
}
#: What hardware computes in and ``narrowcast.formats`` has no need to encode.
_HARDWARE_ONLY = ("int1",)
_RATES = {member: family for family, members in FAMILIES.items() for member in members} | {
    "uint8": "int8",
    "uint4": "int4",
}

#: Names of this machine's own devices, and the commands that measure them.
MEASURED = {"auto": "narrowcast devices --measure cpu", "auto-cuda": "narrowcast devices --measure cuda"}

_Text = Annotated[str, Field(min_length=1)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MemoryType(_Frozen):
    """What all memories of a type share.

    Args:
        transfers: Bits that a pin moves per memory clock.
        source: Where that is written.
    """

    transfers: PositiveInt
    source: _Text


class Memory(_Frozen):
    """A device's memory. What no source states is None.

    Args:
        size_gb: Its size as the vendor states it, where GB are binary (2**30 bytes).
        type: ``GDDR6``, ``HBM3``, ...; see :func:`memory_types`.
        clock_mhz: The clock that the type's transfers are counted on.
        bus_bits: Data pins.
        stated_gbs: Bandwidth as the vendor states it, in 1e9 bytes per second; often rounded.
        source: Where the numbers come from.
        clock_source: Where the clock and the bus come from, if from somewhere else.
        cache_mb: The largest cache, in 2**20 bytes.
    """

    size_gb: _Positive | None = None
    type: str | None = None
    clock_mhz: _Positive | None = None
    bus_bits: PositiveInt | None = None
    stated_gbs: _Positive | None = None
    source: str = ""
    clock_source: str | None = None
    cache_mb: _Positive | None = None

    @model_validator(mode="after")
    def _of_a_known_type(self) -> Self:
        if self.type is not None and self.type not in memory_types():
            raise ValueError(f"memory type {self.type!r} is none of {', '.join(memory_types())}")
        return self

    @property
    def computed_gbs(self) -> float | None:
        """Clock times transfers per clock times bus, in 1e9 bytes per second; None if one of them is not known.

        >>> Memory(type="GDDR6", clock_mhz=1750, bus_bits=256).computed_gbs
        448.0
        """
        if self.type is None or self.clock_mhz is None or self.bus_bits is None:
            return None
        return self.clock_mhz * memory_types()[self.type].transfers * self.bus_bits / 8 / 1000

    @property
    def bandwidth(self) -> float | None:
        """The computed bandwidth, or else the stated one, in 1e9 bytes per second."""
        return self.stated_gbs if self.computed_gbs is None else self.computed_gbs

    @property
    def bytes(self) -> int | None:
        """The size in bytes."""
        return None if self.size_gb is None else round(self.size_gb * 2**30)


class Peak(_Frozen):
    """The most that one kind of unit computes in one format, if data were always there.

    Args:
        dtype: What is multiplied: a number format, or a family of :data:`FAMILIES`.
        accumulator: What products are summed in; None where it is not stated.
        unit: ``tensor core`` (a GPU's matrix units), ``vector``, ``matrix extension`` (of a CPU), ``npu``.
        tflops: Dense, in 1e12 operations per second; a multiply-add is two.
        sparse_tflops: With structured sparsity, counting the products that are skipped.
        source: Where the numbers come from.
    """

    dtype: str
    accumulator: Accumulator | None = None
    unit: Unit
    tflops: _Positive
    sparse_tflops: _Positive | None = None
    source: str = ""

    @model_validator(mode="after")
    def _dense_is_no_more_than_sparse(self) -> Self:
        if self.sparse_tflops is not None and self.tflops > self.sparse_tflops:
            raise ValueError(f"dense peak {self.tflops:g} is more than the sparse one, {self.sparse_tflops:g}")
        _check_format(self.dtype)
        return self


class Launch(_Frozen):
    """What it costs to start a kernel.

    Args:
        microseconds: From one launch to the next when nothing else is in the way.
        source: Where that was stated or measured.
    """

    microseconds: _Positive
    source: str = ""


class Device(_Frozen):
    """What a program addresses as one device: a GPU, a socket, a system on a chip, an accelerator.

    Args:
        name: The name that commands take.
        title: The vendor's name.
        aliases: Other names that it answers to.
        vendor: Who makes it.
        kind: ``gpu``, ``cpu``, ``soc`` or ``npu``.
        architecture: The generation.
        capability: CUDA's compute capability, major and minor; None where there is no CUDA.
        year: Of its announcement.
        formats: What the hardware multiplies in, not what it can only convert.
        memory: Its memory.
        peaks: What it computes at most, per format and accumulator.
        launch: What it costs to start a kernel; None where nobody measured it.
        runtimes: What runtimes reach on it, where that was measured on this very device.
        source: Where every number comes from that names no other source.
        notes: What a reader of the numbers should know.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]*$")]
    title: _Text
    aliases: tuple[str, ...] = ()
    vendor: _Text
    kind: Literal["gpu", "cpu", "soc", "npu"]
    architecture: _Text
    capability: tuple[int, int] | None = None
    year: Annotated[int, Field(ge=1990, le=2100)]
    formats: tuple[str, ...]
    memory: Memory = Memory()
    peaks: tuple[Peak, ...] = ()
    launch: Launch | None = None
    runtimes: tuple[RuntimeModel, ...] = ()
    source: _Text
    notes: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _hand_the_source_down(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "source" not in given:
            return given
        table = cast("dict[str, Any]", given)

        def sourced(part: Any) -> Any:
            return {"source": table["source"]} | cast("dict[str, Any]", part) if isinstance(part, dict) else part

        parts = {key: sourced(table[key]) for key in ("memory", "launch") if key in table}
        if isinstance(table.get("peaks"), list):
            parts["peaks"] = [sourced(peak) for peak in table["peaks"]]
        return table | parts

    @model_validator(mode="after")
    def _computes_in_what_it_supports(self) -> Self:
        for format in self.formats:
            _check_format(format)
        for peak in self.peaks:
            if not self.supports(peak.dtype):
                raise ValueError(f"a peak in {peak.dtype}, which is not among formats")
        return self

    def supports(self, format: str) -> bool:
        """Return whether the hardware multiplies in a format, or in one of a family (``fp8``).

        Args:
            format: A name of :mod:`narrowcast.formats`, a family of :data:`FAMILIES`, or ``int1``.

        Raises:
            FormatError: If there is no such format.
        """
        name = _canonical(format)
        return any(member in self.formats for member in (name, *FAMILIES.get(name, ())))

    def peak(self, dtype: str, accumulator: Accumulator | None = None) -> Peak | None:
        """Return the fastest unit for a format, by its dense peak.

        Without an accumulator, one that sums in FP16 is taken only if there is no other: frameworks sum products of
        16 and 8 bits in FP32.

        Args:
            dtype: A format, a block format (its element counts), a family (``fp8``), or ``int1``.
            accumulator: Only units that sum in this.

        Returns:
            The peak; None if the device does not compute in the format, or nobody states how fast.

        Raises:
            FormatError: If there is no such format.
        """
        if not self.supports(dtype):
            return None
        rate = _rate(dtype)
        found = [peak for peak in self.peaks if peak.dtype == rate and accumulator in (None, peak.accumulator)]
        return max(found, key=lambda peak: (peak.accumulator != "fp16", peak.tflops), default=None)

    def ridge(self, dtype: str, accumulator: Accumulator | None = None) -> float | None:
        """Return the arithmetic intensity (FLOP per byte) from which on compute is the limit, not memory.

        Raises:
            FormatError: If there is no such format.
        """
        peak = self.peak(dtype, accumulator)
        if peak is None or self.memory.bandwidth is None:
            return None
        return peak.tflops * 1e12 / (self.memory.bandwidth * 1e9)


def _canonical(format: str) -> str:
    return format if format in FAMILIES or format in _HARDWARE_ONLY else get(format).name


def _rate(format: str) -> str:
    name = _canonical(format)
    if name in FAMILIES or name in _HARDWARE_ONLY:
        return name
    known = get(name)
    element = known.element.name if isinstance(known, BlockFormat) else known.name
    return _RATES.get(element, element)


def _check_format(name: str) -> None:
    try:
        canonical = _canonical(name)
    except FormatError as error:
        raise ValueError(error.what) from error
    if name != canonical:
        raise ValueError(f"format {name!r} is to be written {canonical!r}")


# The catalogue --------------------------------------------------------------------------------------------------------


@cache
def _tables() -> dict[str, Any]:
    text = resources.files("narrowcast.accounting").joinpath("devices.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@cache
def memory_types() -> dict[str, MemoryType]:
    """Return the memory types by name, with the transfers that each makes per pin and clock."""
    return {name: MemoryType(**table) for name, table in _tables()["memory_types"].items()}


@cache
def _built_in() -> tuple[Device, ...]:
    return _parse(_tables()["device"], "devices.toml of narrowcast")


def user_catalogue() -> Path:
    """Return where the user's own devices are looked for: ``$XDG_CONFIG_HOME/narrowcast/devices.toml``."""
    config = os.environ.get("XDG_CONFIG_HOME")
    return (Path(config) if config else Path.home() / ".config") / "narrowcast" / "devices.toml"


def devices(*, user: bool = True) -> list[Device]:
    """Return the catalogue: the built-in devices, then the user's own, which replace those of the same name.

    Args:
        user: Whether the user's own are looked for.

    Raises:
        DeviceError: If the user's catalogue cannot be read.
    """
    known = {device.name: device for device in _built_in()}
    if user:
        known |= {device.name: device for device in _of_user(user_catalogue())}
    return list(known.values())


def device(name: str) -> Device:
    """Return a device by its name, an alias, or the name that its driver gives.

    Raises:
        DeviceError: If there is none, with the nearest names.
    """
    known = devices()
    by_key = {_key(alias): found for found in known for alias in (*found.aliases, found.title)}
    by_key |= {_key(found.name): found for found in known}
    key = _key(name)
    if key in by_key:
        return by_key[key]
    if key in MEASURED:
        raise DeviceError(f"device {name!r}: this machine is not measured yet", next_step=f"run: {MEASURED[key]}")
    near = difflib.get_close_matches(key, by_key, n=8, cutoff=0.6)
    near += [other for other in by_key if key and (key in other or (len(other) > 3 and other in key))]
    nearest = list(dict.fromkeys(by_key[other].name for other in near))[:5]
    raise DeviceError(
        f"device {name!r} is unknown",
        allowed=f"nearest: {', '.join(nearest)}" if nearest else "",
        next_step=f"narrowcast devices lists all {len(known)}; others can be described in {user_catalogue()}",
    )


def save_device(found: Device) -> Path:
    """Write a measured device into the user's catalogue, in place of an earlier measurement; all else there stays.

    Returns:
        The catalogue.

    Raises:
        DeviceError: The catalogue cannot be read or written, or describes a device of that name by hand.
    """
    path = user_catalogue()
    text = path.read_text(encoding="utf-8") if _of_user(path) else ""
    first, last = f"# {found.name}: measured", f"# {found.name}: end"
    written = re.compile(rf"^{re.escape(first)}$.*?^{re.escape(last)}$\n?", re.DOTALL | re.MULTILINE)
    text = written.sub("", text)
    if any(table.get("name") == found.name for table in tomllib.loads(text).get("device", [])):
        raise DeviceError(
            f"catalogue {path} describes {found.name!r} by hand", next_step="remove it there, or give it another name"
        )
    table = found.model_dump(mode="json", exclude_defaults=True)
    lines = [first, "[[device]]", *(f"{key} = {_toml(value)}" for key, value in table.items()), last]
    text = "\n".join([*([text.rstrip(), ""] if text.strip() else []), *lines, ""])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".new").write_text(text, encoding="utf-8")
        path.with_suffix(".new").replace(path)
    except OSError as error:
        raise DeviceError(f"catalogue {path} cannot be written: {error.strerror}") from error
    return path


def _toml(value: Any) -> str:
    """Return a value as TOML writes it on one line."""
    if isinstance(value, dict):
        table = cast("dict[str, Any]", value)
        return "{ " + ", ".join(f"{json.dumps(key)} = {_toml(part)}" for key, part in table.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(part) for part in cast("list[Any]", value)) + "]"
    return json.dumps(value)  # text, numbers and booleans are written alike


def _key(name: str) -> str:
    words = re.sub(r"[\s_/]+", "-", name.strip().casefold())
    return words.removeprefix("nvidia-").removeprefix("amd-")


def _of_user(path: Path) -> tuple[Device, ...]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise DeviceError(
            f"catalogue {path} cannot be read: {error.strerror}", next_step="mend or remove it"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DeviceError(f"catalogue {path} is no TOML: {error}", next_step="mend or remove it") from error
    unknown = sorted(set(tables) - {"device"})
    listed = tables.get("device", [])
    if unknown or not isinstance(listed, list):
        raise DeviceError(
            f"catalogue {path}: {unknown[0] if unknown else 'device'} is no list of devices",
            allowed="[[device]] tables",
        )
    return _parse(cast("list[Any]", listed), str(path))


def _parse(tables: list[Any], file: str) -> tuple[Device, ...]:
    found: dict[str, Device] = {}
    for number, table in enumerate(tables, start=1):
        try:
            parsed = Device.model_validate(table)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            name = cast("dict[str, Any]", table).get("name", number) if isinstance(table, dict) else number
            where = f"device {name!r}" + (f", field {field}" if field else "")
            raise DeviceError(
                f"catalogue {file}: {where}: {first['msg']} (given: {_brief(first['input'])})",
                next_step="narrowcast devices NAME --json shows the fields of a device that is right",
            ) from error
        if parsed.name in found:
            raise DeviceError(f"catalogue {file}: two devices are named {parsed.name!r}", next_step="rename one")
        found[parsed.name] = parsed
    return tuple(found.values())


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
