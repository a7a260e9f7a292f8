"""Grouped products in number formats that PyTorch gives no shape for.

PyTorch up to 2.11 refuses ``_grouped_mm`` of tensors without numbers unless they are BF16, though what it makes follows from
shapes alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = ["call"]

_GROUPED = torch.ops.aten._grouped_mm.default


def call(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call an operator on tensors without numbers, grouped products of whatever format included.

    Args:
        func: The operator.
        args: What it takes.
        kwargs: Likewise, by name.
    """
    try:
        return func(*args, **kwargs)
    except RuntimeError:
        if func is not _GROUPED or args[0].dtype == torch.bfloat16 or args[0].shape[-1] != args[1].shape[-2]:
            raise
        return args[0].new_empty(_shape(*args[:3], **kwargs), dtype=kwargs.get("out_dtype"))


def _shape(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor | None = None, **others: Any) -> tuple[int, ...]:
    """Return the shape of a grouped product: groups cut the rows (2-D by 3-D), the columns (3-D by 2-D) or the sums (2-D)."""
    rows, columns = a.shape[-2], b.shape[-1]
    if a.dim() == b.dim() == 2 and offs is not None:
        return offs.numel(), rows, columns
    return (a.shape[0], rows, columns) if a.dim() == b.dim() == 3 else (rows, columns)
