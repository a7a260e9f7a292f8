"""The frame of a picture that is drawn as SVG by hand: the element itself, axes, and round numbers to mark on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Axis", "svg"]


def svg(width: float, height: float, parts: Sequence[str], words: str, name: str = "") -> str:
    """Return an ``<svg>`` element that takes the page's colours and width.

    Args:
        width: In pixels.
        height: In pixels.
        parts: What is in it, as markup.
        words: What a screen reader says; nothing is said of a picture without words.
        name: Its identifier, unique in the page.
    """
    spoken = f'role="img" aria-label="{escape(words)}"' if words else 'aria-hidden="true"'
    identity = f' id="{name}"' if name else ""
    return f'<svg{identity} class="made" viewBox="0 0 {width:g} {height:g}" {spoken}>{"".join(parts)}</svg>'


@dataclass(frozen=True)
class Axis:
    """Where values lie on a line of pixels.

    Args:
        low: The value at ``start``.
        high: The value at ``stop``; larger than ``low``.
        start: In pixels.
        stop: In pixels.
        log: Whether equal ratios are equal distances; both ends are positive then.
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def place(self, value: float) -> float:
        """Return the pixel of a value; one beyond an end lies on the end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def marks(self, most: int) -> list[float]:
        """Return round values on it, at most so many: powers of ten (with 2 and 5 between), or multiples of 1, 2 or 5."""
        return self._decades(most) if self.log else self._steps(most)

    def _decades(self, most: int) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        choices = [((1, 2, 5), 1), *(((1,), step) for step in range(1, last - first + 2))]
        for digits, step in choices:
            found = [digit * 10.0**power for power in range(first, last + 1, step) for digit in digits]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) <= most:
                return found
        return []

    def _steps(self, most: int) -> list[float]:
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
        return [step * k for k in range(math.ceil(self.low / step), math.floor(self.high / step * (1 + 1e-9)) + 1)]
