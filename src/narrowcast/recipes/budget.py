"""What may be lost and what must be reached."""

from __future__ import annotations

import math
import re
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from narrowcast.errors import BudgetError

__all__ = ["Budget", "Drop", "Limit", "Objective", "Standing"]

Objective = Literal["latency", "size", "memory"]

_BYTES = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SECONDS = {"US": 1e-6, "MS": 1e-3, "S": 1.0, "": 1e-3}
_FACTORS = {"": 1.0, "X": 1.0}
_UNITS = {"latency": " s", "speedup": "x", "size": " bytes", "ratio": "x", "at_least": ""}


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Drop(_Value):
    """How much of a metric may go.

    Attributes:
        amount: The drop allowed, at least 0: in the metric's own unit if absolute, as a share if relative.
        relative: Whether the amount is a share of the original's value.
    """

    amount: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> Drop:
        """Return the drop that a text names: ``0.5%`` (relative), ``0.5pt`` (absolute, hundredths), ``0.005`` (absolute).

        Raises:
            BudgetError: The text is none of these, or negative.

        >>> Drop.parse("0.5%")
        Drop(amount=0.005, relative=True)
        >>> Drop.parse("0.5pt")
        Drop(amount=0.005, relative=False)
        """
        match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(%|pt|pts)?\s*", text)
        try:
            amount = float(match.group(1)) if match else math.nan
        except ValueError:
            amount = math.nan
        if match is None or not math.isfinite(amount) or amount < 0:
            raise BudgetError(
                f"max drop {text!r} is no drop",
                allowed="0.5% (relative to the original), 0.5pt (percentage points), or 0.005 (in the metric's unit)",
                next_step="write for example --max-drop 0.5%",
            )
        return cls(amount=amount / (100 if match.group(2) else 1), relative=match.group(2) == "%")

    def __str__(self) -> str:
        return f"{self.amount * 100:g}% of the original" if self.relative else f"{self.amount:g} absolute"


class Limit(_Value):
    """One limit, resolved to the measure that it bounds.

    Attributes:
        measure: ``accuracy``, ``latency`` (seconds), ``speedup``, ``size`` (bytes) or ``memory`` (bytes).
        bound: The bound itself.
        at_least: Whether the measure must be at least (else at most) the bound.
        text: The limit as the user gave it.
    """

    measure: str
    bound: float
    at_least: bool
    text: str

    def holds(self, value: float) -> bool:
        """Return whether a measured value keeps the limit."""
        return value >= self.bound if self.at_least else value <= self.bound


class Standing(_Value):
    """A limit beside what was measured."""

    limit: Limit
    value: float
    met: bool


class Budget(_Value):
    """Limits, and the one measure to minimise within them.

    Attributes:
        max_drop: How much of the metric may go.
        at_least: The least value of the metric ("at most" for errors such as MSE), in its own unit.
        latency: Largest median latency of one batch, in seconds.
        speedup: Least ratio of the original's latency to the artifact's.
        size: Largest size on disk, in bytes.
        ratio: Least ratio of the original's size to the artifact's.
        memory: Largest peak memory of the serving process, in bytes.
        minimise: The measure that the search makes small among the candidates that keep the limits.
    """

    max_drop: Drop | None = None
    at_least: float | None = None
    latency: float | None = None
    speedup: float | None = None
    size: float | None = None
    ratio: float | None = None
    memory: float | None = None
    minimise: Objective = "latency"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("latency", "speedup", "size", "ratio", "memory"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise BudgetError(
                    f"{name} {value} is no limit",
                    allowed="finite numbers above 0",
                    next_step=f"leave --{name} out, or give it another value",
                )
        if self.at_least is not None and not math.isfinite(self.at_least):
            raise BudgetError(f"at least {self.at_least} is no bound", allowed="a finite number in the metric's unit")
        for first, second in (("latency", "speedup"), ("size", "ratio"), ("max_drop", "at_least")):
            if getattr(self, first) is not None and getattr(self, second) is not None:
                raise BudgetError(
                    f"the budget gives both {self._said(first)} and {self._said(second)}",
                    allowed="one of the two: both bound the same measure",
                    next_step=f"drop --{first.replace('_', '-')} or --{second.replace('_', '-')}",
                )
        return self

    def _said(self, name: str) -> str:
        """Return a limit by its name, with its value and unit."""
        value = getattr(self, name)
        return f"{name} {value:g}{_UNITS[name]}" if isinstance(value, float) else f"{name} {value}"

    @classmethod
    def parse(
        cls,
        *,
        max_drop: str | None = None,
        at_least: float | None = None,
        latency: str | None = None,
        speedup: str | None = None,
        size: str | None = None,
        ratio: str | None = None,
        memory: str | None = None,
        minimise: str = "latency",
    ) -> Budget:
        """Return the budget that texts name: ``5ms``, ``2x``, ``4MB``, ``512MiB``.

        Raises:
            BudgetError: A text cannot be read, or two limits contradict each other.
        """
        if minimise not in ("latency", "size", "memory"):
            raise BudgetError(
                f"objective {minimise!r} is unknown",
                allowed="latency, size, memory",
                next_step="write for example --minimise size",
            )
        return cls(
            max_drop=None if max_drop is None else Drop.parse(max_drop),
            at_least=at_least,
            latency=_quantity("latency", latency, _SECONDS, "5ms, 0.005s, 800us"),
            speedup=_quantity("speedup", speedup, _FACTORS, "2x, 1.5"),
            size=_quantity("size", size, _BYTES, "4MB, 3.8MiB, 4000000"),
            ratio=_quantity("ratio", ratio, _FACTORS, "3.5x, 4"),
            memory=_quantity("memory", memory, _BYTES, "300MB, 256MiB"),
            minimise=minimise,
        )

    def limits(self, *, metric: str, higher_is_better: bool, accuracy: float, size: float) -> tuple[Limit, ...]:
        """Return the limits in units of what is measured, given what the original measures.

        Args:
            metric: Name of the metric, for messages.
            higher_is_better: Direction of the metric.
            accuracy: The original's metric.
            size: The original's size in bytes.

        Raises:
            BudgetError: A drop is asked of a metric that is infinite for the original, or a relative one of zero.
        """
        found: list[Limit] = []
        if self.max_drop is not None:
            allowed = self.max_drop.amount * (abs(accuracy) if self.max_drop.relative else 1.0)
            if not math.isfinite(accuracy) or (self.max_drop.relative and accuracy == 0):
                raise BudgetError(
                    f"a max drop of {self.max_drop} means nothing for {metric}, which is {accuracy:g} for the original",
                    allowed="for such metrics, a bound of their own"
                    + (
                        "" if higher_is_better or not self.max_drop.relative else ", or a drop in the metric's own unit"
                    ),
                    next_step="use --at-least instead, "
                    + (
                        "for example --at-least 30 for an SQNR in dB"
                        if higher_is_better
                        else f"the largest {metric} that may be: for example --at-least 0.001"
                    ),
                )
            bound = accuracy - allowed if higher_is_better else accuracy + allowed
            found.append(_limit("accuracy", bound, higher_is_better, f"{metric} may lose {self.max_drop}"))
        if self.at_least is not None:
            side = "at least" if higher_is_better else "at most"
            found.append(_limit("accuracy", self.at_least, higher_is_better, f"{metric} {side} {self.at_least:g}"))
        if self.latency is not None:
            found.append(_limit("latency", self.latency, False, f"latency at most {self.latency * 1e3:g} ms"))
        if self.speedup is not None:
            found.append(_limit("speedup", self.speedup, True, f"at least {self.speedup:g}x faster"))
        if self.size is not None:
            found.append(_limit("size", self.size, False, f"size at most {self.size / 1e6:g} MB"))
        if self.ratio is not None:
            found.append(_limit("size", size / self.ratio, False, f"at least {self.ratio:g}x smaller"))
        if self.memory is not None:
            found.append(_limit("memory", self.memory, False, f"peak memory at most {self.memory / 1e6:g} MB"))
        return tuple(found)


def _limit(measure: str, bound: float, at_least: bool, text: str) -> Limit:
    return Limit(measure=measure, bound=bound, at_least=at_least, text=text)


def _quantity(name: str, text: str | None, units: dict[str, float], examples: str) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match.group(2).upper() not in units or float(match.group(1)) == 0:
        raise BudgetError(
            f"{name} {text!r} cannot be read",
            allowed=f"a number above 0 with its unit: {examples}",
            next_step=f"write for example --{name} {examples.partition(',')[0]}",
        )
    return float(match.group(1)) * units[match.group(2).upper()]
