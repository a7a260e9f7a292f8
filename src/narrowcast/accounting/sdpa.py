"""Which kernel PyTorch's attention takes on a CUDA card, for runs that follow storages where there is none.

``scaled_dot_product_attention`` asks the card itself, so that without one it always falls back to the plain form, which
keeps all scores. Here the choice follows from the card's compute capability, dtype, mask and head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["CudaAttention", "FusedDropout"]

_ATEN = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


class CudaAttention(TorchFunctionMode):
    """Sends attention to the kernel that a card of this compute capability takes.

    Without a mask, in half precision and from Ampere on, that is FlashAttention; else the memory-efficient kernel, for head
    widths that its alignment takes; else the plain form. cuDNN's kernel, which some builds prefer on Hopper, keeps the same
    tensors as FlashAttention.

    Args:
        capability: CUDA's compute capability.
    """

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__()
        self._ampere = capability >= (8, 0)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        return func(*args, **kwargs)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if torch.is_autocast_enabled("cuda"):
            half = torch.get_autocast_dtype("cuda")
            query, key, value = query.to(half), key.to(half), value.to(half)
            attn_mask = attn_mask.to(half) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
        half = query.dtype in _HALF
        aligned = query.shape[-1] % (8 if half else 4) == 0 and value.shape[-1] == query.shape[-1]
        if half and self._ampere and attn_mask is None and aligned and query.shape[-1] <= 256:
            return _ATEN._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
        if aligned and (self._ampere or query.dtype is not torch.bfloat16):
            groups = query.shape[-3] // key.shape[-3]
            if enable_gqa and groups > 1:
                key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
            bias = _bias(attn_mask, query, key)
            return _ATEN._scaled_dot_product_efficient_attention(
                query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
            )[0]
        return _ATEN._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]


class FusedDropout(TorchFunctionMode):
    """Sends attention with dropout to a fused kernel, as cards run it; CPUs have none, and write it out with all its scores."""

    _kernels = CudaAttention((8, 0))

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and (args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)):
            return self._kernels.attend(*args, **kwargs)
        return func(*args, **kwargs)


def _bias(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """Return a mask as what is added to the scores, in the form that the memory-efficient kernel wants."""
    if mask is None:
        return None
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    missing = -mask.shape[-1] % (16 if query.dtype in _HALF else 8)
    if missing:  # rows begin at aligned addresses
        mask = F.pad(mask, (0, missing))[..., : mask.shape[-1]]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
