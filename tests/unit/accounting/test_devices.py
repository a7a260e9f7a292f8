"""The device catalogue: numbers that are well known, the bandwidth rule, dense apart from sparse, bad catalogues."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from narrowcast.accounting.devices import (
    FAMILIES,
    Device,
    Memory,
    Peak,
    device,
    devices,
    memory_types,
    user_catalogue,
)
from narrowcast.errors import DeviceError, FormatError, UserError
from narrowcast.formats import names

pytestmark = pytest.mark.usefixtures("_no_catalogue_of_the_user")


@pytest.fixture
def _no_catalogue_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def catalogue_of() -> Any:
    """From a text to a catalogue of the user that holds it."""

    def write(text: str) -> Path:
        file = user_catalogue()
        file.parent.mkdir(parents=True)
        file.write_text(text, encoding="utf-8")
        return file

    return write


#: Enough of a device to be read.
SMALL = """
[[device]]
name = "board"
title = "My board"
aliases = ["mine"]
vendor = "Me"
kind = "npu"
architecture = "first"
year = 2024
formats = ["int8", "fp16"]
source = "measured by me, 2024"
memory = { size_gb = 2, type = "LPDDR4", clock_mhz = 1600, bus_bits = 32, stated_gbs = 12.8 }
peaks = [{ dtype = "int8", unit = "npu", tflops = 2, sparse_tflops = 4 }]
"""


# What the catalogue holds ---------------------------------------------------------------------------------------------

ASKED_FOR = [
    "c1060",
    "k80",
    "m40",
    "p100",
    "v100",
    "t4",
    "rtx-2080",
    "rtx-3070",
    "rtx-3090",
    "rtx-4090",
    "rtx-5090",
    "a10",
    "a30",
    "a100-40gb-pcie",
    "a100-40gb-sxm",
    "a100-80gb-pcie",
    "a100-80gb-sxm",
    "l4",
    "l40s",
    "h100-pcie",
    "h100-sxm",
    "h200",
    "b200",
    "gb200",
    "jetson-nano",
    "jetson-agx-xavier",
    "jetson-orin-nano",
    "jetson-orin-nx",
    "jetson-agx-orin",
    "jetson-agx-thor",
    "mi250x",
    "mi300x",
    "xeon-avx2",
    "xeon-avx512",
    "xeon-vnni",
    "xeon-amx",
    "epyc-rome",
    "m1",
    "m2",
    "m3",
    "m4",
    "raspberry-pi-4",
    "raspberry-pi-5",
    "cloud-ai-100",
    "rk3588",
    "hailo-8",
    "journey-5",
    "ascend-310",
    "ascend-910",
]


def test_there_are_at_least_45_devices_of_many_makers() -> None:
    known = devices()
    assert len(known) >= 45
    assert len({found.vendor for found in known}) >= 12
    assert {found.kind for found in known} == {"gpu", "cpu", "soc", "npu"}


@pytest.mark.parametrize("name", ASKED_FOR)
def test_every_device_that_was_asked_for_is_there(name: str) -> None:
    assert device(name) in devices()


def test_no_name_means_two_devices() -> None:
    meant: dict[str, set[str]] = defaultdict(set)
    for found in devices():
        for name in (found.name, *found.aliases, found.title.removeprefix("NVIDIA ").removeprefix("AMD ")):
            meant[name.casefold().replace(" ", "-")].add(found.name)
    assert {key: names for key, names in meant.items() if len(names) > 1} == {}
    for key, (name,) in meant.items():
        assert device(key).name == name


def test_every_number_has_a_source_with_a_document() -> None:
    for found in devices():
        assert len(found.source) > 8, found.name
        for peak in found.peaks:
            assert len(peak.source) > 8, (found.name, peak.dtype)
        if found.memory.bandwidth is not None:
            assert len(found.memory.source) > 8, found.name
        if found.launch is not None:
            assert "measured" in found.launch.source
        assert re.search(r"(19|20)\d\d", found.source), f"{found.name}: a document without its year"


def test_a_value_can_be_saved_and_read_back() -> None:
    for found in devices():
        assert Device.model_validate(found.model_dump()) == found
        assert Device.model_validate_json(found.model_dump_json()) == found


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory_type", "transfers"), [("GDDR5", 4), ("GDDR6", 8), ("GDDR6X", 16), ("HBM2", 2), ("DDR4", 2), ("DDR5", 2)]
)
def test_transfers_are_a_property_of_the_memory_type(memory_type: str, transfers: int) -> None:
    assert memory_types()[memory_type].transfers == transfers


def test_gddr6_at_1750_mhz_on_256_bits_gives_448_and_not_112() -> None:
    assert Memory(type="GDDR6", clock_mhz=1750, bus_bits=256).bandwidth == 448.0


def test_bandwidth_from_clock_bus_and_type_agrees_with_the_stated_one_on_every_device() -> None:
    held = [found.memory for found in devices() if found.memory.computed_gbs and found.memory.stated_gbs]
    assert len(held) >= 60
    assert {memory.type for memory in held} >= {"GDDR3", "GDDR5", "GDDR6", "GDDR6X", "GDDR7", "HBM2", "HBM3", "DDR5"}
    wrong = [memory for memory in held if memory.computed_gbs != pytest.approx(memory.stated_gbs, rel=0.02)]
    assert wrong == []


def test_memory_without_a_clock_has_the_stated_bandwidth_and_a_wrong_multiplier_would_be_seen() -> None:
    assert Memory(stated_gbs=100).bandwidth == 100
    assert Memory(type="HBM2").bandwidth is None
    found = device("t4").memory
    assert (found.type, found.bandwidth) == ("GDDR6", 320)
    assert Memory(type="GDDR5", clock_mhz=found.clock_mhz, bus_bits=found.bus_bits).bandwidth == 160


def test_sizes_are_binary() -> None:
    # What the driver of an H100 80GB reports, 81,559 MiB, is less than 80 GiB and more than 80e9 bytes.
    assert 80e9 < 81_559 * 2**20 < (device("h100").memory.bytes or 0) == 80 * 2**30
    assert Memory().bytes is None


# Numbers that are well known, written here from the vendors' data sheets ----------------------------------------------

GB_PER_SECOND = {
    "v100-sxm2-16gb": 900,
    "a100-80gb-sxm": 2039,
    "a100-40gb-sxm": 1555,
    "h100-sxm": 3350,
    "h200": 4800,
    "t4": 320,
    "rtx-3090": 936,
    "rtx-4090": 1008,
    "l4": 300,
    "mi300x": 5300,
    "m1": 68.25,
    "jetson-agx-orin": 204.8,
    "p100": 732,
    "c1060": 102,
}
DENSE = [
    ("v100-sxm2-16gb", "fp16", "fp32", 125),
    ("v100-sxm2-16gb", "fp32", None, 15.7),
    ("a100-80gb-sxm", "bf16", "fp32", 312),
    ("a100-80gb-sxm", "int8", "int32", 624),
    ("a100-80gb-sxm", "tf32", "fp32", 156),
    ("h100-sxm", "bf16", "fp32", 989),
    ("h100-sxm", "fp8", None, 1979),
    ("h100-pcie", "fp16", None, 756),
    ("t4", "fp16", None, 65),
    ("t4", "int8", None, 130),
    ("rtx-3090", "fp16", "fp16", 142),
    ("rtx-3090", "fp16", "fp32", 71),
    ("rtx-4090", "bf16", None, 165.2),
    ("mi300x", "fp16", None, 1307),
    ("l4", "int8", None, 242.5),
    ("l40s", "fp8", None, 733),
    ("b200", "bf16", None, 2250),
    ("jetson-agx-orin", "int8", None, 85),
    ("hailo-8", "int8", None, 26),
    ("xeon-amx", "bf16", "fp32", 114.7),
]


@pytest.mark.parametrize(("name", "bandwidth"), GB_PER_SECOND.items())
def test_well_known_bandwidths(name: str, bandwidth: float) -> None:
    assert device(name).memory.bandwidth == pytest.approx(bandwidth, rel=0.02)


@pytest.mark.parametrize(("name", "dtype", "accumulator", "tflops"), DENSE)
def test_well_known_dense_peaks(name: str, dtype: str, accumulator: Any, tflops: float) -> None:
    peak = device(name).peak(dtype, accumulator)
    assert peak is not None
    assert peak.tflops == pytest.approx(tflops, rel=0.003)


@pytest.mark.parametrize(
    ("name", "year", "architecture", "size"),
    [
        ("c1060", 2008, "Tesla", 4),
        ("k80", 2014, "Kepler", 12),
        ("m40", 2015, "Maxwell", 12),
        ("p100", 2016, "Pascal", 16),
        ("v100", 2017, "Volta", 16),
        ("t4", 2018, "Turing", 16),
        ("a100", 2020, "Ampere", 80),
        ("rtx-4090", 2022, "Ada", 24),
        ("h100", 2022, "Hopper", 80),
        ("b200", 2024, "Blackwell", 180),
    ],
)
def test_the_generations_of_nvidia(name: str, year: int, architecture: str, size: int) -> None:
    found = device(name)
    assert (found.year, found.memory.size_gb) == (year, size)
    assert found.architecture.startswith(architecture)


def derived_peaks() -> list[tuple[Device, Peak, float]]:
    """Return the peaks whose source is a product of cores, operations per cycle and clock, with that product."""
    return [
        (found, peak, math.prod(float(number) for number in stated.groups()) / 1000)
        for found in devices()
        for peak in found.peaks
        if (stated := re.match(r"(\d+) (?:\w+ )?cores x (\d+) (?:FLOP|OP) x ([\d.]+) GHz", peak.source))
    ]


def test_peaks_that_are_derived_follow_from_their_derivation() -> None:
    assert len(derived_peaks()) >= 45
    for found, peak, product in derived_peaks():
        assert peak.tflops == pytest.approx(product, rel=0.003), (found.name, peak)


def test_every_peak_of_a_cpu_is_derived_from_its_instruction_set() -> None:
    derived = [peak for found, peak, _ in derived_peaks() if found.kind == "cpu"]
    assert derived == [peak for found in devices() if found.kind == "cpu" for peak in found.peaks]


def test_what_each_generation_of_xeon_computes_in() -> None:
    def computes(name: str) -> set[str]:
        return {format for format in ("int8", "bf16", "fp16") if device(name).supports(format)}

    assert computes("xeon-avx2") == computes("xeon-avx512") == set()
    assert computes("xeon-vnni") == computes("ice-lake") == {"int8"}
    assert computes("cooper-lake") == {"int8", "bf16"}
    assert computes("sapphire-rapids") == {"int8", "bf16", "fp16"}
    amx = device("sapphire-rapids").peak("int8")
    assert amx is not None
    assert amx.unit == "matrix extension"


# Dense and sparse -----------------------------------------------------------------------------------------------------


def test_sparse_peaks_are_about_twice_the_dense_ones_and_never_in_their_place() -> None:
    with_both = [(found.name, peak) for found in devices() for peak in found.peaks if peak.sparse_tflops is not None]
    assert len(with_both) >= 100
    for name, peak in with_both:
        assert peak.sparse_tflops / peak.tflops == pytest.approx(2, rel=0.025), (name, peak)


@pytest.mark.parametrize(
    ("name", "dtype", "dense", "sparse"),
    [("h100", "bf16", 989.4, 1978.9), ("rtx-3090", "int8", 284, 568), ("t4", "int8", 130, None)],
)
def test_dense_and_sparse_lie_apart(name: str, dtype: str, dense: float, sparse: float | None) -> None:
    peak = device(name).peak(dtype)
    assert peak is not None
    assert (peak.tflops, peak.sparse_tflops) == (dense, sparse)


def test_sparsity_is_claimed_only_since_ampere_and_cdna_3() -> None:
    before = {"Tesla (GT200)", "Fermi", "Kepler", "Maxwell", "Pascal", "Volta", "Turing", "CDNA", "CDNA 2"}
    for found in devices():
        if found.architecture in before or found.kind == "cpu":
            assert all(peak.sparse_tflops is None for peak in found.peaks), found.name


def test_a_format_of_half_the_width_is_about_twice_as_fast_on_the_same_units() -> None:
    for found in devices():
        full, half = found.peak("fp16", "fp32"), found.peak("int8")
        if full and half and full.unit == half.unit == "tensor core" and found.architecture not in ("CDNA", "CDNA 2"):
            geforce = found.peak("fp16", "fp16")
            compared = geforce if geforce and geforce.unit == "tensor core" else full
            assert half.tflops / compared.tflops == pytest.approx(2, rel=0.03), found.name


# Peaks and formats ----------------------------------------------------------------------------------------------------


def test_frameworks_accumulate_in_fp32_so_the_peak_without_an_accumulator_does() -> None:
    geforce = device("rtx-4090")
    chosen, narrow = geforce.peak("fp16"), geforce.peak("fp16", "fp16")
    assert chosen is not None
    assert narrow is not None
    assert chosen.accumulator == "fp32"
    assert narrow.tflops > chosen.tflops
    only = device("jetson-nano").peak("fp16")
    assert only is not None
    assert only.accumulator == "fp16"
    assert device("jetson-nano").peak("fp16", "fp32") is None


def test_members_of_a_family_and_blocks_share_the_rate_if_the_hardware_has_them() -> None:
    hopper, instinct, blackwell = device("h100"), device("mi300x"), device("b200")
    assert hopper.peak("e4m3fn") == hopper.peak("e5m2") == hopper.peak("fp8")
    assert hopper.peak("e4m3fnuz") is None
    assert instinct.peak("e4m3fnuz") == instinct.peak("fp8")
    assert instinct.peak("e4m3fn") is None
    assert blackwell.peak("nvfp4") == blackwell.peak("mxfp4") == blackwell.peak("fp4")
    assert blackwell.supports("nvfp4")
    assert not hopper.supports("mxfp4")
    assert device("a100").peak("uint8") == device("a100").peak("int8")
    assert device("a100").peak("int1") is not None
    assert device("a100").peak("bfloat16") == device("a100").peak("bf16")
    assert device("v100").peak("bf16") is None


def test_a_format_that_nobody_has_heard_of_is_an_error_and_not_unsupported() -> None:
    with pytest.raises(FormatError, match="fp7"):
        device("h100").supports("fp7")
    with pytest.raises(FormatError, match="fp7"):
        device("h100").peak("fp7")


def test_every_member_of_a_family_is_a_format() -> None:
    assert {member for family in FAMILIES.values() for member in family} <= set(names())


def test_the_ridge_point_is_peak_over_bandwidth() -> None:
    assert device("a100").ridge("bf16") == pytest.approx(312e12 / 2039e9, rel=1e-3)
    assert device("m3").ridge("fp32") is None
    assert device("hailo-8").ridge("int8") is None


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("h100", "h100-sxm"),
        ("H100_SXM", "h100-sxm"),
        (" h200 ", "h200"),
        ("a100-80gb-sxm", "a100-80gb-sxm"),
        # What drivers call them.
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb-sxm"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("Tesla V100-SXM2-16GB", "v100-sxm2-16gb"),
        ("Tesla T4", "t4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_names_aliases_and_what_drivers_say(given: str, name: str) -> None:
    assert device(given).name == name


@pytest.mark.parametrize(
    ("given", "near"),
    [("h10", "h100-sxm"), ("rtx 4080", "rtx-4090"), ("a100-80", "a100-80gb-sxm"), ("xeon", "xeon-8480")],
)
def test_an_unknown_name_gets_the_nearest_ones(given: str, near: str) -> None:
    with pytest.raises(DeviceError) as caught:
        device(given)
    assert repr(given) in caught.value.what
    assert "unknown" in caught.value.what
    assert near in caught.value.allowed.removeprefix("nearest: ").split(", ")
    assert "narrowcast devices" in caught.value.next_step
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("given", ["", "§§§§§"])
def test_a_name_that_is_like_none_gets_no_guess(given: str) -> None:
    with pytest.raises(DeviceError) as caught:
        device(given)
    assert caught.value.allowed == ""
    assert f"all {len(devices())}" in caught.value.next_step


# The user's own catalogue ---------------------------------------------------------------------------------------------


def test_the_users_devices_are_added(catalogue_of: Any) -> None:
    before = len(devices())
    catalogue_of(SMALL)
    assert len(devices()) == before + 1
    mine = device("mine")
    assert mine.memory.bandwidth == 12.8
    assert mine.peaks[0].source == mine.memory.source == "measured by me, 2024"


def test_a_device_of_the_user_replaces_the_one_of_the_same_name(catalogue_of: Any) -> None:
    before = [found.name for found in devices()]
    catalogue_of(SMALL.replace('"board"', '"t4"'))
    assert [found.name for found in devices()] == before
    assert device("t4").title == "My board"


def test_the_catalogue_lies_in_the_home_folder_where_nothing_else_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_catalogue() == tmp_path / ".config" / "narrowcast" / "devices.toml"


@pytest.mark.parametrize(
    ("old", "new", "field", "word"),
    [
        ("tflops = 2,", "tflops = -2,", "peaks.0.tflops", "greater than 0"),
        ("tflops = 2,", "tflops = 5,", "peaks.0", "more than the sparse one"),
        ('dtype = "int8", u', 'dtype = "int9", u', "peaks.0", "int9"),
        ('dtype = "int8", u', 'dtype = "bf16", u', "", "not among formats"),
        ('["int8", "fp16"]', '["int8", "half"]', "", "'fp16'"),
        ("clock_mhz = 1600", "clock_mhz = 0", "memory.clock_mhz", "greater than 0"),
        ("clock_mhz = 1600", 'clock_mhz = "fast"', "memory.clock_mhz", "number"),
        ('"LPDDR4"', '"GDDR9"', "memory", "GDDR6X"),
        ("year = 2024", "year = 24", "year", "1990"),
        ("year = 2024", "years = 2024", "year", "required"),
        ('kind = "npu"', 'kind = "toaster"', "kind", "gpu"),
        ('source = "measured by me, 2024"', "", "source", "required"),
        ('unit = "npu"', 'unit = "npu", tops = 2', "peaks.0.tops", "not permitted"),
        ("memory = {", "memory = 3 # {", "memory", "3"),
        ("peaks = [", "peaks = 3 # [", "peaks", "3"),
    ],
)
def test_what_is_wrong_is_named_with_file_device_and_field(
    catalogue_of: Any, old: str, new: str, field: str, word: str
) -> None:
    assert old in SMALL
    file = catalogue_of(SMALL.replace(old, new))
    with pytest.raises(DeviceError) as caught:
        devices()
    message = caught.value.what
    assert str(file) in message
    assert "'board'" in message
    assert f"field {field}:" in message if field else "field" not in message
    assert word in message


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[[device]", "no TOML"),
        ("device = 3", "no list of devices"),
        ("devices = []", "devices is no list"),
        ("device = [3]", "device 1"),
        (SMALL + SMALL, "two devices are named 'board'"),
    ],
)
def test_a_file_that_is_no_catalogue_is_a_typed_error(catalogue_of: Any, text: str, word: str) -> None:
    file = catalogue_of(text)
    with pytest.raises(DeviceError) as caught:
        device("h100")
    assert str(file) in caught.value.what
    assert word in caught.value.what


def test_a_folder_or_bytes_in_place_of_the_catalogue_are_typed_errors(catalogue_of: Any) -> None:
    file = catalogue_of("")
    assert len(devices()) >= 45
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DeviceError, match="no TOML"):
        devices()
    file.unlink()
    file.mkdir()
    with pytest.raises(DeviceError, match="cannot be read"):
        devices()


# The values themselves ------------------------------------------------------------------------------------------------


def test_values_are_frozen_and_numbers_are_finite_and_positive() -> None:
    with pytest.raises(ValidationError):
        device("h100").year = 2000  # type: ignore[misc]
    for bad in (0, -1, math.nan):
        with pytest.raises(ValidationError):
            Peak(dtype="fp32", unit="vector", tflops=bad)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValidationError):
            Memory(stated_gbs=bad)
