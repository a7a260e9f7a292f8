"""Which recipe to try next."""

from __future__ import annotations

from collections.abc import Iterator

from narrowcast.artifacts.manifest import Candidate
from narrowcast.models.graph import Graph
from narrowcast.recipes.recipe import DynamicInt8, Float16Weights, Optimise, Recipe, StaticInt8, WeightOnlyInt8

__all__ = ["FULL", "MATMUL_HEAVY", "first_recipes", "nearest", "preferred"]

#: Share of the weights in matrix products from which dynamic INT8 is worth a try.
MATMUL_HEAVY = 0.3
#: Candidates slower than this share of the fastest one's speed are no tie, however wide the intervals are.
TIE = 0.95
#: Name of the candidate with every operator in static INT8.
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


def preferred(candidates: list[Candidate], minimise: str, *, higher_is_better: bool = True) -> Candidate | None:
    """Return the feasible candidate that is best by the objective, or None.

    Where speeds differ by no more than their intervals allow, the more accurate one is better.

    Args:
        candidates: What was measured.
        minimise: The objective.
        higher_is_better: Direction of the metric.
    """
    feasible = [candidate for candidate in candidates if candidate.feasible]
    best = min(feasible, key=lambda c: _objective(c, minimise), default=None)
    if best is None or minimise != "latency":
        return best
    close = [c for c in feasible if c.speedup_high >= best.speedup_low and c.speedup >= TIE * best.speedup]
    sign = 1 if higher_is_better else -1
    return max(close or [best], key=lambda c: (sign * c.accuracy, -c.size))


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
