"""What attention masks hide, from the numbers that a run computes of nothing but positions.

Tensors of a traced run have no numbers. But a causal or sliding-window mask follows from positions alone
(``torch.arange(n)[:, None] >= torch.arange(n)``), and those are known: they are computed beside the run, so that the pairs
of query and key that a mask hides are counted from the mask itself, whatever pattern it has. A mask that depends on the
model's inputs (padding) or on its weights stays unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from narrowcast.accounting.recording import storage_of, tensors_in

__all__ = ["Positions"]

_LARGEST = 1 << 27  # bytes of a tensor that is worth computing
_HIDES = -1e4  # what a mask adds to the score of a hidden pair, at most; biases of ALiBi and T5 stay above
_FACTORIES = frozenset(
    f"aten::{name}"
    for name in ("arange", "linspace", "full", "zeros", "ones", "scalar_tensor", "eye", "tril_indices", "triu_indices")
)
_FUSED = "_scaled_dot_product_"


class Positions:
    """Follows the tensors of a run whose numbers depend on no input and no weight."""

    def __init__(self) -> None:
        self._known: Any = WeakTensorKeyDictionary()  # numbers by tensor of the run; no tensor is kept alive by it

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Compute beside the run what an operator made, if it depends on positions alone.

        Args:
            func: The operator.
            args: What it was called with.
            kwargs: Likewise.
            out: What it returned: tensors without numbers.
        """
        tensors = tensors_in((*args, *kwargs.values()))
        known = all(map(self._is_known, tensors)) if tensors else func._schema.name in _FACTORIES
        known = known and torch.Tag.nondeterministic_seeded not in func.tags
        if func._schema.is_mutable:
            written = kwargs.get("out", args[0] if args else None)
            if not known:
                self._forget(written)
            if not isinstance(written, FakeTensor):
                return  # somebody's real tensor: it is not ours to write to
        if not known or not isinstance(out, FakeTensor) or out.device.type != "cpu":
            return
        if not func.is_view and out.numel() * out.element_size() > _LARGEST:
            return
        real_args, real_kwargs = tree_map_only(torch.Tensor, self._numbers, (tuple(args), dict(kwargs)))
        with unset_fake_temporarily(), torch.no_grad():
            self._known[out] = func(*real_args, **real_kwargs)

    def mask(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is known of the mask that an operator applies to scores.

        Returns:
            ``visible``, a pair: entries of the mask that it shows, of how many; or None, if an operator that masks has
            a mask that is not known. Empty for an operator that applies no mask.
        """
        name = func._schema.name.removeprefix("aten::")
        if name.startswith(_FUSED) and not name.endswith("backward"):
            return self._of_fused(func, args, kwargs)
        if name in ("masked_fill", "masked_fill_") and _floating(args[0]) and self._hides(args[2]):
            return {"visible": self._share(args[1], lambda mask: ~mask)}
        if name == "where" and len(args) == 3 and _floating(args[1]) and self._hides(args[2]):
            return {"visible": self._share(args[0], lambda mask: mask)}
        if name == "baddbmm" and kwargs.get("beta", 1) and args[0].dim() > 1:
            return {"visible": self._share(args[0], lambda mask: mask > _HIDES)}
        if name in ("add", "add_") and _floating(args[0]):
            for operand in args[:2]:
                if isinstance(operand, torch.Tensor) and operand.dim() > 1 and self._is_known(operand):
                    return {"visible": self._share(operand, lambda mask: mask > _HIDES)}
        return {}

    def _of_fused(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | dict(kwargs)
        if named.get("is_causal"):  # aligned at the upper left: query i sees keys 0 to i
            queries, keys = named["query"].shape[-2], named["key"].shape[-2]
            square = min(queries, keys)
            return {"visible": (square * (square + 1) // 2 + (queries - square) * keys, queries * keys)}
        mask = named.get("attn_mask") if named.get("attn_mask") is not None else named.get("attn_bias")
        if mask is None:
            return {}
        return {"visible": self._share(mask, lambda values: values if values.dtype == torch.bool else values > _HIDES)}

    def _share(self, mask: torch.Tensor, visible: Callable[[torch.Tensor], torch.Tensor]) -> tuple[int, int] | None:
        if not self._is_known(mask):
            return None
        with unset_fake_temporarily(), torch.no_grad():
            shown = visible(_distinct(self._numbers(mask)))
            return int(shown.sum()), shown.numel()

    def _hides(self, value: Any) -> bool:
        """Return whether a number, or all numbers of a tensor, make a score vanish."""
        if not isinstance(value, torch.Tensor):
            return value <= _HIDES
        if not value.is_floating_point() or not self._is_known(value):
            return False
        with unset_fake_temporarily(), torch.no_grad():
            return bool((_distinct(self._numbers(value)) <= _HIDES).all())

    def _is_known(self, tensor: torch.Tensor) -> bool:
        return not isinstance(tensor, FakeTensor) or tensor in self._known

    def _numbers(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._known[tensor] if isinstance(tensor, FakeTensor) else tensor

    def _forget(self, written: Any) -> None:
        """Forget a tensor that unknown numbers were written into, and its views."""
        if not isinstance(written, FakeTensor):
            return
        storage = storage_of(written)
        for tensor in [tensor for tensor in self._known if storage_of(tensor) == storage]:
            del self._known[tensor]


def _distinct(numbers: torch.Tensor) -> torch.Tensor:
    """Return a tensor without the repetitions that expanding made."""
    return numbers[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in numbers.stride())]


def _floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
