"""Which groups to put back to FP32: a path of candidates, each cheaper in noise and dearer in time than the one before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from narrowcast.artifacts.manifest import Blame
from narrowcast.recipes.recipe import Recipe, StaticInt8
from narrowcast.search.blame import Source
from narrowcast.search.candidates import FULL
from narrowcast.search.costs import Costs

__all__ = ["Diagnosis", "FloatStep", "MixedSearch", "fastest", "float_path", "float_recipe"]

#: Groups in a row that are put back to FP32 in one step, at the most.
LONGEST = 12
#: A step must promise to be faster than no group in FP32 by this share to be tried for its speed alone.
FASTER = 0.03


class FloatStep(BaseModel):
    """One candidate of the path.

    Attributes:
        keep: Groups that stay FP32, in the order of the graph.
        noise: Noise at the outputs that the roundings which are left should bring together.
        seconds: Time per run that the profiles promise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    keep: tuple[str, ...]
    noise: float
    seconds: float


class Diagnosis(BaseModel):
    """What was found out about a model once every operator was in INT8.

    Attributes:
        blame: Blame of each operator group, the worst first.
        path: Candidates that put groups back to FP32.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    blame: tuple[Blame, ...]
    path: tuple[FloatStep, ...]


def float_path(groups: Sequence[str], sources: Sequence[Source], costs: Costs) -> list[FloatStep]:
    """Return nested sets of groups to keep in FP32, from none to all.

    Each step adds the run of neighbouring groups that takes away the most noise for the time that it costs. Neighbours
    matter: between two groups in FP32 no value is rounded or converted. Runs that cost no time at all come first.

    Args:
        groups: Names of the groups that can compute in integers, in the order of the graph.
        sources: All roundings.
        costs: Times on the target runtime.
    """
    place = {name: number for number, name in enumerate(groups)}
    touched: list[list[Source]] = [[] for _ in groups]
    for source in sources:
        for number in {place[name] for name in (source.writer, *source.readers) if name is not None}:
            touched[number].append(source)

    def left(source: Source, kept: set[int]) -> tuple[float, float]:
        """Return the noise and the time of one rounding when some groups are in FP32."""
        written = source.writer is not None and place[source.writer] not in kept
        read = [place[name] not in kept for name in source.readers]
        if not written and not any(read):
            return 0.0, 0.0
        converts = any(read) if not written else not all(read)
        return source.noise, costs.conversion * source.elements if converts else 0.0

    def effect(segment: range, kept: set[int]) -> tuple[float, float]:
        """Return by how much noise and time change when a run of groups joins those in FP32."""
        joined = kept | set(segment)
        affected = {id(source): source for number in segment for source in touched[number]}.values()
        noise = seconds = 0.0
        for number in set(segment) - kept:
            seconds += costs.fp32.get(groups[number], 0.0) - costs.int8.get(groups[number], 0.0)
        for source in affected:
            before, after = left(source, kept), left(source, joined)
            noise += after[0] - before[0]
            seconds += after[1] - before[1]
        return noise, seconds

    kept: set[int] = set()
    states = [left(source, kept) for source in sources]
    noise = sum(state[0] for state in states)
    seconds = sum(state[1] for state in states) + sum(costs.int8.get(name, 0.0) for name in groups)
    path = [FloatStep(keep=(), noise=noise, seconds=seconds)]
    longest = min(LONGEST, max(1, len(groups) // 2))  # there must be candidates between none and all
    while len(kept) < len(groups):
        best: tuple[tuple[float, float], range, float, float] | None = None
        for begin in range(len(groups)):
            for end in range(begin + 1, min(begin + longest, len(groups)) + 1):
                if begin in kept or end - 1 in kept:
                    continue
                segment = range(begin, end)
                less, more = effect(segment, kept)
                rank = (1.0, -more) if more <= 0 else (0.0, -less / more)
                if best is None or rank > best[0]:
                    best = rank, segment, less, more
        assert best is not None
        kept |= set(best[1])
        noise, seconds = max(noise + best[2], 0.0), seconds + best[3]
        path.append(FloatStep(keep=tuple(groups[number] for number in sorted(kept)), noise=noise, seconds=seconds))
    return path


class MixedSearch:
    """Searches the path for the first candidate that keeps the accuracy limit, with few evaluations.

    The first try is the step whose noise should fit the budget, taking the metric's drop to grow with the amplitude of
    the noise, or half of the path where that tells nothing. Later tries halve the interval between the last step known to
    be inaccurate and the first known to be accurate.
    """

    def __init__(self, step: StaticInt8, path: Sequence[FloatStep], drop: float, allowed: float) -> None:
        """Place the first try.

        Args:
            step: The step that quantised all groups.
            path: Candidates, the first with no group in FP32, the last with all.
            drop: Measured drop of the metric with no group in FP32.
            allowed: Drop that the budget allows.
        """
        self.step, self.path = step, path
        self.too_few, self.enough = 0, len(path) - 1
        first = self.enough // 2
        if drop > 0 and np.isfinite([drop, allowed]).all():
            wanted = path[0].noise * (max(allowed, 0.0) / drop) ** 2
            first = next((number for number, item in enumerate(path) if item.noise <= wanted), self.enough)
        self._first = min(max(first, 1), max(self.enough - 1, 1))
        self._tried: int | None = None

    def next(self) -> Recipe | None:
        """Return the next recipe, or None when the boundary is found."""
        if self.enough - self.too_few <= 1:
            return None
        number = self._first if self._tried is None else (self.too_few + self.enough) // 2
        self._tried = number
        return float_recipe(self.step, self.path[number])

    def tell(self, accurate: bool) -> None:
        """Say whether the last recipe kept the accuracy limit."""
        if self._tried is not None:
            if accurate:
                self.enough = self._tried
            else:
                self.too_few = self._tried


def float_recipe(step: StaticInt8, item: FloatStep) -> Recipe:
    """Return the recipe of one candidate of the path."""
    keep = frozenset(item.keep)
    return Recipe(name=f"{FULL}-float{len(keep)}", steps=(step.model_copy(update={"keep_float": keep}),))


def fastest(path: Sequence[FloatStep]) -> FloatStep | None:
    """Return the candidate that promises the most speed, if it is faster than no group in FP32 by enough to be tried."""
    best = min(path, key=lambda item: item.seconds)
    return best if best.seconds < (1 - FASTER) * path[0].seconds else None
