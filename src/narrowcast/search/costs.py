"""What each operator group costs on the target runtime, in FP32 and in INT8, from one profile of each graph."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from narrowcast.runtimes import OperatorTime
from narrowcast.transforms.groups import Group

__all__ = ["Costs", "times_by_group"]

#: A conversion between integers and FP32 costs its own node and, in the kernels around it, a change of memory layout that
#: takes about as long again.
CONVERSION_FACTOR = 2.0


@dataclass(frozen=True)
class Costs:
    """Seconds per run on the target runtime; groups that a profile does not show ran inside others and cost nothing.

    Attributes:
        fp32: Time of each group in FP32.
        int8: Time of each group in INT8.
        conversion: Time to turn one value of each sample from FP32 to an integer or back.
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
        *,
        conversions: Collection[str],
        converted: int,
        others: Collection[str] = (),
    ) -> Costs:
        """Return the costs that two profiles tell.

        Args:
            groups: The groups of the graph.
            original: Profile of the FP32 graph.
            quantised: Profile of the graph with no group in FP32.
            conversions: Types of the kernels that turn FP32 into integers.
            converted: Values of each sample that they turn.
            others: Names of nodes and tensors that belong to no group.
        """
        seconds = sum(item.seconds for item in quantised if item.op_type in conversions)
        each = CONVERSION_FACTOR * seconds / converted if converted else 0.0
        return cls(times_by_group(groups, original, others), times_by_group(groups, quantised, others), each)


def times_by_group(
    groups: Sequence[Group], times: Sequence[OperatorTime], others: Collection[str] = ()
) -> dict[str, float]:
    """Return the time of each group that a profile shows.

    Runtimes name a kernel after a node or after the tensor that it makes, with additions of their own
    (``conv1_token_7``, ``relu1_nchwc``, ``conv1/WithoutBiases``, ``fused gemm1``): they are taken off until a name is known.
    """
    owners = {group.output: group.name for group in groups} | {
        name: group.name for group in groups for name in group.nodes
    }
    found: dict[str, float] = {}
    for item in times:
        if re.search(
            "::(de)?quantize", item.name
        ):  # tensor::quantize is no kernel of those that make or read the tensor
            continue
        name = item.name.removeprefix("fused ")
        while name and name not in owners and name not in others:
            name = re.sub(r"(^|[/_.])[^/_.]*$", "", name)
        if name in owners:
            found[owners[name]] = found.get(owners[name], 0.0) + item.seconds
    return found
