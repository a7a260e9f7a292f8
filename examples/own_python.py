"""A model, data and a metric as Python functions, for references of the form ``py:own_python:NAME``."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn


def model() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return a module and example inputs by name, with a batch of at least 2."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    return network, {"features": torch.zeros(2, 64)}


def data() -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
    """Return one array per model input, and optionally ``labels`` and ``groups``; the first axis counts samples."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 5)  # five samples of each of 60 sources: a source stays in one part of the split
    features = rng.normal(size=(60, 64))[groups] + rng.normal(0, 0.3, size=(300, 64))
    return {"features": features.astype(np.float32), "groups": groups}


def margin(outputs: NDArray[np.float32], original: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return, per sample, how far the original's class leads in these outputs: one finite number each."""
    best = original.argmax(1)
    rows = np.arange(len(outputs))
    others = outputs.copy()
    others[rows, best] = -np.inf
    return outputs[rows, best] - others.max(1)


margin.higher_is_better = True  # the default
margin.needs = "original"  # the second argument is the original's first output; the default is "labels"
