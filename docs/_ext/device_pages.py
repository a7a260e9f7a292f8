"""What the page on devices shows of the catalogue: a table per kind of device, and the memory types."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from narrowcast.accounting.devices import devices, memory_types
from narrowcast.cli.devices import HEADINGS, KINDS, NOTES, cells

__all__ = ["write"]


def write(folder: Path) -> None:
    """Write the tables that the page includes; a file that says the same already keeps its date."""
    texts = {f"devices-{kind}.inc": _devices(kind) for kind in KINDS}
    texts["devices-notes.inc"] = "\n".join(f"- {note}" for note in NOTES)
    texts["memory-types.inc"] = _memory_types()
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        file = folder / name
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def _devices(kind: str) -> str:
    # The catalogue of whoever builds the documentation is not part of it.
    found = [known for known in devices(user=False) if known.kind == kind]
    rows = [(f"{known.title}<br>`{known.name}`", *cells(known)[1:]) for known in found]
    return _table(HEADINGS, rows)


def _memory_types() -> str:
    rows = [(name, str(known.transfers), known.source) for name, known in memory_types().items()]
    return _table(("type", "transfers per pin and clock", "source"), rows, right=(1,))


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] | None = None) -> str:
    aligned = range(1, len(headings)) if right is None else right
    marks = ["---:" if place in aligned else "---" for place in range(len(headings))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, marks, *rows))
