"""The modules of a profile as a tree in which equal siblings are folded into one line: ``layers.0-31: 32 × LlamaDecoderLayer``.

The terminal and the page both show this tree.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from narrowcast.accounting.kinds import Kind
from narrowcast.accounting.profile import Part, Profile

__all__ = ["ITSELF", "Node", "fold", "leaves", "ranges"]

#: How what a module computes outside the modules in it is called.
ITSELF = "itself"

# Modules that do nothing but hold others.
_CONTAINERS = frozenset({"ModuleList", "ModuleDict", "Sequential"})
_MOST_RANGES = 4


@dataclass(frozen=True)
class Node:
    """One module, or siblings that are equal in kind, structure and every count.

    Args:
        label: Its name in its parent, or the siblings' names.
        kind: Its class.
        paths: The names in the model, one for each of the siblings.
        parameters: Of all siblings together, like everything below.
        macs: Multiply-accumulates.
        flops: All floating-point operations: twice the MACs, additions of biases, and others.
        bytes_moved: Bytes read and written by operators, if each ran alone.
        operators: Operators that are no views.
        seconds: Estimated time; None where nobody estimated.
        children: The modules inside, likewise folded.
    """

    label: str
    kind: str
    paths: tuple[str, ...]
    parameters: int
    macs: int
    flops: int
    bytes_moved: float
    operators: int
    seconds: float | None
    children: tuple[Node, ...]

    @property
    def count(self) -> int:
        """How many equal siblings this stands for."""
        return len(self.paths)

    @property
    def intensity(self) -> float:
        """Floating-point operations for each byte that is moved."""
        return self.flops / self.bytes_moved if self.bytes_moved else 0.0

    @property
    def own(self) -> Node | None:
        """What the module computes itself, outside the modules in it; None if it has none, or computes nothing itself."""
        if not self.children or self.operators == sum(child.operators for child in self.children):
            return None
        return replace(
            self,
            label=ITSELF,
            parameters=0,  # children may share theirs, so that what is left would be no count
            macs=self.macs - sum(child.macs for child in self.children),
            flops=self.flops - sum(child.flops for child in self.children),
            bytes_moved=self.bytes_moved - sum(child.bytes_moved for child in self.children),
            operators=self.operators - sum(child.operators for child in self.children),
            seconds=None
            if self.seconds is None
            else max(0.0, self.seconds - sum(child.seconds or 0.0 for child in self.children)),
            children=(),
        )


def fold(found: Profile, *, moved: Sequence[float] | None = None, seconds: Sequence[float] | None = None) -> Node:
    """Return a profile's modules as a tree with equal siblings folded.

    Siblings fold if they are equal in class, in every count and in everything inside them, so that a line for several
    stands for each. Leaves fold only next to each other, blocks wherever they stand.

    Args:
        found: The profile.
        moved: Bytes that each of its operators moves, in their order; as they were counted unless given.
        seconds: Estimated time of each.
    """
    return _Folder(found, moved, seconds).root()


def leaves(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    """Yield what does the work, with where it is: modules without modules inside, and what others compute themselves.

    Args:
        node: Where to look.
        path: What stands before the names; nothing for the whole model.
    """
    if not node.children:
        yield path or node.label, node
        return
    if node.own is not None:
        yield path or node.label, node.own
    for child in node.children:
        yield from leaves(child, f"{path}.{child.label}" if path else child.label)


def ranges(names: Sequence[str]) -> str:
    """Return names in short: runs of numbers as ranges, the middle of a long list left out.

    >>> ranges(["0", "1", "2", "5"]), ranges(["q_proj", "k_proj"])
    ('0-2, 5', 'q_proj, k_proj')
    """
    parts = list(names)
    if all(name.isdecimal() for name in names):
        runs = itertools.groupby(enumerate(map(int, names)), lambda item: item[1] - item[0])
        spans = [[number for _, number in run] for _, run in runs]
        parts = [str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans]
    if len(parts) > _MOST_RANGES:
        parts = [*parts[: _MOST_RANGES - 1], "…", parts[-1]]
    return ", ".join(parts)


class _Folder:
    def __init__(self, found: Profile, moved: Sequence[float] | None, seconds: Sequence[float] | None) -> None:
        self.found = found
        self.parts = {part.path: part for part in found.parts}
        self.inside: dict[str, list[str]] = defaultdict(list)
        for path in self.parts:
            if path:
                self.inside[self._parent(path)].append(path)
        counted = [operator.bytes_read + operator.bytes_written for operator in found.operators]
        self.each_moved = moved or counted
        self.each_took = seconds
        self.moved = _by_path(found, self.each_moved)
        self.seconds = None if seconds is None else _by_path(found, seconds)
        self.known: dict[Hashable, int] = {}
        self.shapes: dict[str, int] = {}
        for path in reversed(list(self.parts)):  # children come after their parents
            self.shapes[path] = self._shape(path)

    def root(self) -> Node:
        """Return the whole model."""
        whole = self._node("", [""])
        return replace(
            whole,
            label=self.found.model,
            parameters=self.found.parameters.total,
            children=whole.children or tuple(self._by_operator()),
        )

    def _by_operator(self) -> Iterator[Node]:
        """Yield the operators by name, for graphs that know no modules; what they own is not known."""
        places: dict[tuple[str, Kind], list[int]] = defaultdict(list)
        for place, operator in enumerate(self.found.operators):
            if operator.bytes_read + operator.bytes_written:
                places[operator.name, operator.kind].append(place)
        for (name, kind), members in places.items():
            works = [work for place in members if (work := self.found.operators[place].work) is not None]
            yield Node(
                label=name,
                kind=kind,
                paths=tuple(self.found.operators[place].path for place in members),
                parameters=0,
                macs=sum(work.macs for work in works),
                flops=sum(2 * work.macs + work.bias_adds + work.other for work in works),
                bytes_moved=math.fsum(self.each_moved[place] for place in members),
                operators=len(members),
                seconds=None if self.each_took is None else math.fsum(self.each_took[place] for place in members),
                children=(),
            )

    def _parent(self, path: str) -> str:
        """Return the nearest module around a path; a walker may leave out modules that do nothing."""
        while path:
            path = path.rpartition(".")[0]
            if path in self.parts:
                break
        return path

    def _name(self, path: str) -> str:
        return path.removeprefix(self._parent(path)).lstrip(".")

    def _shape(self, path: str) -> int:
        """Return a number that two modules share if they are equal in all but their own names."""
        inside = tuple((self._name(child), self.shapes[child]) for child in self.inside[path])
        counts = tuple(self.parts[path].model_dump(exclude={"path"}).values())
        return self.known.setdefault((counts, inside), len(self.known))

    def _node(self, label: str, paths: Sequence[str]) -> Node:
        parts = [self.parts[path] for path in paths]
        children = tuple(self._children(paths))
        kind = parts[0].kind
        if len(children) == 1 and kind in _CONTAINERS and len(paths) == 1 and label:
            (only,) = children
            return replace(only, label=f"{label}.{only.label}")
        return Node(
            label=label,
            kind=kind,
            paths=tuple(paths),
            parameters=sum(part.parameters for part in parts),
            macs=sum(part.macs for part in parts),
            flops=sum(_flops(part) for part in parts),
            bytes_moved=math.fsum(self.moved.get(path, 0.0) for path in paths),
            operators=sum(part.operators for part in parts),
            seconds=None if self.seconds is None else math.fsum(self.seconds.get(path, 0.0) for path in paths),
            children=children,
        )

    def _children(self, paths: Sequence[str]) -> Iterator[Node]:
        """Yield the modules inside equal modules; ``paths`` are those modules' names."""
        names = [self._name(child) for child in self.inside[paths[0]]]
        places = {name: [self.inside[path][place] for path in paths] for place, name in enumerate(names)}
        for group in self._groups([name for name in names if self._worth(places[name][0])], places):
            yield self._node(ranges(group), [path for name in group for path in places[name]])

    def _worth(self, path: str) -> bool:
        part = self.parts[path]
        return bool(part.operators or part.parameters)

    def _groups(self, names: Iterable[str], places: Mapping[str, Sequence[str]]) -> Iterator[list[str]]:
        groups: list[tuple[int, list[str]]] = []
        for name in names:
            path = places[name][0]
            shape = self.shapes[path]
            block = name.isdecimal() and bool(self.inside[path])
            alike = [group for known, group in (groups if block else groups[-1:]) if known == shape]
            if alike:
                alike[-1].append(name)
            else:
                groups.append((shape, [name]))
        return (group for _, group in groups)


def _flops(part: Part) -> int:
    return 2 * part.macs + part.bias_adds + part.other_flops


def _by_path(found: Profile, amounts: Sequence[float]) -> dict[str, float]:
    """Return the sum over every module's operators, with everything inside it."""
    total: dict[str, float] = defaultdict(float, {"": 0.0})
    for operator, amount in zip(found.operators, amounts, strict=True):
        names = operator.path.split(".") if operator.path else []
        for depth in range(len(names) + 1):
            total[".".join(names[:depth])] += amount
    return total
