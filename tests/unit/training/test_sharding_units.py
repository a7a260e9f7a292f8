"""Which modules are sharded each for itself."""

from __future__ import annotations

import pytest
from torch import nn

from narrowcast.errors import TrainingError
from narrowcast.training.sharding import _units


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


class Tied(nn.Module):
    """Three blocks, the second of which has the head's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(), block(), block()])
        self.head = nn.Linear(4, 4)
        self.head.weight = self.blocks[1][0].weight


def test_a_block_that_shares_a_weight_with_the_rest_stays_with_the_rest():
    model = Tied()
    assert _units(model, None) == [model.blocks[2], model.blocks[0]]
    free = nn.Sequential(block(), block())
    assert _units(free, None) == [free[1], free[0]]


def test_a_named_unit_that_shares_a_weight_is_refused():
    with pytest.raises(TrainingError, match=r"'blocks\.1' has a weight that is 'head\.weight' too"):
        _units(Tied(), ["blocks.0", "blocks.1"])
