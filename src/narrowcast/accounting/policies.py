"""Precision policies: which number format each thing that a model keeps is in, by name.

>>> policy("bf16-mixed").master, policy("bf16-mixed").compute
(None, 'bf16')
"""

from __future__ import annotations

import difflib
from typing import NamedTuple

from narrowcast.errors import FormatError

__all__ = ["POLICIES", "Policy", "own_policy", "policy"]


class Policy(NamedTuple):
    """Formats, by the names of :mod:`narrowcast.formats`.

    Args:
        name: What commands take.
        weights: What the weights of products and convolutions are stored in.
        rest: What all other parameters and buffers are stored in (norms, embeddings, biases).
        compute: What products multiply.
        activations: What activations are stored in.
        gradients: What gradients of weights are stored in; None where nobody trains so.
        master: What the optimizer's own copy of the weights is in; None if there is none.
        autocast: Whether products run under autocast: weights are cast for each use, and the copy lives for the run.
        double_quantised: Whether the scales of the weights are quantised themselves.
    """

    name: str
    weights: str
    rest: str
    compute: str
    activations: str
    gradients: str | None = None
    master: str | None = None
    autocast: bool = False
    double_quantised: bool = False

    @property
    def weight_only(self) -> bool:
        """Whether weights are stored narrower than products multiply them."""
        return not self.trains and self.compute != self.weights

    @property
    def trains(self) -> bool:
        """Whether training in it is meant."""
        return self.gradients is not None


#: Mixed policies keep FP32 weights and cast them (autocast); the master policies keep half-precision weights and the optimizer
#: updates FP32 copies. Weight-only formats (int8, int4, nf4) multiply in BF16, as the runtimes do that serve them; int8-static
#: (W8A8) quantises activations too, by scales from a calibration, and multiplies integers.
POLICIES: dict[str, Policy] = {
    entry.name: entry
    for entry in (
        Policy("fp32", "fp32", "fp32", "fp32", "fp32", "fp32"),
        Policy("fp16", "fp16", "fp16", "fp16", "fp16", "fp16"),
        Policy("bf16", "bf16", "bf16", "bf16", "bf16", "bf16"),
        Policy("fp16-master", "fp16", "fp16", "fp16", "fp16", "fp16", master="fp32"),
        Policy("bf16-master", "bf16", "bf16", "bf16", "bf16", "bf16", master="fp32"),
        Policy("fp16-mixed", "fp32", "fp32", "fp16", "fp16", "fp32", autocast=True),
        Policy("bf16-mixed", "fp32", "fp32", "bf16", "bf16", "fp32", autocast=True),
        Policy("fp8-mixed", "fp32", "fp32", "e4m3fn", "bf16", "fp32", autocast=True),
        Policy("int8-static", "int8", "fp32", "int8", "int8"),
        Policy("int8", "int8", "bf16", "bf16", "bf16"),
        Policy("int4", "int4", "bf16", "bf16", "bf16"),
        Policy("nf4", "nf4", "bf16", "bf16", "bf16"),
        Policy("nf4-double", "nf4", "bf16", "bf16", "bf16", double_quantised=True),
    )
}


def own_policy(dtype: str) -> Policy:
    """Return the policy of a model as it is.

    Args:
        dtype: What its floating parameters are in, ``float16`` or ``bfloat16``; FP32 is taken for everything else.
    """
    return POLICIES[{"float16": "fp16", "bfloat16": "bf16"}.get(dtype, "fp32")]


#: Other names of policies, by those in use.
_ALIASES = {"w8a8": "int8-static", "static-int8": "int8-static", "w8a16": "int8", "w4a16": "int4"}


def policy(name: str) -> Policy:
    """Return a policy by its name, or by the field's short form (``w8a8``, ``w8a16``, ``w4a16``).

    Raises:
        FormatError: There is none of that name.
    """
    key = name.strip().casefold().replace("_", "-")
    key = _ALIASES.get(key, key)
    if key in POLICIES:
        return POLICIES[key]
    near = difflib.get_close_matches(key, POLICIES, n=3)
    raise FormatError(f"precision {name!r} is unknown", allowed=", ".join(near or POLICIES))
