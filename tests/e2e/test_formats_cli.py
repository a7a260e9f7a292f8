"""``narrowcast formats`` and ``narrowcast format`` from end to end."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from e2e.command import Cli, strict
from narrowcast.formats.table import BLOCKS, ELEMENTS

SVG = "{http://www.w3.org/2000/svg}"


# The table ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_the_table_holds_every_format_and_cuts_nothing(cli: Cli, columns: int) -> None:
    done = cli("formats")
    assert done.code == 0, done.err
    assert "…" not in done.out
    assert max(map(len, done.out.splitlines())) <= columns
    words = done.out.split()
    assert set(words) >= {*ELEMENTS, *BLOCKS, "57344", "3.403e+38", "8.25"}


def test_names_choose_rows_by_any_name(cli: Cli) -> None:
    shown = strict(cli("formats", "torch.bfloat16", "mxfp4", "--json").out)["formats"]
    assert [item["name"] for item in shown] == ["bf16", "mxfp4"]
    assert shown[0] | {"bits": 16, "layout": "1-8-7", "smallest_positive": 2.0**-133} == shown[0]
    assert strict(cli("formats", "bf16", "mxfp4", "--as", "json").out)["formats"] == shown


def test_markdown_is_a_table(cli: Cli) -> None:
    lines = cli("formats", "--as", "markdown").out.splitlines()
    assert len(lines) == 2 + len(ELEMENTS) + len(BLOCKS)
    assert {line.count("|") for line in lines} == {10}
    assert any(line.startswith("| e4m3fn | 8 | 1-4-3 | 448 |") for line in lines)


def test_an_unknown_format_is_named(cli: Cli) -> None:
    done = cli("formats", "e4m3fm")
    assert done.code == 2
    assert "'e4m3fm'" in done.err
    assert "did you mean e4m3fn or e4m3 or e4m3fnuz?" in done.words


# The picture ----------------------------------------------------------------------------------------------------------


def lines_of(file: Path, style: str) -> int:
    paths = ElementTree.parse(file).iter(f"{SVG}path")
    return sum(path.attrib["d"].count("M") for path in paths if path.attrib["class"] == style)


@pytest.mark.parametrize("axis", ["linear", "log", "scaled"])
def test_the_picture_has_a_line_for_every_value(cli: Cli, axis: str) -> None:
    done = cli("formats", "e2m1", "nf4", "int4", "--svg", "line.svg", "--axis", axis)
    assert done.code == 0, done.err
    assert "line.svg" in done.out
    picture = Path("line.svg")
    styles = ("float", "float subnormal", "codebook", "integer", "zero")
    assert [lines_of(picture, style) for style in styles] == [12, 2, 15, 15, 3]
    words = {text.text for text in ElementTree.parse(picture).iter(f"{SVG}text")}
    assert words >= {"e2m1", "4 bits · 15 values", "±6, smallest 0.5", "−8 to 7, smallest 1", "6", "−6"}


def test_wide_formats_are_filled_and_nothing_leaves_the_page(cli: Cli) -> None:
    done = cli("formats", *ELEMENTS, "--svg", "all.svg", "--json")
    assert strict(done.out)["svg"] == "all.svg"
    tree = ElementTree.parse("all.svg")
    filled = [path.attrib["d"] for path in tree.iter(f"{SVG}path") if path.attrib["class"] == "float full"]
    assert len(filled) == 5
    starts = [float(step.split()[0]) for path in tree.iter(f"{SVG}path") for step in path.attrib["d"].split("M")[1:]]
    assert min(starts) >= 200
    assert max(starts) <= 1200


def test_the_picture_without_names_and_its_errors(cli: Cli) -> None:
    assert cli("formats", "--svg", "some.svg").code == 0
    assert 'class="name"' in Path("some.svg").read_text(encoding="utf-8")
    for arguments, message in (
        (["e2m1", "--svg", "x.svg", "--axis", "round"], "'round'"),
        (["e2m1", "--axis", "log"], "--svg"),
        (["mxfp4", "--svg", "x.svg"], "block format"),
        (["e2m1", "--svg", "no/such/x.svg"], "no/such/x.svg"),
        (["fp64", "--svg", "x.svg", "--axis", "linear"], "linear"),
    ):
        done = cli("formats", *arguments)
        assert (done.code, message in done.err, Path("x.svg").exists()) == (2, True, False), done.err


# The microscope -------------------------------------------------------------------------------------------------------


def test_values_are_shown_with_bits_error_and_reason(cli: Cli) -> None:
    done = cli("format", "bf16", "0.1", "65504", "1e-8", "nan")
    assert done.code == 0, done.err
    for words in ("0 01111011 1001101  = 0x3dcd", "0.10009765625", "205 × 2⁻¹¹", "+0.2 ulp", "rounded up to the nearest",
                  "below 0.099609375 · above 0.1005859375", "NaN stays NaN"):  # fmt: skip
        assert words in done.out
    assert max(map(len, done.out.splitlines())) <= 100


@pytest.mark.parametrize("value", ["-0.1", "-inf", "-1e-8", "-0", "-.5", "-1/3", "-2^-3", "-0x1p-3", "-nan"])
def test_negative_values_need_no_dashes_before_them(cli: Cli, value: str) -> None:
    shown = strict(cli("format", "bf16", value, "--json").out)["specimens"]
    assert [item["given"] for item in shown] == [value]
    assert shown[0]["bits"].startswith("1 ")
    assert strict(cli("format", "bf16", "--json", "--", value).out)["specimens"] == shown


def test_json_holds_everything_and_names_what_json_lacks(cli: Cli) -> None:
    shown = strict(cli("format", "fp16", "70000", "nan", "1/3", "1e999", "--json").out)
    assert shown["format"]["name"] == "fp16"
    assert shown["rules"] == {"rounding": "nearest_even", "overflow": "ieee", "nan": "error", "below": "nan"}
    large, nan, third, huge = shown["specimens"]
    assert (large["stored"], large["event"], large["error"], large["neighbours"][1]) == (
        "Infinity",
        "overflowed",
        None,
        None,
    )
    assert (nan["stored"], nan["hex"]) == ("NaN", "0x7e00")
    assert (third["fraction"], third["hex"], third["ulps"]) == ("1365/4096", "0x3555", pytest.approx(-1 / 3))
    assert (huge["value"], huge["event"]) == ("Infinity", "overflowed")


def test_rules_can_be_chosen(cli: Cli) -> None:
    assert strict(cli("format", "e4m3fn", "1000", "--overflow", "nan", "--json").out)["specimens"][0]["stored"] == "NaN"
    assert (
        strict(cli("format", "int8", "2.9", "--convention", "ml_dtypes", "--json").out)["specimens"][0]["stored"] == 2
    )
    assert strict(cli("format", "e2m1", "nan", "--nan", "zero", "--json").out)["specimens"][0]["stored"] == 0
    assert strict(cli("format", "fp16", "0.1", "--rounding", "down", "--json").out)["specimens"][0]["hex"] == "0x2e66"


def test_stochastic_rounding_draws_by_the_seed(cli: Cli) -> None:
    def stored(*seed: str) -> float:
        shown = cli("format", "e4m3fn", "3.3", "--rounding", "stochastic", *seed, "--json")
        return strict(shown.out)["specimens"][0]["stored"]

    drawn = [stored("--seed", str(seed)) for seed in range(8)]
    assert {*drawn} == {3.25, 3.5}
    assert stored("--seed", "5") == drawn[5]
    assert stored() == 3.25  # the likelier way


def test_codes_can_be_looked_at(cli: Cli) -> None:
    done = cli("format", "fp16", "--code", "0x3c01", "0b0111110000000001")
    assert done.code == 0, done.err
    assert "1.0009765625" in done.out
    assert "signalling NaN" in done.out


def test_a_format_alone_shows_what_it_is(cli: Cli) -> None:
    done = cli("format", "fp4")
    assert done.code == 0
    assert "e2m1  4 bits: sign 1, exponent 2 (bias 1), significand 1" in done.out
    assert done.out.count("0x") == 15
    assert strict(cli("format", "nf4", "--json").out)["specimens"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bf16", "1", "abc"], "'abc'"),
        (["bf16", "-x"], "'-x'"),
        (["bf16", "1", "--roundng", "up"], "--roundng"),
        (["bf16", "1", "--rounding", "sideways"], "'sideways'"),
        (["mxfp4", "1"], "mxfp4 is a block format"),
        (["int8", "nan"], "NaN"),
        (["nf4", "--code", "16"], "16"),
        (["bf17", "1"], "'bf17'"),
        (["bf16", "1e99999999999"], "1e99999999999"),
        (["fp16", "--code", "0x3c01", "--rounding", "up"], "--rounding up with --code"),
        (["fp16", "--code", "0x3c01", "--seed", "0"], "--seed 0 with --code"),
        (["fp16", "0.1", "--seed", "0"], "--seed 0 with rounding nearest_even"),
    ],
)
def test_errors_name_the_thing_and_exit_with_2(cli: Cli, arguments: list[str], message: str) -> None:
    done = cli("format", *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert "FormatError" in done.err
    assert "Traceback" not in done.err
    assert strict(cli("format", *arguments, "--json").out)["error"]["type"] == "FormatError"


@pytest.mark.parametrize("command", ["formats", "format"])
def test_both_explain_themselves(cli: Cli, command: str) -> None:
    done = cli(command, "--help")
    assert (done.code, "Usage:" in done.out, "For example" in done.out) == (0, True, True)


def test_a_terminal_without_unicode_gets_ascii(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console.Console.encoding", property(lambda _: "ascii"))
    for arguments in (["format", "bf16", "0.1", "1e-40"], ["format", "e2m1"], ["formats"]):
        done = cli(*arguments)
        assert done.code == 0, done.err
        assert done.out.isascii()
        assert "?" not in done.out
