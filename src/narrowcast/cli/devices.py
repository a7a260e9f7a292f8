"""``narrowcast devices``: the device catalogue, and the card of one device with the sources of its numbers."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from narrowcast.accounting.devices import Device, device, memory_types, save_device
from narrowcast.accounting.devices import devices as catalogue
from narrowcast.cli.console import Debug, Json, console, print_json, progress
from narrowcast.cli.numbers import plain

__all__ = ["HEADINGS", "KINDS", "NOTES", "cells", "devices"]

HEADINGS = ("device", "year", "GB", "GB/s", "FP32", "16 bit", "FP8", "INT8", "ridge")
NOTES = (
    "FP32 to INT8: dense peaks, 1e12 operations per second; sparse ones are on the device's card",
    "16 bit: BF16, or FP16 where there is no BF16; summed in FP32 where the device can",
    "ridge: FLOP per byte from which on compute is the limit, at the peak for 16 bits, else FP32, else INT8",
)
KINDS = {"gpu": "GPUs", "soc": "systems on a chip", "cpu": "CPUs, one socket", "npu": "other accelerators"}
_NONE = "–"


class Measured(StrEnum):
    """What of this machine is measured."""

    CPU = "cpu"
    CUDA = "cuda"


def devices(
    name: Annotated[
        str | None,
        typer.Argument(help="Show everything about this device, and where each number comes from.", show_default=False),
    ] = None,
    measure: Annotated[
        Measured | None,
        typer.Option(help="Measure this machine and add it to your own catalogue, as auto (cpu) or auto-cuda (cuda)."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads to measure the CPU with; all cores unless given.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the device catalogue: memory, bandwidth, and dense peaks of GPUs, CPUs and edge accelerators.

    For example: narrowcast devices h100-sxm, or: narrowcast devices --measure cpu --threads 1
    """
    if measure is not None:
        found, path = _measured(measure, threads, quiet=json)
        if json:
            print_json({"device": _as_json(found), "catalogue": str(path)})
        else:
            _print_card(found, console())
            console().print(plain(f" written to {path}", console()), style="bright_black")
        return
    if name is None:
        known = catalogue()
        if json:
            print_json({"devices": [_as_json(found) for found in known]})
        else:
            _print_table(known, console())
        return
    found = device(name)
    if json:
        print_json({"device": _as_json(found)})
    else:
        _print_card(found, console())


def _measured(measure: Measured, threads: int | None, *, quiet: bool) -> tuple[Device, Path]:
    from narrowcast.measure.machine import measure_cpu, measure_cuda

    with progress(quiet=quiet) as shown:
        if measure is Measured.CPU:
            found = measure_cpu(threads=threads, progress=shown.stage)
        else:
            found = measure_cuda(progress=shown.stage)
    return found, save_device(found)


def cells(found: Device) -> tuple[str, ...]:
    """Return a device's row of the table, one text per heading."""
    half = _half(found)
    ridges = (found.ridge(dtype) for dtype in (half, "fp32", "int8"))
    ridge = next((ridge for ridge in ridges if ridge is not None), None)
    peaks = [found.peak(dtype) for dtype in ("fp32", half, "fp8", "int8")]
    return (
        found.name,
        str(found.year),
        _short(found.memory.size_gb),
        _short(found.memory.bandwidth),
        *(_short(peak.tflops if peak else None) for peak in peaks),
        _NONE if ridge is None else f"{ridge:.3g}" if ridge < 100 else f"{ridge:.0f}",
    )


def _half(found: Device) -> str:
    return "bf16" if found.peak("bf16") else "fp16"


def _short(value: float | None) -> str:
    if value is None:
        return _NONE
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _as_json(found: Device) -> dict[str, Any]:
    """Return the device's fields as the catalogue has them, and what follows from them."""
    half = _half(found)
    derived = {
        "bandwidth_gbs": found.memory.bandwidth,
        "computed_gbs": found.memory.computed_gbs,
        "ridge_flop_per_byte": {
            dtype: ridge for dtype in ("fp32", half, "fp8", "int8") if (ridge := found.ridge(dtype)) is not None
        },
    }
    return found.model_dump(mode="json") | {"derived": derived}


def _print_table(known: list[Device], screen: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bright_black")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "device" else "right", no_wrap=True)
    for kind, title in KINDS.items():
        table.add_row(plain(title, screen), style="bright_black")
        for found in known:
            if found.kind == kind:
                row = [plain(cell, screen) for cell in cells(found)]
                row[0].stylize("bold")
                table.add_row(*row)
        table.add_section()
    screen.print(table)
    for note in NOTES:
        screen.print(plain(f" {note}", screen), style="bright_black")


def _print_card(found: Device, screen: Console) -> None:
    screen.print(plain(found.title, screen), style="bold")
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    facts.add_column(style="bright_black", no_wrap=True)
    facts.add_column()
    for what, text in _facts(found):
        facts.add_row(what, plain(text, screen))
    screen.print(facts)
    if not found.peaks:
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bright_black")
    for heading in ("format", "summed in", "unit"):
        table.add_column(heading, no_wrap=True)
    for heading in ("dense", "sparse"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("source, if another")
    for peak in found.peaks:
        sparse = _NONE if peak.sparse_tflops is None else f"{peak.sparse_tflops:g}"
        source = "" if peak.source == found.source else peak.source
        row = (peak.dtype, peak.accumulator or "not stated", peak.unit, f"{peak.tflops:g}", sparse, source)
        table.add_row(*(plain(cell, screen) for cell in row))
    screen.print(table)
    screen.print(plain(" peaks in 1e12 operations per second, a multiply-add being two", screen), style="bright_black")


def _facts(found: Device) -> list[tuple[str, str]]:
    memory = found.memory
    rows = [
        ("name", ", ".join((found.name, *found.aliases))),
        ("made by", f"{found.vendor}, {found.year}, {found.architecture}"),
        ("computes in", ", ".join(found.formats)),
    ]
    if found.capability is not None:
        rows.append(("CUDA", "compute capability {}.{}".format(*found.capability)))
    size = None if memory.size_gb is None else f"{memory.size_gb:g} GB"
    if size or memory.type:
        rows.append(("memory", " ".join(part for part in (size, memory.type) if part)))
    if memory.computed_gbs is not None and memory.type is not None:
        transfers = memory_types()[memory.type]
        rows.append(
            (
                "bandwidth",
                f"{memory.clock_mhz:g} MHz × {transfers.transfers} transfers × {memory.bus_bits} bits / 8 = "
                f"{memory.computed_gbs:g} GB/s",
            )
        )
        if memory.clock_source:
            rows.append(("", f"clock and bus: {memory.clock_source}"))
        rows.append(("", f"transfers of {memory.type}: {transfers.source}"))
    if memory.stated_gbs is not None:
        other = "" if memory.source == found.source else f" ({memory.source})"
        rows.append(
            ("stated" if memory.computed_gbs is not None else "bandwidth", f"{memory.stated_gbs:g} GB/s{other}")
        )
    half = _half(found)
    ridges = [f"{ridge:.3g} in {dtype}" for dtype in ("fp32", half, "fp8", "int8") if (ridge := found.ridge(dtype))]
    if ridges:
        rows.append(("ridge", f"{', '.join(ridges)} (FLOP per byte)"))
    if memory.cache_mb is not None:
        rows.append(("largest cache", f"{memory.cache_mb:g} MB"))
    rows += [("measured with", f"{model.runtime}: {model.source}") for model in found.runtimes]
    if found.launch:
        rows.append(("kernel launch", f"{found.launch.microseconds:g} µs"))
        rows.append(("", found.launch.source))
    rows.append(("source", found.source))
    if found.notes:
        rows.append(("note", found.notes))
    return rows
