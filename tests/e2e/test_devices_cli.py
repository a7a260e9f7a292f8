"""``narrowcast devices`` from end to end."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path

import pytest

from e2e.command import Cli
from narrowcast.accounting.devices import devices


@pytest.fixture
def columns() -> int:
    return 80


@pytest.fixture(autouse=True)
def no_catalogue_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def rows(text: str) -> dict[str, list[str]]:
    return {words[0]: words[1:] for line in text.splitlines() if (words := line.split())}


def test_the_table_holds_every_device_once_and_cuts_nothing_in_80_columns(cli: Cli) -> None:
    done = cli("devices")
    assert done.code == 0, done.err
    assert "…" not in done.out
    first_words = [line.split()[0] for line in done.out.splitlines() if line.split()]
    for found in devices():
        assert first_words.count(found.name) == 1, found.name


def test_the_row_of_a_device_has_dense_peaks_and_the_ridge_point(cli: Cli) -> None:
    table = rows(cli("devices").out)
    assert table["h100-sxm"] == ["2022", "80", "3352", "66.9", "989", "1979", "1979", "295"]
    # FP32 accumulation, not the twice as fast FP16 one; no FP8.
    assert table["rtx-3090"] == ["2020", "24", "936", "35.6", "71", "–", "284", "75.8"]
    assert table["rk3588"] == ["2022", "–", "–", "–", "–", "–", "6", "–"]


def test_the_card_shows_everything_with_its_sources(cli: Cli) -> None:
    done = cli("devices", "h100-sxm")
    assert done.code == 0, done.err
    words = " ".join(done.out.split())
    assert "NVIDIA H100 SXM5 80GB" in words
    assert "2619 MHz × 2 transfers × 5120 bits / 8 = 3352.32 GB/s" in words
    assert "stated 3350 GB/s" in words
    assert "H100 white paper" in words
    assert "JESD238" in words
    assert "kernel launch 3.5 µs" in words
    assert "e4m3fn" in words
    line = next(line for line in done.out.splitlines() if line.split()[:1] == ["bf16"])
    assert line.split()[1:6] == ["fp32", "tensor", "core", "989.4", "1978.9"]


def test_every_card_can_be_printed(cli: Cli) -> None:
    for found in devices():
        done = cli("devices", found.name)
        assert done.code == 0, done.err
        words = " ".join(done.out.split())
        assert found.title in words
        assert all(f"{peak.tflops:g}" in words for peak in found.peaks)


def test_json_has_the_fields_of_the_catalogue_and_what_follows_from_them(cli: Cli) -> None:
    listed = json.loads(cli("devices", "--json").out)["devices"]
    assert [item["name"] for item in listed] == [found.name for found in devices()]
    one = json.loads(cli("devices", "H100", "--json").out)["device"]
    assert one == next(item for item in listed if item["name"] == "h100-sxm")
    assert one["derived"]["bandwidth_gbs"] == 3352.32
    assert one["derived"]["ridge_flop_per_byte"]["bf16"] == pytest.approx(989.4e3 / 3352.32)
    assert one["memory"]["type"] == "HBM3"


def test_an_unknown_device_is_answered_with_the_nearest(cli: Cli) -> None:
    done = cli("devices", "rtx-4080")
    assert done.code == 2
    assert done.out == ""
    words = " ".join(done.err.replace("│", " ").split())
    assert "DeviceError" in words
    assert "'rtx-4080' is unknown" in words
    assert "nearest: rtx-" in words
    assert "rtx-4090" in words
    as_json = json.loads(cli("devices", "rtx-4080", "--json").out)["error"]
    assert as_json["type"] == "DeviceError"
    assert "rtx-4090" in as_json["message"]


def test_a_device_of_the_user_is_listed_and_a_bad_one_named(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "narrowcast" / "devices.toml"
    file.parent.mkdir()
    text = (
        '[[device]]\nname = "mine"\ntitle = "My board [bold]"\nvendor = "Me"\nkind = "npu"\narchitecture = "a"\n'
        'year = 2024\nformats = ["int8"]\nsource = "measured"\npeaks = [{dtype = "int8", unit = "npu", tflops = 2}]\n'
    )
    file.write_text(text, encoding="utf-8")
    assert rows(cli("devices").out)["mine"] == ["2024", "–", "–", "–", "–", "–", "2", "–"]
    assert "My board [bold]" in cli("devices", "mine").out
    file.write_text(text.replace("2024", "24"), encoding="utf-8")
    done = cli("devices")
    assert done.code == 2
    assert "field year" in " ".join(done.err.replace("│", " ").split())


# The page -------------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "devices.md"


def test_the_examples_of_the_page_print_what_it_says(cli: Cli) -> None:
    (session,) = re.findall(r"^```pycon\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    found = doctest.DocTestParser().get_doctest(session, {}, "devices", str(PAGE), 0)
    assert len(found.examples) >= 5
    assert doctest.DocTestRunner(verbose=False).run(found).failed == 0


def test_the_catalogue_of_the_page_is_one_that_is_read(cli: Cli, tmp_path: Path) -> None:
    text = re.findall(r"^```toml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    file = tmp_path / "narrowcast" / "devices.toml"
    file.parent.mkdir()
    file.write_text(text[0], encoding="utf-8")
    found = json.loads(cli("devices", "board", "--json").out)["device"]
    assert found["derived"]["computed_gbs"] == found["memory"]["stated_gbs"] == 51.2
    assert found["launch"]["source"] == found["peaks"][0]["source"] == "measured by me, 2024"
    assert found["peaks"][1]["source"] == "data sheet, 2023"
