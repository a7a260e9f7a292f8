"""Ctrl-C and termination, noticed between two steps instead of within one."""

from __future__ import annotations

import signal
import threading
from time import monotonic
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["Interrupts"]


#: Seconds in which a second signal is the first one again: launchers tell a whole machine, and then each process.
_SAME_S = 1.0


class Interrupts:
    """While it is entered, the first SIGINT or SIGTERM only sets ``asked``; a later one interrupts at once.

    Outside the main thread, where Python allows no handlers, nothing changes.
    """

    def __init__(self) -> None:
        self.asked = False
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked, self._since = True, monotonic()
        elif monotonic() - self._since > _SAME_S:
            raise KeyboardInterrupt
