"""Which elements share a scale: all of them, those of a channel, or a block of neighbours along one axis."""

from __future__ import annotations

from dataclasses import dataclass

from narrowcast.errors import FormatError
from narrowcast.formats.checks import whole

__all__ = ["Granularity", "PerBlock", "PerChannel", "PerTensor"]


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each index along ``axis``: 0 for the output channels of a weight in torch's layout."""

    axis: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "axis", whole("axis", self.axis))


@dataclass(frozen=True)
class PerBlock:
    """One scale for each ``size`` neighbours along ``axis``."""

    size: int
    axis: int = -1

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", whole("block", self.size))
        if self.size < 1:
            raise FormatError(f"a block of {self.size} elements", allowed="1 or more")
        object.__setattr__(self, "axis", whole("axis", self.axis))


Granularity = PerTensor | PerChannel | PerBlock
