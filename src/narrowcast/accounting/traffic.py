"""The bytes that operators move in a policy's number formats, from those that were counted in the formats of the run."""

from __future__ import annotations

from typing import NamedTuple

from narrowcast.accounting.kinds import Kind
from narrowcast.accounting.operators import Operator
from narrowcast.accounting.policies import Policy
from narrowcast.formats.blocks import BlockFormat
from narrowcast.formats.table import get

__all__ = ["Traffic", "bits_of", "traffic"]

#: Bits of floating numbers by dtype; codes and indices stay as they are.
_FLOATING = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16}
#: What reads its weights in the policy's format for weights; everything else keeps them in that for the rest.
_HEAVY = frozenset({Kind.CONVOLUTION, Kind.DEPTHWISE, Kind.PRODUCT, Kind.RECURRENT})


class Traffic(NamedTuple):
    """Bytes that one operator moves if it runs alone.

    Args:
        weights: Of parameters and buffers, read.
        read: Of activations, read.
        written: Of what it makes.
    """

    weights: float
    read: float
    written: float

    @property
    def total(self) -> float:
        """All bytes."""
        return self.weights + self.read + self.written


def traffic(operator: Operator, policy: Policy) -> Traffic:
    """Return the bytes that an operator moves if floating tensors are in a policy's formats.

    >>> from narrowcast.accounting.counting import Work
    >>> from narrowcast.accounting.policies import policy
    >>> linear = Operator("mm", "", "forward", (), (), "float32", Kind.PRODUCT, {}, Work(), 12, 8, 4, 0)
    >>> traffic(linear, policy("fp16"))
    Traffic(weights=4.0, read=2.0, written=2.0)
    """
    bits = _FLOATING.get(operator.dtype)
    weights, activations = 1.0, 1.0
    if bits is not None:
        weights = bits_of(policy.weights if operator.kind in _HEAVY else policy.rest) / bits
        activations = bits_of(policy.activations) / bits
    return Traffic(
        operator.weight_bytes * weights,
        (operator.bytes_read - operator.weight_bytes) * activations,
        operator.bytes_written * activations,
    )


def bits_of(name: str) -> float:
    """Return the bits of one number in a format, with its share of the block's scale."""
    found = get(name)
    return found.bits_per_element if isinstance(found, BlockFormat) else found.bits
