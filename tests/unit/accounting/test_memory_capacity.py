"""The largest batch fits, and one sample more does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from narrowcast.accounting.capacity import largest_batch
from narrowcast.accounting.memory import memory
from narrowcast.accounting.sources import GraphSource
from narrowcast.errors import ModelError

MIB = 1 << 20


class Given:
    """A model with inputs of so many samples."""

    def __init__(self, build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
        self.name = "given"
        self.build = build
        self.examples = lambda: (torch.empty(shape),)
        self.named = dict


def small() -> nn.Module:
    layers = (nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.BatchNorm1d(16), nn.Linear(16, 10))  # which cannot be trained on one sample


@pytest.mark.parametrize("setting", [{"mode": "infer"}, {"mode": "train"}, {"mode": "train", "device": "cuda"}])
def test_the_largest_batch_fits_and_no_more(setting: dict[str, Any]) -> None:
    traced: list[int] = []

    def source_of(batch: int) -> Given:
        traced.append(batch)
        return Given(small, (batch, 3, 40, 40))

    room = 60 * MIB
    found = largest_batch(source_of, room, **setting)
    assert len(traced) <= 6
    assert memory(Given(small, (found, 3, 40, 40)), **setting).peak <= room
    assert memory(Given(small, (found + 1, 3, 40, 40)), **setting).peak > room


def test_a_model_may_fit_with_one_sample_only_or_not_at_all() -> None:
    def source_of(batch: int) -> Given:
        return Given(lambda: nn.Linear(1000, 1000), (batch, 1000))

    one, two = (memory(source_of(batch)).peak for batch in (1, 2))
    assert largest_batch(source_of, one) == 1
    assert largest_batch(source_of, two) == 2
    assert largest_batch(source_of, one - 1) == 0


def test_a_source_that_ignores_the_batch_is_named() -> None:
    with pytest.raises(ModelError, match="still fit"):
        largest_batch(lambda batch: Given(lambda: nn.Linear(4, 4), (1, 4)), MIB)


def test_graphs_are_refused() -> None:
    graph: Any = GraphSource("model.onnx", Path("model.onnx"))
    with pytest.raises(ModelError, match=r"model\.onnx cannot be followed.*\nAllowed: PyTorch modules"):
        memory(graph)
    with pytest.raises(ModelError, match="cannot be followed"):
        largest_batch(lambda batch: graph, 60 * MIB)
