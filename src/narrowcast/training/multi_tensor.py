# pyright: reportPrivateUsage=false
"""PyTorch's functions on lists of tensors: one kernel for many tensors instead of one each.

They have no public names (``torch.optim`` and ``torch.nn.utils`` use them under the same private ones); this is the one
place that knows them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["add_", "copy_", "multiplied", "multiply_", "norms", "subtract_"]


def norms(tensors: Sequence[Tensor], order: float = 2.0) -> tuple[Tensor, ...]:
    """Return the norm of each tensor, L2 unless another order is asked for: 0-d, in its dtype."""
    return tuple(torch._foreach_norm(list(tensors), order))


def multiply_(tensors: Sequence[Tensor], factor: Tensor | float) -> None:
    """Multiply each tensor by one number, in place."""
    torch._foreach_mul_(list(tensors), factor)


def multiplied(tensors: Sequence[Tensor], factor: Tensor | float) -> list[Tensor]:
    """Return each tensor multiplied by one number, in its dtype."""
    return list(torch._foreach_mul(list(tensors), factor))


def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, cast to its dtype."""
    torch._foreach_copy_(list(targets), list(sources))


def add_(targets: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Add each other tensor to its target."""
    torch._foreach_add_(list(targets), list(others))


def subtract_(targets: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Subtract each other tensor from its target."""
    torch._foreach_sub_(list(targets), list(others))
