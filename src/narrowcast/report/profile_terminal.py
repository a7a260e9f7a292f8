"""What a model costs, on a terminal: the numbers, the modules as a tree that folds, and the operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from narrowcast.report import text
from narrowcast.report.profile_costs import BATCHES, Costs, Group, cache_rows, compared, groups, part_name, rows, title
from narrowcast.report.profile_tree import Node
from narrowcast.report.screen import HEAD, QUIET, Say, new_table, sayer

if TYPE_CHECKING:
    from narrowcast.accounting.memory import Memory

__all__ = ["notes", "render_comparison_terminal", "render_profile_terminal"]

_BAR = 12  # characters of a full bar
_NARROW = 90  # columns of a terminal below which bars and what words mean are left out
_BOTH_NAMES = 110  # columns from which on a comparison is headed by the names of both models
_SHORTEST = 8  # characters of a module's name
_GAP = 2  # columns between columns


class _Line(NamedTuple):
    """A node as a line of the tree: the guides before its name, and itself."""

    guides: str
    node: Node


def render_profile_terminal(costs: Costs, console: Console, *, depth: int = 3, operators: int = 0) -> None:
    """Print what a model costs; columns go where the terminal is narrow, symbols where it has no Unicode.

    Args:
        costs: Everything that is shown.
        console: Where to print.
        depth: Levels of modules to show.
        operators: Groups of operators to show.
    """
    say = sayer(console)
    wide = console.width >= _NARROW
    console.print(say(title(costs), HEAD))
    console.print(_numbers(costs, say, wide))
    if costs.memory is not None:
        console.print(_memory(costs.memory, say, wide))
    console.print(_tree(costs, depth, say, console.width))
    if operators and (shown := groups(costs)[:operators]):
        console.print(_operators(shown, costs, say, console.width))
    if costs.cache is not None:
        console.print(_cache(costs, say))
    for note in notes(costs):
        console.print(say(note, QUIET))
    if costs.profile.uncounted:
        missed = ", ".join(f"{name} ({count})" for name, count in costs.profile.uncounted.items())
        console.print(say(f"Not counted, for want of a rule: {missed}", "yellow"))


def render_comparison_terminal(first: Costs, second: Costs, console: Console) -> None:
    """Print what two models cost side by side, with differences and ratios.

    Args:
        first: What the second is compared with.
        second: The other.
        console: Where to print.
    """
    say = sayer(console)
    table = new_table()
    table.add_column("measure", no_wrap=True)
    wide = console.width >= _BOTH_NAMES
    headings = [text.tail(costs.profile.model, 28) for costs in (first, second)] if wide else ["first", "second"]
    for heading in headings:
        table.add_column(say(heading), justify="right", no_wrap=True)
    table.add_column("difference", justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    for row in compared(first, second):
        table.add_row(*(say(cell) for cell in (row.label, row.first, row.second, row.difference, row.ratio)))
    named = ("", "") if wide else ("first: ", "second: ")
    console.print(
        say("\n".join(f"{name}{title(costs)}" for name, costs in zip(named, (first, second), strict=True)), HEAD)
    )
    console.print(table)


def notes(costs: Costs) -> Iterator[str]:
    """Yield what a reader of the numbers should know."""
    tied = costs.profile.parameters.tied
    if tied:
        names = ", ".join(f"{name} is {first}" for name, first in list(tied.items())[:3])
        more = f" and {len(tied) - 3} more" if len(tied) > 3 else ""
        yield f"Tied, counted once in the total: {names}{more}"
    if unknown := costs.profile.attention.unknown:
        yield (
            f"{unknown} of {costs.profile.attention.calls} attentions have masks that are not known, since they depend on "
            "inputs or weights, or lie in a file beside the graph, which is not read: they count as if nothing were hidden"
        )
    own = costs.profile.parameters.dtype
    if own in ("float16", "bfloat16"):
        yield f"The module itself is in {own}."
    if costs.estimate is not None and costs.estimate.source:
        yield f"Times: {costs.estimate.source}"
        yield from (f"{note[0].upper()}{note[1:]}" for note in costs.estimate.notes)


def _numbers(costs: Costs, say: Say, wide: bool) -> Table:
    table = new_table()
    table.add_column("measure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("exactly", justify="right", no_wrap=True, style=QUIET)
    if wide:
        table.add_column("", style=QUIET)
    for row in rows(costs):
        cells = [say(row.label), say(row.short, HEAD), say(row.exact)]
        table.add_row(*cells, *([say(row.hint)] if wide else []))
    return table


def _memory(found: Memory, say: Say, wide: bool) -> Table:
    """Return what the memory holds at its peak."""
    table = new_table()
    spread = f", on each of {found.devices} devices ({found.sharding})" if found.devices > 1 else ""
    table.add_column(say(f"memory at the peak{spread}"), no_wrap=True)
    for heading in ("bytes", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    if wide:
        table.add_column("", no_wrap=True, min_width=_BAR)
    for name, size in found.parts.items():
        if size:
            share = size / found.peak
            bar = [say("█" * round(_BAR * share), "blue")] if wide else []
            table.add_row(say(part_name(name)), say(text.quantity(size, "bytes")), say(text.portion(share)), *bar)
    return table


def _cache(costs: Costs, say: Say) -> Table:
    """Return the bytes of keys and values by tokens and sequences."""
    made = cache_rows(costs)
    table = new_table()
    table.add_column("tokens kept", justify="right", no_wrap=True)
    for batch in BATCHES:
        table.add_column(f"{batch} sequence{'' if batch == 1 else 's'}", justify="right", no_wrap=True)
    fits = any(row.fit is not None for row in made)
    if fits:
        table.add_column("fit", justify="right", no_wrap=True)
    for row in made:
        cells = [text.integer(row.tokens), *(text.quantity(size, "bytes") for size in row.bytes)]
        table.add_row(*map(say, cells), *([say(text.integer(row.fit))] if fits else []))
    return table


# The tree -------------------------------------------------------------------------------------------------------------


def _tree(costs: Costs, depth: int, say: Say, width: int) -> Table:
    root, timed, wide = costs.tree, costs.estimate is not None, width >= _NARROW
    measure, whole = (_seconds, _seconds(root)) if timed else (_macs, _macs(root))
    columns: dict[str, Callable[[Node], str]] = {
        "parameters": lambda node: text.count(node.parameters) if node.parameters else "",
        "MACs": lambda node: text.count(node.macs) if node.macs else "",
        "moved": lambda node: text.quantity(node.bytes_moved, "bytes") if node.bytes_moved else "",
        **({"FLOP/B": lambda node: text.number(node.intensity, 2) if node.bytes_moved else ""} if wide else {}),
        **({"time": lambda node: text.quantity(node.seconds, "s") if node.seconds else ""} if timed else {}),
        ("of time" if timed else "of MACs"): lambda node: text.portion(measure(node) / whole) if measure(node) else "",
    }
    lines = list(_lines(root, "", "", depth))
    table = new_table()
    table.add_column("module" if root.paths[0] or costs.profile.parts[1:] else "operator", no_wrap=True)
    room = width - _GAP - (_BAR + _GAP if wide else 0)
    for heading, show in columns.items():
        least = max(len(words) for words in [heading, *(show(line.node) for line in lines)])
        room -= least + _GAP
        table.add_column(heading, justify="right", no_wrap=True, min_width=least)
    if wide:
        table.add_column("", no_wrap=True, min_width=_BAR)
    for guides, node in lines:
        name = say(guides, QUIET) + say(text.tail(node.label, 48), HEAD)
        name += say(f"  {node.count} × " if node.count > 1 else "  ") + say(node.kind, "cyan")
        part = measure(node) / whole if whole else 0.0
        bar = [say("█" * max(round(_BAR * part), int(part > 0.01)), "blue")] if wide else []
        table.add_row(_cut(name, room, say), *(say(show(node)) for show in columns.values()), *bar)
    return table


def _cut(words: Text, room: int, say: Say) -> Text:
    """Return words that fit; numbers keep their places beside them."""
    if words.cell_len <= room:
        return words
    mark = say("…")
    words.truncate(max(room - mark.cell_len, 1))
    return words + mark


def _seconds(node: Node) -> float:
    return node.seconds or 0.0


def _macs(node: Node) -> float:
    return float(node.macs)


def _lines(node: Node, before: str, inner: str, depth: int) -> Iterator[_Line]:
    """Yield a node and, down to a depth, what is in it."""
    yield _Line(before, node)
    if depth == 0:
        return
    for place, child in enumerate(node.children, start=1):
        last = place == len(node.children)
        yield from _lines(child, f"{inner}{'└ ' if last else '├ '}", f"{inner}{'  ' if last else '│ '}", depth - 1)


# Operators ------------------------------------------------------------------------------------------------------------


def _operators(shown: Sequence[Group], costs: Costs, say: Say, width: int) -> Table:
    timed = costs.estimate is not None
    headings = ["operator", "calls", "MACs", "moved", "FLOP/B", *(["time", "bound by"] if timed else [])]
    made = [_cells(group, timed) for group in shown]
    table = new_table()
    room = width - _GAP
    for place, heading in enumerate(headings):
        least = max(len(cells[place]) for cells in [headings, *made])
        room -= least + _GAP
        table.add_column(heading, justify="right" if place else "left", no_wrap=True, min_width=least)
    table.add_column("first in", no_wrap=True)
    where = [say(text.tail(group.where or "the model", min(max(room, _SHORTEST), 36)), "cyan") for group in shown]
    room -= max(item.cell_len for item in where) + _GAP
    shapes = room > 2 * _SHORTEST
    if shapes:
        table.add_column("shapes of the first", no_wrap=True)
    for group, (name, *numbers), place in zip(shown, made, where, strict=True):
        rest = [_cut(say(group.shapes, QUIET), room, say)] if shapes else []
        table.add_row(say(name, HEAD), *map(say, numbers), place, *rest)
    return table


def _cells(group: Group, timed: bool) -> list[str]:
    macs = text.count(group.macs) if group.macs else ""
    moved, intensity = text.quantity(group.bytes, "bytes"), text.number(group.intensity, 2)
    cells = [text.label(group.name, 24), str(group.count), macs, moved, intensity]
    if not timed:
        return cells
    return [*cells, text.quantity(group.seconds, "s") if group.seconds else "fused", group.bound]
