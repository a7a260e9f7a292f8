"""The rows of the page on costs: modules as bars and as a tree, operators, and sorts of parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from narrowcast.report import text
from narrowcast.report.profile_costs import Costs, Group
from narrowcast.report.profile_plots import COLOURS
from narrowcast.report.profile_tree import ITSELF, Node, leaves

__all__ = [
    "MOST_OPERATORS",
    "Bar",
    "Branch",
    "Operator",
    "Share",
    "bars",
    "branch",
    "by_weight",
    "operators",
    "seconds",
    "shares",
]

#: Operators that get a row.
MOST_OPERATORS = 120


@dataclass(frozen=True)
class _Track:
    """A bar of one measure: width in percent, and what is written under it."""

    width: float
    share: str
    value: str


@dataclass(frozen=True)
class Bar:
    """A module with a bar for each measure."""

    name: str
    kind: str
    tracks: list[_Track]


@dataclass(frozen=True)
class Branch:
    """A line of the tree: its texts, its bar's width in percent, and the lines under it."""

    label: str
    kind: str
    count: int
    cells: list[str]
    width: float
    share: str
    open: bool
    children: list[Branch]


@dataclass(frozen=True)
class Operator:
    """Operators that are alike as a row; ``ranks`` are style properties that the page sorts by."""

    name: str
    kind: str
    colour: str
    where: str
    shapes: str
    cells: list[str]
    bound: str
    ranks: str


@dataclass(frozen=True)
class Share:
    """One sort of thing with its count and its share of the whole, in percent."""

    name: str
    value: str
    exact: str
    width: float
    share: str


def seconds(node: Node) -> float:
    """Return how long a part takes; 0 where that is not known."""
    return node.seconds or 0.0


# Modules --------------------------------------------------------------------------------------------------------------


def by_weight(costs: Costs) -> list[tuple[str, Node]]:
    """Return what does the work with its path, the most expensive first."""
    found = [(path, node) for path, node in leaves(costs.tree) if node.operators]
    return sorted(found, key=lambda item: (-seconds(item[1]), -item[1].macs, -item[1].bytes_moved))


def bars(heavy: Sequence[tuple[str, Node]], costs: Costs) -> list[Bar]:
    """Return bars that are as long as their share of the longest, and say their share of the whole."""
    timed = costs.estimate is not None
    measures: list[tuple[Callable[[Node], float], Callable[[float], str]]] = [
        *([(seconds, lambda value: text.quantity(value, "s"))] if timed else []),
        (lambda node: node.macs, text.count),
        (lambda node: node.bytes_moved, lambda value: text.quantity(value, "bytes")),
    ]
    most = [max((measure(node) for _, node in heavy), default=0.0) for measure, _ in measures]
    made: list[Bar] = []
    for path, node in heavy:
        tracks = [
            _track(measure(node), longest, measure(costs.tree), words)
            for (measure, words), longest in zip(measures, most, strict=True)
        ]
        kind = f"{node.count} × {node.kind}" if node.count > 1 else node.kind
        made.append(Bar(path, f"{kind}, {node.label}" if node.label == ITSELF else kind, tracks))
    return made


def _track(value: float, longest: float, whole: float, words: Callable[[float], str]) -> _Track:
    if not value:
        return _Track(0.0, "", "")
    return _Track(100 * value / longest, text.portion(value / whole), words(value))


def branch(node: Node, costs: Costs, *, level: int) -> Branch:
    """Return a part of the tree with those inside it, the way to what is expensive open."""
    part, whole = (seconds(node), seconds(costs.tree)) if costs.estimate else (node.macs, costs.tree.macs)
    share = part / whole if whole else 0.0
    cells = [
        text.count(node.parameters) if node.parameters else "",
        text.count(node.macs) if node.macs else "",
        text.quantity(node.bytes_moved, "bytes") if node.bytes_moved else "",
    ]
    if costs.estimate is not None:
        cells.append(text.quantity(node.seconds, "s") if node.seconds else "")
    inside = [*node.children, *([node.own] if node.own is not None else [])]
    children = [branch(child, costs, level=level + 1) for child in inside]
    opened = level == 0 or (level < 3 and share > 0.3)
    return Branch(
        node.label, node.kind, node.count, cells, 100 * share, text.portion(share) if share else "", opened, children
    )


# Operators and parameters ---------------------------------------------------------------------------------------------


def operators(alike: Sequence[Group], timed: bool) -> list[Operator]:
    """Return the most expensive operators by any measure, with their ranks in each: the style sheet sorts by them."""
    measures = {
        "macs": lambda group: group.macs,
        "bytes": lambda group: group.bytes,
        "intensity": lambda group: group.intensity,
        "time": lambda group: group.seconds or 0.0,
    }
    shown = alike[:MOST_OPERATORS]
    ranks: dict[int, list[str]] = defaultdict(list)
    for name, measure in measures.items():
        for rank, place in enumerate(sorted(range(len(shown)), key=lambda place: -measure(shown[place]))):
            ranks[place].append(f"--{name}:{rank}")
    return [_operator(group, ";".join(ranks[place]), timed) for place, group in enumerate(shown)]


def _operator(group: Group, ranks: str, timed: bool) -> Operator:
    cells = [
        text.count(group.macs) if group.macs else "",
        text.quantity(group.bytes, "bytes"),
        text.number(group.intensity, 2),
    ]
    if timed:
        cells.append(text.quantity(group.seconds, "s") if group.seconds else "fused")
    calls = f"{group.count} × " if group.count > 1 else ""
    where = group.where or "the model"
    return Operator(
        f"{calls}{group.name}", group.kind, COLOURS[group.kind], where, group.shapes, cells, group.bound, ranks
    )


def shares(by_kind: dict[str, int], total: int) -> list[Share]:
    """Return sorts of parameters with their shares of the total."""
    return [
        Share(name, text.count(count), text.integer(count), 100 * count / total, text.portion(count / total))
        for name, count in by_kind.items()
        if count
    ]
