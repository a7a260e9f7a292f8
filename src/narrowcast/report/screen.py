"""What all screens of a terminal share: words that it can show, tables, and two styles."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from narrowcast.report import text

__all__ = ["HEAD", "QUIET", "Say", "new_table", "sayer"]

QUIET, HEAD = "bright_black", "bold"

#: From words and a style to a text that the terminal can show.
Say = Callable[..., Text]


def sayer(console: Console) -> Say:
    """Return what makes texts for a console: without control characters, and in ASCII where it has no Unicode."""
    plain = console.options.ascii_only

    def say(words: str, style: str = "") -> Text:
        clean = text.printable(words, keep="\n\xa0")
        return Text(text.ascii_of(clean) if plain else clean, style=style)

    return say


def new_table() -> Table:
    """Return an empty table with a line under its head."""
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style=QUIET)
