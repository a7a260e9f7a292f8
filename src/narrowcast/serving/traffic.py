"""Which versions answer the requests that name none: one of them, or several with a share each."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from narrowcast.serving.refusals import Refusal

__all__ = ["Traffic"]

#: A split among more versions, or a larger weight, is taken for a mistake.
_MOST = 16
_HEAVIEST = 1e9


@dataclass(frozen=True)
class Traffic:
    """Versions with their weights; a version gets its weight's share of the requests, each drawn by itself.

    Attributes:
        weights: Versions in order, each with a weight above 0; they need not add up to anything.

    Raises:
        Refusal: There is no version, there are too many, or a weight is no positive number (400).
    """

    weights: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.weights) <= _MOST:
            raise Refusal(400, f"traffic goes to {len(self.weights)} versions; allowed: 1 to {_MOST}")
        for version, weight in self.weights:
            if version < 1:
                raise Refusal(400, f"version {version} is no positive integer")
            if not 0 < weight <= _HEAVIEST:  # which NaN is not either
                raise Refusal(
                    400, f"version {version} has weight {weight}; allowed: positive numbers up to {_HEAVIEST:g}"
                )

    @classmethod
    def of(cls, weights: Mapping[int, float]) -> Traffic:
        """Return traffic by weights, which may be given in any order."""
        return cls(tuple(sorted(weights.items())))

    @classmethod
    def all_to(cls, version: int) -> Traffic:
        """Return traffic that one version answers alone."""
        return cls(((version, 1.0),))

    @property
    def versions(self) -> tuple[int, ...]:
        """The versions that answer, in order."""
        return tuple(version for version, _ in self.weights)

    @cached_property
    def shares(self) -> dict[int, float]:
        """Versions with their shares, which add up to 1."""
        total = math.fsum(weight for _, weight in self.weights)
        return {version: weight / total for version, weight in self.weights}

    @cached_property
    def _ends(self) -> list[float]:
        """Upper ends of the versions' parts of [0, 1), the last left out."""
        return list(accumulate(self.shares.values()))[:-1]

    def pick(self, draw: Callable[[], float]) -> int:
        """Return the version that answers a request.

        Args:
            draw: Gives a number in [0, 1); asked only where there is a choice.
        """
        if len(self.weights) == 1:
            return self.weights[0][0]
        return self.weights[bisect_right(self._ends, draw())][0]
