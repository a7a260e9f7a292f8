"""Advice: what to change about a model for a device, with what it brings by the estimate and where the guideline is from.

Each rule looks at the counted operators and asks the roofline what would be if they were changed: the gain is the time
that goes away, not a number from a paper. Gains do not add up, because rules concern the same operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from narrowcast.accounting.advice.context import Context
from narrowcast.accounting.advice.convolutions import dense_3x3, depthwise, early_layers, groups
from narrowcast.accounting.advice.items import MINIMUM, Advice, Gain
from narrowcast.accounting.advice.merging import batch_norm, branches, copies, elementwise, fragmentation, parallel
from narrowcast.accounting.advice.whole import batch, default_policy, family, memory, precision
from narrowcast.accounting.advice.widths import equal_widths, multiples

__all__ = ["MINIMUM", "RULES", "Advice", "Context", "Gain", "Rule", "advise", "default_policy"]

Rule = Callable[[Context], Iterable[Advice]]

#: Every rule; a new one is a function and its place here.
RULES: tuple[Rule, ...] = (
    memory,
    precision,
    batch,
    branches,
    batch_norm,
    parallel,
    fragmentation,
    elementwise,
    copies,
    equal_widths,
    groups,
    multiples,
    depthwise,
    early_layers,
    dense_3x3,
    family,
)


def advise(context: Context) -> tuple[Advice, ...]:
    """Return all advice, what is required first, then by the seconds that it saves, then what has no number.

    Items below :data:`MINIMUM` are among them (:attr:`Advice.worth_showing`); items that save nothing are not.

    Raises:
        DeviceError: The device does not multiply in the precision, or its peak or bandwidth is not known.
    """
    if not context.operators or not context.estimate.seconds:
        return ()
    found = [item for rule in RULES for item in rule(context) if item.gain is None or item.gain.seconds > 0]
    return tuple(sorted(found, key=_order))


def _order(item: Advice) -> tuple[bool, bool, float]:
    return not item.required, item.gain is None, -item.gain.seconds if item.gain else 0.0
