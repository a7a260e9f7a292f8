"""Which recipe to try next."""

from __future__ import annotations

from collections.abc import Iterator

from narrowcast.artifacts.manifest import Blame, Candidate
from narrowcast.models.graph import Graph
from narrowcast.recipes.recipe import DynamicInt8, Float16Weights, Optimise, Recipe, StaticInt8, WeightOnlyInt8

__all__ = ["MATMUL_HEAVY", "MixedSearch", "first_recipes", "nearest", "preferred"]

#: Share of the weights in matrix products from which dynamic INT8 is worth a try.
MATMUL_HEAVY = 0.3
FULL = "int8"


def first_recipes(graph: Graph) -> Iterator[Recipe]:
    """Yield the recipes that every run tries, the most promising first."""
    if matmul_share(graph) >= MATMUL_HEAVY:
        yield Recipe(name="int8-dynamic", steps=(DynamicInt8(),))
        # Encoders keep what they know in few, huge activations; every range that clips them loses more than it gains.
        yield Recipe(name=FULL, steps=(StaticInt8(ranges=("minmax",)),))
    else:
        yield Recipe(name=FULL, steps=(StaticInt8(),))
    yield Recipe(name="int8-weights", steps=(WeightOnlyInt8(),))
    yield Recipe(name="fp16-weights", steps=(Float16Weights(),))
    yield Recipe(name="fp32", steps=(Optimise(),))


def matmul_share(graph: Graph) -> float:
    """Return the share of a graph's constant bytes that matrix products (not lookup tables, not convolutions) read."""
    names = {
        node.input[1] for node in graph.nodes if node.op_type in ("MatMul", "Gemm") and node.input[1] in graph.constants
    }
    return sum(graph.constants[name].nbytes for name in names) / max(graph.bytes_of_constants(), 1)


def preferred(candidates: list[Candidate], minimise: str) -> Candidate | None:
    """Return the feasible candidate that is best by the objective, or None."""
    return min((c for c in candidates if c.feasible), key=lambda c: _objective(c, minimise), default=None)


def _objective(candidate: Candidate, minimise: str) -> float:
    if minimise == "size":
        return float(candidate.size)
    if minimise == "memory":
        return candidate.memory if candidate.memory is not None else float("inf")
    return 1 / candidate.speedup if candidate.speedup > 0 else float("inf")


def nearest(candidates: list[Candidate], minimise: str) -> Candidate | None:
    """Return the candidate whose limits are broken by the least (sum of relative excesses), or None if all failed."""

    def excess(candidate: Candidate) -> float:
        total = 0.0
        for standing in candidate.standings:
            if not standing.met:
                bound = standing.limit.bound
                gap = abs(standing.value - bound) / max(abs(bound), 1e-12)
                total += gap if gap == gap else float("inf")
        return total

    built = [candidate for candidate in candidates if not candidate.failure]
    return min(built, key=lambda c: (excess(c), _objective(c, minimise)), default=None)


class MixedSearch:
    """Searches for the fewest groups to put back to FP32: a bisection along the blame order.

    Groups are ordered by the noise that they bring to the outputs for each second that they would cost in FP32. The first
    step takes the number of groups after which the remaining noise should fit the budget, taking the metric's drop to grow
    with the amplitude of the noise; later steps halve the interval between the largest number known to be too few and
    the smallest known to be enough.
    """

    def __init__(self, step: StaticInt8, blame: list[Blame], drop: float, allowed: float) -> None:
        """Order the groups.

        Args:
            step: The step that quantised all groups.
            blame: Blame of each group.
            drop: Measured drop of the metric with all groups in INT8.
            allowed: Drop that the budget allows.
        """
        floor = max((item.seconds for item in blame), default=0.0) * 0.02 + 1e-9
        self.order = sorted(blame, key=lambda item: -item.noise / (item.seconds + floor))
        self.step = step
        self.too_few, self.enough = 0, len(self.order)
        total = sum(item.noise for item in blame)
        wanted = total * (allowed / drop) ** 2 if drop > 0 else total
        self._first, left = len(self.order) - 1, total
        for number, item in enumerate(self.order, start=1):
            left -= item.noise
            if left <= wanted:
                self._first = number
                break
        self._first = min(max(self._first, 1), max(len(self.order) - 1, 1))
        self._started = False

    def next(self) -> Recipe | None:
        """Return the next recipe, or None when the boundary is found."""
        if self.enough - self.too_few <= 1:
            return None
        number = (self.too_few + self.enough) // 2 if self._started else self._first
        self._started = True
        self._number = number
        keep = frozenset(item.group for item in self.order[:number])
        return Recipe(name=f"{FULL}-float{number}", steps=(self.step.model_copy(update={"keep_float": keep}),))

    def tell(self, accurate: bool) -> None:
        """Say whether the last recipe kept the accuracy limit."""
        if accurate:
            self.enough = self._number
        else:
            self.too_few = self._number
