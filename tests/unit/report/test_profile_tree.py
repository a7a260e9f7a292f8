"""Folding: lines for several siblings only where they really are equal, and sums that stay what was counted."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from narrowcast.accounting.profile import Profile, profile_module
from narrowcast.report.profile_tree import ITSELF, Node, fold, leaves, ranges


class Block(nn.Module):
    """Two layers and an addition of its own."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.act = nn.ReLU()
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(x)))


def stack(*hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(*(Block(8, size) for size in hidden)), nn.Linear(8, 2))


def counted(module: nn.Module, *, train: bool = False) -> Profile:
    return profile_module(module, (torch.zeros(4, 8),), train=train)


def labels(node: Node) -> list[str]:
    return [child.label for child in node.children]


def test_equal_blocks_fold_into_one_line_with_their_sum():
    found = counted(stack(16, 16, 16))
    root = fold(found)
    assert labels(root) == ["0", "1.0-2", "2"]
    blocks = root.children[1]
    assert (blocks.count, blocks.kind) == (3, "Block")
    assert blocks.paths == ("1.0", "1.1", "1.2")
    assert blocks.macs == 3 * 4 * 2 * 8 * 16
    assert blocks.parameters == 3 * (8 * 16 + 16 + 16 * 8 + 8)
    assert [(child.label, child.count) for child in blocks.children] == [("up", 3), ("act", 3), ("down", 3)]
    assert blocks.children[0].paths == ("1.0.up", "1.1.up", "1.2.up")


def test_blocks_that_differ_stay_apart_even_if_their_sums_agree():
    root = fold(counted(stack(16, 24, 16, 16)))
    (inner,) = [child for child in root.children if child.kind == "Sequential"]
    assert labels(inner) == ["0, 2-3", "1"]
    # Equal in parameters and MACs, not in what is inside.
    wide, deep = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Sequential(nn.ReLU(), nn.Linear(8, 8))
    root = fold(counted(nn.Sequential(wide, deep)))
    assert labels(root) == ["0", "1"]


def test_leaves_fold_only_side_by_side():
    root = fold(counted(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8))))
    assert labels(root) == ["0", "1", "2-3"]


def test_a_different_stride_is_not_equal():
    module = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, padding=1))
    root = fold(profile_module(module, (torch.zeros(1, 4, 8, 8),)))
    assert labels(root) == ["0", "1"]


def test_what_a_module_computes_itself_is_told_apart():
    root = fold(counted(stack(16, 16)))
    blocks = root.children[1]
    own = blocks.own
    assert own is not None
    assert (own.label, own.macs, own.operators, own.count) == (ITSELF, 0, 2, 2)
    assert own.flops == 2 * 4 * 8  # two additions of [4, 8]
    assert root.children[0].own is None


def test_the_backward_pass_is_shown_where_its_modules_are():
    once, found = counted(stack(16, 16)), counted(stack(16, 16), train=True)
    root = fold(found)
    assert root.macs == found.macs
    assert root.bytes_moved == found.bytes_moved
    assert labels(root) == labels(fold(once))
    assert [child.macs for child in root.children[1:]] == [3 * child.macs for child in fold(once).children[1:]]


def test_tied_parameters_count_once_in_the_whole():
    module = stack(16)
    module[1][0].down.weight = nn.Parameter(module[1][0].up.weight.t().contiguous())  # type: ignore[index]
    module[2] = module[0]  # type: ignore[index]
    found = counted(module)
    assert fold(found).parameters == found.parameters.total


def test_modules_that_cost_nothing_are_left_out():
    root = fold(counted(nn.Sequential(nn.Linear(8, 8), nn.Identity(), nn.Dropout())))
    assert labels(root) == ["0"]


def test_times_and_bytes_are_those_that_are_given():
    found = counted(stack(16, 16))
    seconds = [float(place) for place in range(len(found.operators))]
    root = fold(found, seconds=seconds, moved=[2.0 * value for value in seconds])
    assert root.seconds == sum(seconds)
    assert root.bytes_moved == 2 * sum(seconds)
    assert sum(child.seconds or 0.0 for child in root.children) == root.seconds
    assert sum(node.seconds or 0.0 for _, node in leaves(root)) == root.seconds


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([8, 16, 24]), min_size=1, max_size=6), st.booleans())
def test_folding_loses_nothing(hidden: list[int], train: bool):
    found = counted(stack(*hidden), train=train)
    root = fold(found)
    work = list(leaves(root))
    assert sum(node.macs for _, node in work) == found.macs
    assert sum(node.bytes_moved for _, node in work) == found.bytes_moved
    assert sum(node.flops for _, node in work) == 2 * found.macs + found.bias_adds + found.other_flops
    assert len({path for path, _ in work}) >= len(work) - len(set(hidden)) - 1  # "itself" has its module's path
    shown = [path for _, node in work if node.label != ITSELF for path in node.paths]
    assert len(shown) == len(set(shown))


def test_ranges_stay_short():
    assert ranges(["0", "1", "2", "3"]) == "0-3"
    assert ranges(["0", "2", "4", "6", "8", "10"]) == "0, 2, 4, …, 10"
    assert ranges(["k_proj", "v_proj"]) == "k_proj, v_proj"
    assert ranges(["7"]) == "7"
