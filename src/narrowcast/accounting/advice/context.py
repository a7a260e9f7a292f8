"""What a rule looks at: a counted model on a device, and what the estimate says if something changes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from narrowcast.accounting.advice.items import Gain
from narrowcast.accounting.advice.rewriting import Changes, rewritten
from narrowcast.accounting.devices import Device
from narrowcast.accounting.kinds import Kind
from narrowcast.accounting.operators import Operator
from narrowcast.accounting.policies import Policy
from narrowcast.accounting.roofline import Estimate, OperatorTime, estimate

if TYPE_CHECKING:
    from narrowcast.accounting.profile import Profile

__all__ = ["Context"]


@dataclass(frozen=True)
class Context:
    """A counted model, the device that it is to run on, and how.

    Args:
        profile: The model, counted in inference.
        device: Where it runs.
        policy: In which formats.
        runtime: Whose kernels; the usual one of the device's kind unless given.
    """

    profile: Profile
    device: Device
    policy: Policy
    runtime: str | None = None

    @cached_property
    def operators(self) -> tuple[Operator, ...]:
        """The run, in order, without operators that touch no byte: no kernel runs for them."""
        run = self.profile.operators
        idle = (place for place, operator in enumerate(run) if operator.kind is not Kind.VIEW and not _moved(operator))
        return tuple(rewritten(run, dict.fromkeys(idle, ())))

    @cached_property
    def estimate(self) -> Estimate:
        """How long the run takes as it is."""
        return self.estimate_of(self.operators)

    def estimate_of(
        self, operators: Sequence[Operator], policy: Policy | None = None, *, slower: Mapping[int, float] | None = None
    ) -> Estimate:
        """Return how long another run takes on the same device, in other formats, or with slower kernels for some."""
        return estimate(operators, self.device, policy or self.policy, runtime=self.runtime, slower=slower)

    @property
    def compiled(self) -> bool:
        """Whether the device runs whole graphs that a compiler has already fused and scheduled."""
        return self.device.kind == "npu"

    @property
    def times(self) -> tuple[OperatorTime, ...]:
        """The time of each operator."""
        return self.estimate.operators

    def share(self, places: Iterable[int]) -> float:
        """Return the share of the estimated time that operators take."""
        return sum(self.times[place].seconds for place in places) / self.estimate.seconds

    @cached_property
    def readers(self) -> dict[int, tuple[int, ...]]:
        """Which operators that are no views read each operator's result."""
        found: dict[int, list[int]] = {}
        for place, operator in enumerate(self.operators):
            for producer in sorted(set(operator.producers)):
                if producer >= 0 and operator.kind is not Kind.VIEW:
                    found.setdefault(producer, []).append(place)
        return {producer: tuple(places) for producer, places in found.items()}

    @cached_property
    def sliced(self) -> frozenset[int]:
        """Operators whose result is read in parts: two readers of it need not read the same."""
        parts = ("split", "chunk", "slice", "select", "unbind", "narrow", "as_strided")
        return frozenset(
            producer
            for operator in self.operators
            if operator.kind is Kind.VIEW and any(part in operator.name for part in parts)
            for producer in operator.producers
            if producer >= 0
        )

    def only_reader(self, place: int) -> int | None:
        """Return the one operator that reads a result; None if there are several, or none."""
        readers = self.readers.get(place, ())
        return readers[0] if len(readers) == 1 else None

    def source(self, place: int) -> int:
        """Return which operator wrote what one reads first (its input, where others are weights); -1 if none."""
        operator = self.operators[place]
        return (
            max(operator.producers, default=-1) if operator.kind is Kind.PRODUCT else next(iter(operator.producers), -1)
        )

    def runs_faster(self, changes: Changes) -> bool:
        """Return whether kernels run for less time after changes, however long they wait to be started."""
        return _running(self.estimate_of(rewritten(self.operators, changes))) < _running(self.estimate)

    def gain(self, changes: Changes) -> Gain:
        """Return what goes away if operators change.

        The band: the operators concerned may take ``low`` to ``high`` of the estimate's times, before and after alike,
        because their kernels are of the same classes.
        """
        before = self.estimate
        after = self.estimate_of(rewritten(self.operators, changes))
        saved = before.seconds - after.seconds
        concerned = max(sum(self.times[place].seconds for place in changes), saved)

        def share(factor: float) -> float:
            return factor * saved / (before.seconds + (factor - 1.0) * concerned)

        low, high = share(before.low / before.seconds), share(before.high / before.seconds)
        return Gain(seconds=saved, share=saved / before.seconds, low=min(low, high), high=max(low, high))

    def paths(self, places: Iterable[int]) -> tuple[str, ...]:
        """Return the names of operators: the module's path, and what it does where the module does more."""
        return tuple(dict.fromkeys(self._name(place) for place in places))

    @cached_property
    def _alone(self) -> frozenset[str]:
        """Modules that run one operator and hold no others: their path names the operator."""
        run = Counter(operator.path for operator in self.operators if _moved(operator))
        parents = {path[:end] for path in run for end in range(len(path)) if path[end] == "."}
        return frozenset(path for path, count in run.items() if path and count == 1 and path not in parents)

    def _name(self, place: int) -> str:
        operator = self.operators[place]
        if operator.path in self._alone:
            return operator.path
        return f"{operator.path or 'model'}:{operator.name.strip('_')}"


def _moved(operator: Operator) -> int:
    return operator.bytes_read + operator.bytes_written


def _running(whole: Estimate) -> float:
    return math.fsum(max(time.compute, time.memory) for time in whole.operators)
