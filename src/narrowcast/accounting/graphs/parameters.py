"""Which constants of an ONNX graph are parameters, and whose.

A graph does not say what was trained. Counted are the floating constants of more than one number that an operator computes
with or looks up, whatever the size where the operator's specification says that it is a weight or bias, and the codes of
quantised weights. Not counted are shapes, axes, bounds, running statistics, scales and zero points.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from narrowcast.accounting.graphs.files import Stored
from narrowcast.accounting.graphs.rules import Call, Entry, numbers_in
from narrowcast.accounting.profile import Layer, Parameters

__all__ = ["Registry"]


class Registry:
    """Notes which operators read which constants.

    Args:
        stored: The constants of the model, by name.

    Attributes:
        classes: Classes of modules by their paths, as far as they are known.
    """

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = stored
        self._first = _first_names(stored)
        self._codes: set[str] = set()
        self._numbers: dict[str, int] = {}
        self._kinds: Counter[str] = Counter()
        self._owners: dict[str, set[str]] = {"": set()}  # by module, everything inside it included
        self.classes: dict[str, str] = {}

    @property
    def stored_bytes(self) -> int:
        """Bytes of all constants, each place once."""
        return sum(self._stored[name].tensor.nbytes for name in set(self._first.values()))

    def visit(self, path: str) -> None:
        """Note that a module runs."""
        for module in _around(path):
            self._owners.setdefault(module, set())

    def note(self, call: Call, entry: Entry, sources: Sequence[frozenset[str]], path: str) -> None:
        """Note what an operator reads.

        Args:
            call: The operator.
            entry: What is known of it.
            sources: For each input, the constants that it is or holds in another form.
            path: The operator's module.
        """
        if call.operator == "DequantizeLinear" and sources[0]:
            self._codes |= sources[0]  # whoever reads the numbers owns the weights
            return
        for place, names in enumerate(sources):
            if place in entry.settings:
                continue
            for name in names:
                first = self._first.get(name, name)
                if self._is_parameter(first, call, place in entry.weights and len(names) == 1):
                    self._add(first, call, place, path)

    def _is_parameter(self, name: str, call: Call, is_weight: bool) -> bool:
        if name not in self._stored:
            return False
        tensor = self._stored[name].tensor
        if name in self._codes:
            return is_weight or tensor.size > 1
        floating = "float" in tensor.dtype or "complex" in tensor.dtype
        if is_weight and (floating or call.operator != "Gather"):
            return True
        codes = is_weight and tensor.bits <= 8 and tensor.dtype != "bool"  # a quantised table
        return codes or (floating and tensor.size > 1)

    def _add(self, name: str, call: Call, place: int, path: str) -> None:
        if name not in self._numbers:
            whole = self._stored[name].tensor.size
            self._numbers[name] = max(whole, numbers_in(call, place)) if call.operator == "MatMulNBits" else whole
            self._kinds[call.operator] += self._numbers[name]
        for module in _around(path):
            self._owners.setdefault(module, set()).add(name)

    def parameters(self) -> Parameters:
        """Return all that were noted."""
        total = sum(self._numbers.values())
        floating = [name for name in self._numbers if "float" in self._stored[name].tensor.dtype]
        return Parameters(
            total=total,
            trainable=sum(self._numbers[name] for name in floating),
            active=total,
            by_kind=dict(self._kinds.most_common()),
            tied={name: first for name, first in self._first.items() if name != first and first in self._numbers},
            bytes=sum(self._stored[name].tensor.nbytes for name in self._numbers),
        )

    def layers(self) -> list[Layer]:
        """Return the modules, parents before children."""
        return [
            Layer(path, self.classes.get(path, ""), sum(self._numbers[name] for name in names))
            for path, names in self._owners.items()
        ]


def _around(path: str) -> list[str]:
    """Return the paths of a module and of all that hold it, the whole model first."""
    parts = path.split(".") if path else []
    return [".".join(parts[:depth]) for depth in range(len(parts) + 1)]


def _first_names(stored: Mapping[str, Stored]) -> dict[str, str]:
    """Return for every constant the first one that lies in the same place of the same file."""
    places: dict[tuple[str, ...], str] = {}
    return {name: places.setdefault(entry.place or (name,), name) for name, entry in stored.items()}
