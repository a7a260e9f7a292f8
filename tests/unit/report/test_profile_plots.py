"""Rooflines and memory over time: dots, roofs and areas lie where the numbers say."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from narrowcast.accounting.kinds import Kind
from narrowcast.report.picture import Axis
from narrowcast.report.profile_plots import COLOURS, Dot, Roof, Roofs, phase_colours, roofline, timeline

ROOFS = Roofs("A device", 1e12, [Roof("BF16", 1e15, main=True), Roof("FP32", 1e14)])


def dot(words: str, intensity: float, rate: float, share: float, kind: Kind = Kind.PRODUCT) -> Dot:
    return Dot(kind, words, intensity, rate, share)


def circles(svg: str) -> dict[str, dict[str, str]]:
    root = ElementTree.fromstring(svg)
    return {circle.findtext("title") or "": dict(circle.attrib) for circle in root.iter("circle")}


def test_every_sort_of_operator_has_a_colour():
    assert set(COLOURS) == set(Kind)


def test_dots_lie_on_log_scales():
    dots = [dot("a", 1, 1e10, 0.1), dot("b", 10, 1e11, 0.4), dot("c", 100, 1e12, 0.5)]
    drawn = circles(roofline(dots, ROOFS, name="r"))
    x = [float(drawn[name]["cx"]) for name in "abc"]
    y = [float(drawn[name]["cy"]) for name in "abc"]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)
    assert x[0] < x[1]
    assert y[0] > y[1]


def test_a_dots_area_is_its_share():
    drawn = circles(roofline([dot("a", 1, 1e10, 0.2), dot("b", 10, 1e11, 0.8)], ROOFS, name="r"))
    assert float(drawn["b"]["r"]) ** 2 / float(drawn["a"]["r"]) ** 2 == pytest.approx(4, rel=0.03)


def test_a_dot_at_the_limit_lies_on_the_roof():
    svg = roofline([dot("bound", 10, 1e13, 0.5), dot("peak", 1e4, 1e15, 0.5)], ROOFS, name="r")
    drawn = circles(svg)
    paths = [path.attrib for path in ElementTree.fromstring(svg).iter("path")]
    flat = next(path["d"] for path in paths if path["class"] == "roof" and "H" in path["d"])
    assert float(flat.split()[1].split("H")[0]) == pytest.approx(float(drawn["peak"]["cy"]), abs=0.2)
    slope = next(path["d"] for path in paths if path["class"] == "roof" and "L" in path["d"])
    x1, y1, x2, y2 = map(float, re.findall(r"[\d.]+", slope))
    on_slope = y1 + (float(drawn["bound"]["cx"]) - x1) / (x2 - x1) * (y2 - y1)
    assert on_slope == pytest.approx(float(drawn["bound"]["cy"]), abs=0.3)
    ridge = float(flat[1:].split()[0])
    assert ridge == pytest.approx(x2, abs=0.2)  # 1e15 / 1e12 = 1000 FLOP/B, where both roofs meet


def test_roofs_are_labelled_and_the_one_in_question_stands_out():
    svg = roofline([dot("a", 1, 1e10, 1.0)], ROOFS, name="r")
    words = " ".join("".join(ElementTree.fromstring(svg).itertext()).split())
    for label in ("BF16 1.00 PFLOP/s", "FP32 100 TFLOP/s", "memory 1.00 TB/s"):
        assert label in words
    assert svg.count('class="lower-roof"') == 1
    assert 'aria-label="Roofline of A device' in svg


def test_operators_without_operations_have_no_place():
    assert circles(roofline([dot("move", 0, 0, 0.5), dot("a", 1, 1e10, 0.5)], ROOFS, name="r")).keys() == {"a"}
    assert circles(roofline([], ROOFS, name="r")) == {}


def test_names_cannot_become_markup():
    svg = roofline([dot("<b>&", 1, 1e10, 1.0)], Roofs("<i>", 1e12, [Roof("<u>", 1e14, main=True)]), name="r")
    ElementTree.fromstring(svg)
    assert "<b>" not in svg
    assert "<i>" not in svg
    ElementTree.fromstring(timeline([(1, "<b>")], peak="<b>&", name="t"))


STEPS = [(100, "forward"), (400, "forward"), (900, "forward"), (700, "backward"), (200, "backward"), (300, "optimizer")]


def test_the_peak_is_marked_where_it_is():
    svg = timeline(STEPS, peak="900 B at mm (forward, layer)", name="t")
    ((title, peak),) = circles(svg).items()
    assert title == "900 B at mm (forward, layer)"
    axis = Axis(0, len(STEPS), 72.0, 846.0)
    assert float(peak["cx"]) == pytest.approx(axis.place(2.5), abs=0.1)
    area = next(p.attrib for p in ElementTree.fromstring(svg).iter("path") if "f-blue" in p.attrib["class"])
    assert min(float(y) for y in re.findall(r"V([\d.]+)", area["d"])) == pytest.approx(float(peak["cy"]), abs=0.1)


def test_each_phase_has_its_colour():
    assert phase_colours([phase for _, phase in STEPS]) == {
        "forward": "blue",
        "backward": "orange",
        "optimizer": "purple",
    }
    svg = timeline(STEPS, peak="mm", name="t")
    areas = [p.attrib["class"] for p in ElementTree.fromstring(svg).iter("path") if "phase" in p.attrib["class"]]
    assert areas == ["f-blue phase", "f-orange phase", "f-purple phase"]


def test_no_peak_is_lost_among_many_steps():
    steps = [(1000, "forward")] * 50_000
    steps[12_345] = (9000, "forward")
    svg = timeline(steps, peak="one", name="t")
    assert len(svg) < 100_000
    ((_, peak),) = circles(svg).items()
    area = next(p.attrib["d"] for p in ElementTree.fromstring(svg).iter("path") if "phase" in p.attrib["class"])
    assert min(float(y) for y in re.findall(r"V([\d.]+)", area)) == pytest.approx(float(peak["cy"]), abs=0.1)


def test_a_devices_memory_is_drawn_if_it_is_near():
    assert "of a card" in timeline(STEPS, peak="mm", name="t", limit=(1200, "of a card"))
    assert "of a card" not in timeline(STEPS, peak="mm", name="t", limit=(120_000, "of a card"))


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0.01, 1e5, True), (3.0, 40.0, True), (0, 7e9, False), (-3, 4, False)]
)
def test_marks_are_round_and_inside(low: float, high: float, log: bool):
    axis = Axis(low, high, 10, 110, log=log)
    marks = axis.marks(6)
    assert 2 <= len(marks) <= 8
    assert all(low <= mark <= high for mark in marks)
    for mark in marks:
        digits = abs(mark) / 10.0 ** math.floor(math.log10(abs(mark))) if mark else 0.0
        assert round(digits * 2, 6).is_integer()
    assert axis.place(low) == 10
    assert axis.place(high) == 110
