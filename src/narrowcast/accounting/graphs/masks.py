"""What attention masks of ONNX graphs hide: from the numbers that follow from constants and shapes, and from attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx

from narrowcast.accounting.graphs.rules import Call

__all__ = ["mask_of"]

Numbers = np.ndarray[Any, Any]
#: What a mask adds to the score of a hidden pair, at most; biases of ALiBi and T5 stay above.
_HIDES = -1e4
_FLOATING = ("float", "bfloat")


class _Kernel(NamedTuple):
    """How an operator that fuses attention takes its masks.

    Args:
        masks: Inputs that hide pairs or are added to the scores.
        past: Input with the keys of past tokens, and their axis of tokens.
        causal: Attribute that says that later tokens are hidden; empty where they always are.
        projects: Whether it projects its first input itself, with the weights of its second.
    """

    masks: tuple[int, ...]
    past: tuple[int, int]
    causal: str
    projects: bool = False


_STANDARD = {"Attention": _Kernel((3,), (4, 2), "is_causal")}
_MICROSOFT = {
    "Attention": _Kernel((3, 5), (4, 3), "unidirectional", projects=True),
    "QAttention": _Kernel((5,), (8, 3), "unidirectional", projects=True),
    "MultiHeadAttention": _Kernel((4, 5), (6, 2), "unidirectional"),
    "GroupQueryAttention": _Kernel((10,), (3, 2), ""),  # lengths of sequences are taken to be whole
}


def mask_of(node: onnx.NodeProto, call: Call, numbers: Callable[[str], Numbers | None]) -> dict[str, Any]:
    """Return what is known of the mask that a node applies to scores.

    Args:
        node: The node.
        call: Its tensors and attributes.
        numbers: Gives a tensor that follows from constants and shapes alone, by name; None for any other.

    Returns:
        ``visible``, a pair: entries of the mask that it shows, of how many; or None, for a mask that is not known. Of an
        operator that projects its input itself, ``projected``, the MACs of that. Empty for an operator that applies no mask.
    """
    kernels = _MICROSOFT if node.domain == "com.microsoft" else _STANDARD
    if node.op_type in kernels:
        return _of_kernel(kernels[node.op_type], node, call, numbers)
    if node.op_type not in ("Where", "Add") or len(call.out.shape) < 3 or not call.out.dtype.startswith(_FLOATING):
        return {}
    if node.op_type == "Where":
        return _of_where(node, numbers)
    for place, name in enumerate(node.input):
        if call.input(place).shape[-2:] == call.out.shape[-2:] and (added := numbers(name)) is not None:
            return {"visible": _share(added > _HIDES)}
    return {}


def _of_where(node: onnx.NodeProto, numbers: Callable[[str], Numbers | None]) -> dict[str, Any]:
    condition, *choices = node.input
    for place, choice in enumerate(map(numbers, choices)):
        if choice is not None and (choice <= _HIDES).all():
            shown = numbers(condition)
            return {"visible": None if shown is None else _share(~shown if place == 0 else shown)}
    return {}


def _of_kernel(
    kernel: _Kernel, node: onnx.NodeProto, call: Call, numbers: Callable[[str], Numbers | None]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if kernel.projects:
        x, weight = call.input(0), call.input(1)
        found["projected"] = x.size * weight.shape[1]
    queries, keys, past = _sizes(kernel, call)
    causal = not kernel.causal or bool(call.attributes.get(kernel.causal))
    masks = [numbers(node.input[place]) for place in kernel.masks if call.has(place)]
    if not causal and not masks:
        return found
    if any(mask is None for mask in masks):
        return found | {"visible": None}
    window = call.attributes.get("local_window_size", -1)
    distance = np.arange(queries)[:, None] + past - np.arange(keys)[None, :]
    shown: Numbers = (distance >= 0) & ((window < 0) | (distance < window)) if causal else np.ones((1, 1), bool)
    for mask in masks:
        assert mask is not None
        shown = shown & (mask if mask.dtype == bool else mask > _HIDES)
    return found | {"visible": _share(shown)}


def _sizes(kernel: _Kernel, call: Call) -> tuple[int, int, int]:
    """Return the tokens of queries, of keys with those of the past, and of the past."""
    query = call.input(0)
    key = query if kernel.projects or not call.has(1) else call.input(1)
    tokens = [tensor.shape[2 if len(tensor.shape) == 4 else 1] for tensor in (query, key)]
    place, axis = kernel.past
    past = call.input(place).shape[axis] if call.has(place) else 0
    return tokens[0], tokens[1] + past, past


def _share(shown: Numbers) -> tuple[int, int]:
    return int(shown.sum()), shown.size
