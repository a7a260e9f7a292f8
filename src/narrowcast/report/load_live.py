"""A load while it runs: one line on the terminal that says what is sent, answered and how fast."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from narrowcast.measure.load.progress import Progress
from narrowcast.report import text
from narrowcast.report.screen import QUIET, sayer

__all__ = ["LiveView"]

#: Pictures a second; the senders are other processes, but they may share a core with this one.
_PICTURES = 4


class LiveView:
    """Shows progress until its block ends, and leaves nothing behind.

    Args:
        console: Where to show it.
        quiet: Whether to show nothing.
    """

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self._say = sayer(console)
        self._stage = "getting ready"
        self._last: Progress | None = None
        self._before: Progress | None = None
        self._spinner = Spinner("line" if console.options.ascii_only else "dots")
        self._live = Live(
            console=console,
            get_renderable=self._picture,
            refresh_per_second=_PICTURES,
            transient=True,
            auto_refresh=not quiet,
        )
        self._quiet = quiet

    def __enter__(self) -> Self:
        if not self._quiet:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._quiet:
            self._live.stop()

    def stage(self, name: str) -> None:
        """Say what begins now."""
        self._stage, self._last, self._before = name, None, None

    def tick(self, progress: Progress) -> None:
        """Take note of how far it is."""
        self._before, self._last = self._last, progress

    def _picture(self) -> Table:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_row(self._spinner, self._say(self._stage), *(self._say(part, QUIET) for part in self._numbers()))
        return table

    def _numbers(self) -> list[str]:
        now, before = self._last, self._before
        if now is None:
            return []
        numbers = [f"{now.seconds:.0f} s", f"{text.integer(now.ok)} answered"]
        if before is not None and now.seconds > before.seconds:
            numbers.append(f"{text.integer((now.ok - before.ok) / (now.seconds - before.seconds))}/s")
        if now.latencies:
            middle, slow = np.percentile(now.latencies, (50, 99))
            numbers.append(f"{text.quantity(float(middle), 's')}, slowest 1% {text.quantity(float(slow), 's')}")
        if now.failed:
            numbers.append(f"{text.integer(now.failed)} failed")
        waiting = now.due - now.ok - now.failed
        return [*numbers, f"{text.integer(waiting)} under way"]
