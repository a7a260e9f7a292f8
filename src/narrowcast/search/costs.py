"""What each operator group costs on the target runtime, in FP32 and in INT8, from one profile of each graph."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from narrowcast.runtimes import OperatorTime
from narrowcast.transforms.groups import Group

__all__ = ["Costs", "times_by_group"]

#: A conversion between integers and FP32 costs its own node and, in the kernels around it, a change of memory layout that
#: takes about as long again.
CONVERSION_FACTOR = 2.0
_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Costs:
    """Seconds per run on the target runtime; groups that a profile does not show ran inside others and cost nothing.

    Attributes:
        fp32: Time of each group in FP32.
        int8: Time of each group in INT8.
        conversion: Time to turn one value from integer to FP32 or back.
    """

    fp32: Mapping[str, float] = field(default_factory=dict[str, float])
    int8: Mapping[str, float] = field(default_factory=dict[str, float])
    conversion: float = 0.0

    @classmethod
    def of(
        cls,
        groups: Sequence[Group],
        original: Sequence[OperatorTime],
        quantised: Sequence[OperatorTime],
        converted: int,
    ) -> Costs:
        """Return the costs that two profiles tell.

        Args:
            groups: The groups of the graph.
            original: Profile of the FP32 graph.
            quantised: Profile of the graph with no group in FP32.
            converted: Values that the quantised graph converts in one run.
        """
        seconds = sum(item.seconds for item in quantised if item.op_type in _CONVERSIONS)
        each = CONVERSION_FACTOR * seconds / converted if converted else 0.0
        return cls(times_by_group(groups, original), times_by_group(groups, quantised), each)


def times_by_group(groups: Sequence[Group], times: Sequence[OperatorTime]) -> dict[str, float]:
    """Return the time of each group that a profile shows.

    Runtimes name a kernel after a node or after the tensor that it makes, with additions of their own
    (``conv1_token_7``, ``relu1_nchwc``, ``conv1/WithoutBiases``, ``fused gemm1``): they are taken off until a name is known.
    """
    owners = {group.output: group.name for group in groups} | {
        name: group.name for group in groups for name in group.nodes
    }
    found: dict[str, float] = {}
    for item in times:
        name = item.name.removeprefix("fused ")
        while name and name not in owners:
            name = re.sub(r"(^|[/_.:])[^/_.:]*$", "", name)
        if name:
            found[owners[name]] = found.get(owners[name], 0.0) + item.seconds
    return found
