"""The page about weights in formats: sound, whole, and true to the numbers."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from pages import Page, alone, chromium
from PIL import Image
from safetensors.numpy import save_file

from narrowcast.measure.comparison import Comparison
from narrowcast.measure.treatments import DEFAULT_FORMATS, treatments
from narrowcast.measure.weights import compare_weights
from narrowcast.models.stored import open_weights
from narrowcast.report import text
from narrowcast.report.weight_plots import histogram, scatter
from narrowcast.report.weights import MOST_PANELS, render_weights

ODD = "<b>&\u202e\x1b[31m"


def ordinary() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {f"layers.{i}.weight": rng.standard_t(3 + i, (24, 64)).astype(np.float32) for i in range(14)}
    return found | {"layers.0.bias": np.ones(24, np.float32), "ids": np.arange(3)}


def odd() -> dict[str, np.ndarray]:
    broken = np.ones((4, 40), np.float32)
    broken[1, 2] = np.nan
    return {
        ODD: broken,
        "zeros": np.zeros((4, 32), np.float32),
        "alike": np.full((4, 32), -0.25, np.float32),
        "wide": np.full((4, 32), 1e200),
        "ends": np.tile([-1.7e308, 1.7e308], 64).reshape(4, 32),
        "tiny": np.linspace(-1e-310, 1e-310, 128).reshape(4, 32),
    }


def compared(folder: Path, arrays: dict[str, np.ndarray], *names: str, vectors: bool = False) -> Comparison:
    save_file(arrays, folder / "m.safetensors")
    return compare_weights(open_weights(str(folder / "m.safetensors")), treatments(names), vectors=vectors)


@pytest.fixture(params=["ordinary", "odd", "one"])
def found(request: pytest.FixtureRequest, tmp_path: Path) -> Comparison:
    match request.param:
        case "ordinary":
            return compared(tmp_path, ordinary(), *DEFAULT_FORMATS)
        case "odd":
            return compared(tmp_path, odd(), "fp64", "fp32", "tf32", "mxfp6_e2m3", "uint3", "int16", "nf2", "mxint8")
        case _:
            return compared(tmp_path, {"w": np.ones((1, 2), np.float32)}, "int8", vectors=True)


def test_the_page_is_sound_and_needs_nothing_else(found: Comparison):
    source = render_weights(found)
    alone(source)
    assert not re.search(r"\bnan\b|\binf\b|None", re.sub(r"NaN|<style>.*?</style>", "", source, flags=re.DOTALL))


def test_names_cannot_become_markup(tmp_path: Path):
    source = render_weights(compared(tmp_path, odd(), "int8"))
    assert "<b>" not in source
    assert "\x1b" not in source
    assert "\u202e" not in source


def test_every_format_and_tensor_is_there_with_its_numbers(tmp_path: Path):
    found = compared(tmp_path, ordinary(), *DEFAULT_FORMATS)
    page = Page(render_weights(found))
    for item in found.formats:
        for words in (item.name, item.words, text.quantity(item.nbytes, "bytes"), text.decibels(item.sqnr_db)):
            assert re.sub(r"\s+", " ", words) in page.text
    body = page.text[page.text.index("Every tensor") : page.text.index("most damaged, and where")]
    places = [body.index(tensor.name) for tensor in found.tensors]
    assert places == sorted(places)
    for tensor in found.tensors:
        for result in tensor.formats.values():
            assert result.error is not None
            assert text.decibels(result.error.sqnr_db) in body
    assert len(found.tensors) > MOST_PANELS
    assert len([1 for _, a in page.tags if (a.get("aria-label") or "").startswith("Histogram of")]) == MOST_PANELS
    assert "Stays as it is: a vector" in page.text
    assert "layers.0.bias" in page.text


def test_bars_are_as_long_as_their_sqnr(tmp_path: Path):
    found = compared(tmp_path, ordinary(), "int8")
    source = render_weights(found)
    widths = [float(width) for width in re.findall(r'class="bar" style="width:([\d.]+)%"', source)]
    expected = [tensor.formats["int8"].error.sqnr_db / 0.8 for tensor in found.tensors]  # type: ignore[union-attr]
    assert widths == pytest.approx(expected, abs=0.06)


def test_points_of_the_scatter_lie_where_size_and_sqnr_say(tmp_path: Path):
    found = compared(tmp_path, ordinary(), "fp16", "int8", "mxfp4")
    svg = ElementTree.fromstring(scatter(found.formats, found.nbytes))
    places = {
        (circle.findtext("title") or "").split(":")[0]: (float(circle.attrib["cx"]), float(circle.attrib["cy"]))
        for circle in svg.iter("circle")
    }
    assert set(places) == {"fp16", "int8", "mxfp4"}
    assert places["mxfp4"][0] < places["int8"][0] < places["fp16"][0]
    assert places["mxfp4"][1] > places["int8"][1] > places["fp16"][1]
    # Equal ratios of size are equal distances.
    sizes = {item.name: np.log(item.nbytes) for item in found.formats}
    first = (places["fp16"][0] - places["int8"][0]) / (sizes["fp16"] - sizes["int8"])
    second = (places["int8"][0] - places["mxfp4"][0]) / (sizes["int8"] - sizes["mxfp4"])
    assert first == pytest.approx(second, rel=0.01)
    words = "".join(svg.itertext())
    assert "Size of the whole model" in words
    assert "SQNR of all compared weights (dB)" in words


def test_as_many_levels_are_drawn_as_a_format_has(tmp_path: Path):
    numbers = np.linspace(-7.0, 7.0, 32, dtype=np.float32).reshape(1, 32).repeat(4, 0)
    (tensor,) = compared(tmp_path, {"w": numbers}, "int4", "e2m1").tensors
    for name, levels in (("int4", 15), ("e2m1", 15)):  # −8 of INT4 lies beyond the numbers
        svg = ElementTree.fromstring(histogram(tensor, [name], name="one"))
        full, pale = (path.attrib["d"] for path in svg.iter("path") if path.attrib["class"].startswith("f-"))
        assert full.count("M") == pale.count("M") == levels


def test_a_histogram_is_as_tall_as_its_counts(tmp_path: Path):
    (tensor,) = compared(tmp_path, {"w": np.array([[0.0] * 99 + [1.0]], np.float32)}, "int8", vectors=True).tensors
    svg = ElementTree.fromstring(histogram(tensor, ["int8"], name="one"))
    area = next(path.attrib["d"] for path in svg.iter("path") if path.attrib["class"] == "area")
    heights = [140 - float(y) for y in re.findall(r"V([\d.]+)", area)]
    assert heights[0] == pytest.approx(128)  # 99 numbers: the whole height
    assert heights[-2] == pytest.approx(128 * 0.3 / (np.log10(99) + 0.3), abs=0.1)  # one number
    assert set(heights[1:-2]) == {0.0}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["0", "1"])
def test_a_browser_shows_the_page(tmp_path: Path, scheme: str):
    found = compared(tmp_path, ordinary(), *DEFAULT_FORMATS)
    page = tmp_path / "weights.html"
    page.write_text(render_weights(found), encoding="utf-8")
    seen = tmp_path / "seen.png"
    chromium(
        tmp_path,
        page,
        f"--screenshot={seen}",
        "--window-size=1200,4400",
        f"--blink-settings=preferredColorScheme={scheme}",
    )
    with Image.open(seen) as image:
        pixels = np.asarray(image.convert("L"), np.float64)
    assert pixels.shape == (4400, 1200)
    assert min(band.std() for band in np.array_split(pixels, 4)) > 5
    assert (np.median(pixels) < 128) == (scheme == "0")  # dark, light
    assert escape("and where the formats’ levels lie") in chromium(tmp_path, page, "--dump-dom")
