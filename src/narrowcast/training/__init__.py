"""Training in mixed precision: a small loop on PyTorch's own parts, and a doctor for the numbers.

>>> from narrowcast.training import Trainer, precision
>>> trainer = Trainer(model, optimizer, loss, precision=precision("fp16-mixed"), clip_norm=1.0)  # doctest: +SKIP
>>> for batch in data:  # doctest: +SKIP
...     info = trainer.step(batch)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from narrowcast.training.doctor.watch import Watch as Doctor
    from narrowcast.training.loss_scale import DynamicScale, NoScale, StaticScale
    from narrowcast.training.policies import Precision, precision
    from narrowcast.training.run import fit
    from narrowcast.training.trainer import Loss, StepInfo, Trainer

__all__ = [
    "Doctor",
    "DynamicScale",
    "Loss",
    "NoScale",
    "Precision",
    "StaticScale",
    "StepInfo",
    "Trainer",
    "fit",
    "precision",
]

# Loaded on first use: these modules import PyTorch, which is optional.
_HOMES = {
    "Doctor": ("narrowcast.training.doctor.watch", "Watch"),
    "DynamicScale": ("narrowcast.training.loss_scale", "DynamicScale"),
    "Loss": ("narrowcast.training.trainer", "Loss"),
    "NoScale": ("narrowcast.training.loss_scale", "NoScale"),
    "Precision": ("narrowcast.training.policies", "Precision"),
    "StaticScale": ("narrowcast.training.loss_scale", "StaticScale"),
    "StepInfo": ("narrowcast.training.trainer", "StepInfo"),
    "Trainer": ("narrowcast.training.trainer", "Trainer"),
    "fit": ("narrowcast.training.run", "fit"),
    "precision": ("narrowcast.training.policies", "precision"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'narrowcast.training' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
