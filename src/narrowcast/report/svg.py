"""Matplotlib figures as inline SVG that takes the page's colours, fonts and width."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

__all__ = ["COLOURS", "canvas", "inline_svg"]

#: Colours that figures draw with, and the variables of the style sheet that they become; so one SVG serves light and
#: dark pages. The values themselves are never seen: they only have to differ from each other.
COLOURS = {
    "ink": "#101112",
    "muted": "#202122",
    "rule": "#303132",
    "surface": "#404142",
    "accent": "#505152",
    "warm": "#606162",
    "good": "#707172",
    "soft": "#808182",
    "good-soft": "#909192",
}

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "narrowcast",
    "font.size": 11.0,
    "text.parse_math": False,  # a dollar sign in a tensor's name is a dollar sign
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["rule"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["rule"],
    "ytick.color": COLOURS["rule"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
}


@contextmanager
def canvas(width: float, height: float) -> Generator[Figure, None, None]:
    """Give an empty figure of so many pixels, inside whose block the report's settings hold."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        FigureCanvasSVG(figure)
        yield figure


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """Return a figure as an ``<svg>`` element without outside references.

    Args:
        figure: The figure, drawn inside `canvas`.
        name: Unique in the page; it keeps the identifiers of several figures apart.
        description: What a screen reader says.
    """
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # The browser draws the text with its own fonts, so a letter that Matplotlib's lack does no harm.
        warnings.filterwarnings("ignore", message=r".*Glyph .* missing from.*", category=UserWarning)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href=", "href=")
    svg = _own_ids(svg, name)
    for variable, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r"font: (?:([\w ]+?) )?([\d.]+)px [^;\"]*", _font, svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    shape = box.group(0) if box else ""
    head = f'<svg {shape} role="img" aria-label="{escape(description)}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1).strip()


def _font(found: re.Match[str]) -> str:
    weight = "bold" if found.group(1) and ("bold" in found.group(1) or "700" in found.group(1)) else "normal"
    return f"font-size: {found.group(2)}px; font-weight: {weight}"


def _own_ids(svg: str, name: str) -> str:
    """Drop the identifiers that nothing refers to and prefix the others with the figure's name."""
    used = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m.group(1)}"' if m.group(1) in used else "", svg)
    return re.sub(r'(url\(#|href="#)', lambda m: f"{m.group(1)}{name}-", svg)
