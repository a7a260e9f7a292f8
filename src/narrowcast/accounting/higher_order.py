"""Operators that take functions (``torch.cond``, ``while_loop``, ``flex_attention``), for runs without numbers.

A branch that numbers decide is not known, so all are run: the count keeps the one with the most MACs, and memory follows the
one that needs most. Of a loop one pass is run, and the passes after it are listed as not counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from narrowcast.accounting.counting import has_rule
from narrowcast.errors import ModelError

__all__ = ["FLEX", "MORE_PASSES", "alternatives", "flex_share", "is_composite", "is_higher_order", "uncompiled_flex"]

#: The name of attention whose scores a function changes.
FLEX = "flex_attention"
#: What is listed of a loop.
MORE_PASSES = "while_loop: passes after the first, as many as the numbers say"
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd  # pyright: ignore[reportPrivateUsage]
_LARGEST = 1 << 27  # pairs of query and key that a mask is computed for


def is_higher_order(func: Any) -> bool:
    """Return whether an operator takes functions."""
    return isinstance(func, HigherOrderOperator)


@cache
def is_composite(func: Any) -> bool:
    """Return whether an operator is only a name for others, which its ``decompose`` calls, and has no rule of its own.

    Such operators are seen where autograd does not take them apart first: inside branches, and in inference mode.
    """
    name = func._schema.name.removeprefix("aten::")
    return func.namespace == "aten" and not has_rule(name) and func.has_kernel_for_dispatch_key(_COMPOSITE)


@contextmanager
def uncompiled_flex() -> Generator[None]:
    """Have ``flex_attention`` called as the operator that it is, not through a compiler, which runs without numbers refuse."""
    module: Any = sys.modules.get("torch.nn.attention.flex_attention")
    if module is None:  # no model that is here uses it
        yield
        return
    before = module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
    module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    try:
        yield
    finally:
        module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = before


def alternatives(name: str, args: Sequence[Any]) -> list[Callable[[], Any]]:
    """Return what a run may do in place of an operator that takes functions, each as a call that returns its result.

    Args:
        name: The operator's.
        args: What it was called with.

    Raises:
        ModelError: There is no rule for it.
    """
    if name == "cond":
        _, true, false, operands = args
        return [partial(true, *operands), partial(false, *operands)]
    if name == "while_loop":
        condition, body, carried, constant = args
        return [partial(_pass, condition, body, (*carried, *constant))]
    raise ModelError(
        f"the higher-order operator {name} cannot be counted",
        allowed=f"cond, while_loop, {FLEX}",
        next_step="count the module with plain operators in its place, or export the model to ONNX and count that",
    )


def _pass(condition: Callable[..., Any], body: Callable[..., Any], given: tuple[Any, ...]) -> tuple[Any, ...]:
    condition(*given)
    return tuple(body(*given))


def flex_share(args: Sequence[Any]) -> dict[str, Any]:
    """Return what the mask of ``flex_attention`` shows, as :meth:`narrowcast.accounting.masks.Positions.mask` does.

    The mask is a function of positions: it is asked about all pairs of query and key of the first head of the first sample.
    One that reads tensors of the run, or that takes one pair at a time, is not known.

    Args:
        args: What the operator was called with: query, key, value, function of scores, block mask, whose last entry is the
            function, and so on; the tensors that the mask reads last, if any.
    """
    mask = args[4][-1]
    reads = tree_leaves(args[8:])
    queries, keys = args[0].shape[-2], args[1].shape[-2]
    if reads or queries * keys > _LARGEST:
        return {"visible": None}
    with unset_fake_temporarily(), torch.no_grad():
        first = torch.zeros((), dtype=torch.int64)
        rows, columns = torch.arange(queries)[:, None], torch.arange(keys)
        try:
            shown = mask(first, first, rows, columns)
        except Exception:  # a function of the user's: what it cannot do is not known
            return {"visible": None}
        if not isinstance(shown, torch.Tensor):
            return {"visible": None}
        shown = shown.expand(queries, keys)
        return {"visible": (int(shown.sum()), shown.numel())}
