"""Loss scales: what a loss is multiplied with so that FP16 gradients neither vanish nor overflow.

A scale is a rule without memory; what it remembers is a :class:`ScaleState`, a value that a checkpoint can hold.

>>> rule = DynamicScale(initial=8.0, interval=2)
>>> state = rule.start()
>>> [(state := rule.after(state, finite)).value for finite in (True, True, False)]
[8.0, 16.0, 8.0]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from narrowcast.errors import FormatError

__all__ = ["DynamicScale", "NoScale", "Scale", "ScaleState", "StaticScale"]


class ScaleState(NamedTuple):
    """What a scale remembers.

    Args:
        value: What the next window's losses are multiplied with.
        good: Updates in a row without an overflow, since the last change of the value.
        tolerated: Overflows that will still leave the value as it is.
        stuck: Overflows in a row that the value could not answer, because it may not fall further.
    """

    value: float
    good: int = 0
    tolerated: int = 0
    stuck: int = 0


class Scale(Protocol):
    """How a loss is scaled."""

    @property
    def guards(self) -> bool:
        """Whether an update with a gradient that is not finite is left out, which the host must then learn."""
        ...

    @property
    def patience(self) -> int:
        """Overflows in a row that the value cannot answer, after which training gives up."""
        ...

    def start(self) -> ScaleState:
        """Return the state before the first step."""
        ...

    def after(self, state: ScaleState, finite: bool) -> ScaleState:
        """Return the state after a step whose gradients were all finite, or not."""
        ...


@dataclass(frozen=True)
class NoScale:
    """Losses as they are.

    Args:
        patience: Updates left out in a row, where a trainer was told to leave them out, after which training gives up.

    Raises:
        FormatError: The patience is below 1.
    """

    patience: int = 50

    def __post_init__(self) -> None:
        _check_count("the patience without a loss scale", self.patience)

    @property
    def guards(self) -> bool:
        return False

    def start(self) -> ScaleState:
        return ScaleState(1.0)

    def after(self, state: ScaleState, finite: bool) -> ScaleState:
        return _constant(state, finite)


@dataclass(frozen=True)
class StaticScale:
    """One scale for the whole run; steps that overflow are left out.

    Args:
        value: What losses are multiplied with; powers of two are exact.
        patience: Steps left out in a row, after which training gives up: nothing will change by itself.

    Raises:
        FormatError: The value is not finite and above zero, or the patience is below 1.
    """

    value: float
    patience: int = 50

    def __post_init__(self) -> None:
        _check_positive("the loss scale", self.value)
        _check_count("the patience of the loss scale", self.patience)

    @property
    def guards(self) -> bool:
        return True

    def start(self) -> ScaleState:
        return ScaleState(float(self.value))

    def after(self, state: ScaleState, finite: bool) -> ScaleState:
        return _constant(state, finite)


@dataclass(frozen=True)
class DynamicScale:
    """A scale that grows after a run of good steps and falls on an overflow, as in Micikevicius et al. (2018), section 3.2.

    Unlike :class:`torch.amp.GradScaler` it has a floor, so that it cannot sink to zero, and a cap; and it can tolerate
    single overflows (``hysteresis``), as Megatron-LM's scaler does.

    Args:
        initial: The first scale.
        growth: Factor of growth.
        backoff: Factor on an overflow.
        interval: Good steps in a row before it grows.
        hysteresis: Overflows until it falls: with 1 each one; with more, the first ones are only left out. It is restored
            whenever the scale has had a whole interval of good steps.
        floor: The least value.
        cap: The largest value.
        patience: Overflows in a row at the floor, after which training gives up.

    Raises:
        FormatError: The numbers contradict each other.
    """

    initial: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    hysteresis: int = 1
    floor: float = 1.0
    cap: float = 2.0**24
    patience: int = 20

    def __post_init__(self) -> None:
        for name in ("initial", "floor", "cap"):
            _check_positive(f"the loss scale's {name}", getattr(self, name))
        for name in ("interval", "hysteresis", "patience"):
            _check_count(f"the loss scale's {name}", getattr(self, name))
        if not 1 <= self.growth < math.inf:
            raise FormatError(f"the loss scale's growth is {self.growth}", allowed="a factor of 1 or more, such as 2")
        if not 0 < self.backoff < 1:
            raise FormatError(f"the loss scale's backoff is {self.backoff}", allowed="a factor between 0 and 1")
        if not self.floor <= self.initial <= self.cap:
            raise FormatError(
                f"the loss scale starts at {self.initial:g}", allowed=f"{self.floor:g} (floor) to {self.cap:g} (cap)"
            )

    @property
    def guards(self) -> bool:
        return True

    def start(self) -> ScaleState:
        return ScaleState(float(self.initial), tolerated=self.hysteresis - 1)

    def after(self, state: ScaleState, finite: bool) -> ScaleState:
        if finite:
            if state.good + 1 < self.interval:
                return state._replace(good=state.good + 1, stuck=0)
            return ScaleState(min(state.value * self.growth, self.cap), tolerated=self.hysteresis - 1)
        if state.tolerated:
            return state._replace(good=0, tolerated=state.tolerated - 1)
        stuck = state.stuck + 1 if state.value <= self.floor else 0
        return ScaleState(max(state.value * self.backoff, self.floor), stuck=stuck)


def _constant(state: ScaleState, finite: bool) -> ScaleState:
    return state._replace(good=state.good + 1, stuck=0) if finite else state._replace(good=0, stuck=state.stuck + 1)


def _check_positive(what: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise FormatError(f"{what} is {value}", allowed="a finite number above 0, such as 65536")


def _check_count(what: str, value: int) -> None:
    if value < 1:
        raise FormatError(f"{what} is {value}", allowed="a whole number of 1 or more")
