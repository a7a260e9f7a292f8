"""Pictures of what a model costs, as SVG: operators under a device's roofs, and memory over the course of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from narrowcast.accounting.kinds import Kind
from narrowcast.report import text
from narrowcast.report.picture import Axis, svg

__all__ = ["COLOURS", "PHASES", "Dot", "Roof", "Roofs", "phase_colours", "roofline", "timeline"]

#: The style sheet's colour for each sort of operator; sorts that seldom meet share one.
COLOURS: Mapping[Kind, str] = {
    Kind.CONVOLUTION: "blue",
    Kind.DEPTHWISE: "sky",
    Kind.PRODUCT: "green",
    Kind.ATTENTION: "vermillion",
    Kind.RECURRENT: "vermillion",
    Kind.NORMALISATION: "purple",
    Kind.SOFTMAX: "yellow",
    Kind.ELEMENTWISE: "orange",
    Kind.REDUCTION: "grey",
    Kind.POOLING: "grey",
    Kind.MOVE: "soft",
    Kind.VIEW: "soft",
}
#: And for each phase of a run.
PHASES: Mapping[str, str] = {"forward": "blue", "backward": "orange", "optimizer": "purple"}
_OTHER_PHASES = ("green", "vermillion", "yellow")

_LARGEST = 17.0  # pixels: the radius of the dot that takes the most time
_SMALLEST = 2.6
_MATTERS = 1e-3  # share of the time from which on an operator moves the axes


@dataclass(frozen=True)
class Dot:
    """Operators that are alike, in the roofline plot.

    Args:
        kind: Their sort.
        words: What they are, for who points at the dot.
        intensity: FLOP for each byte that they move.
        rate: FLOP per second that they are expected to reach.
        share: Of the whole time.
    """

    kind: Kind
    words: str
    intensity: float
    rate: float
    share: float


@dataclass(frozen=True)
class Roof:
    """The most that a device computes in one format: FLOP per second, and whether it is the format in question."""

    name: str
    rate: float
    main: bool = False


@dataclass(frozen=True)
class Roofs:
    """The limits of a device.

    Args:
        name: Of the device.
        bandwidth: Bytes per second.
        compute: At least one.
    """

    name: str
    bandwidth: float
    compute: Sequence[Roof]


def roofline(dots: Sequence[Dot], roofs: Roofs, *, name: str, width: int = 860, height: int = 470) -> str:
    """Return a roofline plot as SVG: intensity against FLOP/s, both on log scales.

    Args:
        dots: Operators; those without floating-point operations have no place and are left out.
        roofs: What the device can do at most.
        name: Unique in the page.
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.

    Reference:
        S. Williams, A. Waterman, D. Patterson: Roofline: an insightful visual performance model for multicore
        architectures. Communications of the ACM 52 (4), 2009.
    """
    shown = [dot for dot in dots if dot.intensity > 0 and dot.rate > 0]
    top = max(roof.rate for roof in roofs.compute)
    ridges = [roof.rate / roofs.bandwidth for roof in roofs.compute]
    heavy = [dot for dot in shown if dot.share >= _MATTERS]  # what takes no time may lie on the edge
    low = min([*(dot.intensity for dot in heavy), *ridges]) / 2.5
    high = max([*(dot.intensity for dot in heavy), *ridges]) * 4
    slowest = min([*(dot.rate for dot in heavy), low * roofs.bandwidth, *(roof.rate / 30 for roof in roofs.compute)])
    across = Axis(low, high, 78.0, width - 18.0, log=True)
    up = Axis(slowest / 2, top * 2.2, height - 54.0, 34.0, log=True)
    parts = [f'<text x="8" y="18">{escape("FLOP per second (log scale)")}</text>']
    parts += _grid(across, up, wide=width > 600)
    lines, labels = _roofs(roofs, across, up)
    parts += lines
    longest = max((dot.share for dot in shown), default=1.0)
    for dot in sorted(shown, key=lambda dot: -dot.share):
        radius = max(_SMALLEST, _LARGEST * math.sqrt(dot.share / longest))
        place = f'cx="{across.place(dot.intensity):.1f}" cy="{up.place(dot.rate):.1f}" r="{radius:.1f}"'
        parts.append(f'<circle {place} class="f-{COLOURS[dot.kind]} dot"><title>{escape(dot.words)}</title></circle>')
    parts += labels
    axis = "Arithmetic intensity: FLOP for each byte moved (log scale)" if width > 600 else "FLOP per byte (log scale)"
    parts.append(f'<text x="{(across.start + across.stop) / 2:.0f}" y="{height - 8}" class="m">{axis}</text>')
    return svg(width, height, parts, _describe(shown, roofs), name)


def _describe(dots: Sequence[Dot], roofs: Roofs) -> str:
    heaviest = "; ".join(dot.words for dot in sorted(dots, key=lambda dot: -dot.share)[:3])
    limits = ", ".join(f"{roof.name} {text.flop_rate(roof.rate)}" for roof in roofs.compute)
    words = f"Roofline of {roofs.name}: {text.byte_rate(roofs.bandwidth)}, {limits}. {len(dots)} groups of operators"
    return f"{words}; those that take the most time: {heaviest}" if dots else words


def _grid(across: Axis, up: Axis, *, wide: bool) -> Iterator[str]:
    for value in across.marks(9 if wide else 5):
        x = across.place(value)
        yield f'<path class="g" d="M{x:.1f} {up.stop:.1f}V{up.start:.1f}"/>'
        yield f'<text x="{x:.1f}" y="{up.start + 18:.1f}" class="m">{_tick(value)}</text>'
    for value in up.marks(8 if wide else 6):
        y = up.place(value)
        yield f'<path class="g" d="M{across.start:.1f} {y:.1f}H{across.stop:.1f}"/>'
        yield f'<text x="{across.start - 8:.1f}" y="{y + 4:.1f}" class="e">{_tick(value)}</text>'


def _tick(value: float) -> str:
    """Return a round number without digits that say nothing: 0.1, 20, 5 k, 1 G."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g}"


def _roofs(roofs: Roofs, across: Axis, up: Axis) -> tuple[list[str], list[str]]:
    """Return the roofs, and their labels, which stand above all dots."""
    bandwidth = roofs.bandwidth
    lines: list[str] = []
    labels: list[str] = []
    taken: list[float] = []
    for roof in sorted(roofs.compute, key=lambda roof: (not roof.main, -roof.rate)):
        y, ridge = up.place(roof.rate), across.place(roof.rate / bandwidth)
        lines.append(
            f'<path class="{"roof" if roof.main else "lower-roof"}" d="M{ridge:.1f} {y:.1f}H{across.stop:.1f}"/>'
        )
        if all(abs(y - other) > 15 for other in taken):  # a label on a label could not be read
            taken.append(y)
            words = escape(f"{roof.name} {text.flop_rate(roof.rate)}")
            weight = " b" if roof.main else ""
            labels.append(f'<text x="{across.stop - 4:.1f}" y="{y - 6:.1f}" class="e{weight}">{words}</text>')
    # The slope goes from the left or the lower edge up to the ridge of the highest roof.
    start = max(across.low, up.low / bandwidth)
    end = max(roof.rate for roof in roofs.compute) / bandwidth
    x1, y1, x2, y2 = across.place(start), up.place(start * bandwidth), across.place(end), up.place(end * bandwidth)
    lines.append(f'<path class="roof" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>')
    x, y = x1 + 0.5 * (x2 - x1), y1 + 0.5 * (y2 - y1) - 10
    turn = math.degrees(math.atan2(y2 - y1, x2 - x1))
    words = escape(f"memory {text.byte_rate(bandwidth)}")
    labels.append(
        f'<text x="{x:.1f}" y="{y:.1f}" class="m b" transform="rotate({turn:.1f} {x:.1f} {y:.1f})">{words}</text>'
    )
    return lines, labels


# Memory over time -----------------------------------------------------------------------------------------------------


def timeline(
    steps: Sequence[tuple[int, str]],
    *,
    peak: str,
    name: str,
    limit: tuple[int, str] | None = None,
    width: int = 860,
    height: int = 330,
) -> str:
    """Return live bytes over the course of a run as SVG, coloured by phase, with the peak marked.

    Args:
        steps: Live bytes and phase after each operator, in their order; at least one.
        peak: What is written at the peak.
        name: Unique in the page.
        limit: Bytes of a device's memory and its name; drawn if it is not far above the peak.
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.
    """
    most = max(size for size, _ in steps)
    at = next(place for place, (size, _) in enumerate(steps) if size == most)
    near = limit if limit is not None and limit[0] <= 1.6 * most else None
    across = Axis(0, len(steps), 72.0, width - 14.0)
    up = Axis(0, max(1, most, near[0] if near else 0) * 1.12, height - 44.0, 30.0)
    parts = ['<text x="8" y="16">Bytes alive</text>']
    for value in up.marks(5):
        y = up.place(value)
        parts.append(f'<path class="g" d="M{across.start:.1f} {y:.1f}H{across.stop:.1f}"/>')
        shown = text.quantity(value, "bytes") if value else "0"
        parts.append(f'<text x="{across.start - 8:.1f}" y="{y + 4:.1f}" class="e">{shown}</text>')
    phases = phase_colours([phase for _, phase in steps])
    for phase, run in groupby(enumerate(steps), lambda item: item[1][1]):
        places = [(place, size) for place, (size, _) in run]
        parts.append(f'<path class="f-{phases[phase]} phase" d="{_area(places, across, up)}"/>')
    if near:
        y = up.place(near[0])
        parts.append(f'<path class="o" d="M{across.start:.1f} {y:.1f}H{across.stop:.1f}"/>')
        parts.append(f'<text x="{across.stop - 4:.1f}" y="{y - 6:.1f}" class="e">{escape(near[1])}</text>')
    x, y = across.place(at + 0.5), up.place(most)
    side = "s" if x < width * 0.3 else "e" if x > width * 0.7 else "m"
    label = escape(text.label(peak, 76 if width > 600 else 40))
    parts.append(f'<circle class="peak" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{label}</title></circle>')
    parts.append(f'<text x="{x:.1f}" y="{y - 11:.1f}" class="b {side}">{label}</text>')
    axis = f"{text.integer(len(steps))} steps of the run, in their order"
    parts.append(f'<text x="{(across.start + across.stop) / 2:.0f}" y="{height - 10}" class="m">{axis}</text>')
    words = f"Memory over {len(steps)} steps of the run ({', '.join(phases)}); peak {label}"
    return svg(width, height, parts, words, name)


def phase_colours(phases: Sequence[str]) -> dict[str, str]:
    """Return a colour for each phase, in the order in which they come."""
    rest = iter(_OTHER_PHASES * len(phases))
    return {phase: PHASES.get(phase) or next(rest) for phase in dict.fromkeys(phases)}


def _area(places: Sequence[tuple[int, int]], across: Axis, up: Axis) -> str:
    """Return the outline of steps; of those that share half a pixel the highest is drawn, so that no peak is lost."""
    path = f"M{across.place(places[0][0]):.1f} {up.start:.1f}"
    for x, group in groupby(places, lambda item: round(2 * across.place(item[0] + 1)) / 2):
        path += f"V{up.place(max(size for _, size in group)):.1f}H{x:.1f}"
    return f"{path}V{up.start:.1f}z"
