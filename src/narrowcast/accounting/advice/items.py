"""What an item of advice says, and the tables that it quotes."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib import resources
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from narrowcast.accounting.devices import Device
from narrowcast.accounting.policies import Policy

__all__ = [
    "MINIMUM",
    "Advice",
    "Effort",
    "Family",
    "Gain",
    "Multiple",
    "Slower",
    "counted",
    "families_for",
    "multiple_for",
    "source_of",
]

#: Share of the estimate below which an item is not worth showing: the estimate is not that exact.
MINIMUM = 0.005

Effort = Literal["exact", "accuracy", "retrain"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Gain(_Frozen):
    """What goes away, by the estimate.

    Args:
        seconds: Of one run; of one sample where the batch changes.
        share: Of the whole estimated time.
        low: The least share within the error band of the estimate.
        high: The largest.
    """

    seconds: float
    share: float
    low: float
    high: float


class Advice(_Frozen):
    """One thing to do about a model on a device.

    Args:
        rule: The rule's name, stable between versions.
        title: What to do, in one line.
        seen: What was found, with numbers.
        operators: Paths of the operators concerned; none if it is the whole model.
        gain: By the estimate; None where no time can be computed.
        how: The next step.
        source: Where the guideline is from.
        limits: When it does not hold.
        effort: ``exact``: outputs stay the same up to rounding; ``accuracy``: to be measured, weights are kept;
            ``retrain``: another design, to be trained.
        required: Whether the model does not run otherwise.
    """

    rule: str
    title: str
    seen: str
    operators: tuple[str, ...] = ()
    gain: Gain | None = None
    how: str
    source: str
    limits: str
    effort: Effort
    required: bool = False

    @property
    def worth_showing(self) -> bool:
        """Whether the gain is above :data:`MINIMUM`, or no question of time."""
        return self.gain is None or self.gain.share >= MINIMUM


class _Where(_Frozen):
    """Devices that a table entry holds for: regular expressions, matched from the start; empty ones match all."""

    vendor: str = ""
    kind: str = ""
    architecture: str = ""

    def holds_for(self, device: Device) -> bool:
        """Return whether the entry is about a device."""
        pairs = (
            (self.vendor, device.vendor),
            (f"(?:{self.kind})$" if self.kind else "", device.kind),
            (self.architecture, device.architecture),
        )
        return all(re.match(pattern, text) for pattern, text in pairs)


class Slower(_Frozen):
    """How many times slower kernels for widths that are no such multiples are; 1 where nobody measured it.

    Args:
        product: Matrix products of even widths.
        product_odd: Matrix products of odd widths.
        convolution: Convolutions.
    """

    product: float = 1.0
    product_odd: float = 1.0
    convolution: float = 1.0


class Multiple(_Where):
    """Widths that a device's units like.

    Args:
        compute: Formats that are multiplied.
        multiple: Widths are padded to multiples of this.
        stored: Whether memory holds the padding too.
        slower: What other widths cost beyond the padding.
        source: Where that is written.
    """

    compute: tuple[str, ...]
    multiple: int
    stored: bool = False
    slower: Slower = Slower()
    source: str


class Family(_Where):
    """A family of image classifiers.

    Args:
        name: As its authors call it.
        example: A member that narrowcast loads.
        why: What makes it suit the device.
        source: The paper, and what it was measured on.
    """

    name: str
    example: str
    why: str
    source: str


class _Knowledge(_Frozen):
    sources: dict[str, str]
    multiple: tuple[Multiple, ...] = Field(default=())
    family: tuple[Family, ...] = Field(default=())


@cache
def _knowledge() -> _Knowledge:
    text = resources.files("narrowcast.accounting.advice").joinpath("knowledge.toml").read_text(encoding="utf-8")
    return _Knowledge.model_validate(tomllib.loads(text))


def counted(number: int, noun: str) -> str:
    """Return a number of things.

    >>> counted(1, "layer"), counted(2, "layer")
    ('1 layer', '2 layers')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def source_of(rule: str) -> str:
    """Return where a guideline is from."""
    return _knowledge().sources[rule]


def multiple_for(device: Device, policy: Policy) -> Multiple | None:
    """Return which widths a device likes when it multiplies in the policy's format; None where no source says."""
    return next(
        (entry for entry in _knowledge().multiple if policy.compute in entry.compute and entry.holds_for(device)), None
    )


def families_for(device: Device) -> tuple[Family, ...]:
    """Return the families of image classifiers that were designed for devices like this."""
    return tuple(entry for entry in _knowledge().family if entry.holds_for(device))
