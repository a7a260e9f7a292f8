"""Cross-entropy over targets that count, against the definition, and what is said where shapes or indices do not fit."""

from __future__ import annotations

import pytest
import torch

from narrowcast.errors import TrainingError
from narrowcast.training.classes import cross_entropy_sum
from narrowcast.training.config import LossSettings
from narrowcast.training.distillation import labelled_cross_entropy
from narrowcast.training.objectives import classes_of, loss_of


@pytest.mark.parametrize("shape", [(6, 5), (3, 5, 4), (2, 5, 3, 4)], ids=str)
def test_the_sum_is_that_of_the_definition(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(shape, dtype=torch.float64)
    targets = torch.randint(0, 5, (shape[0], *shape[2:]))
    targets[0] = 9
    total, count = cross_entropy_sum(logits, targets, ignore=9)
    shares = logits.movedim(1, -1).softmax(-1).flatten(0, -2)
    kept = [(share, target) for share, target in zip(shares, targets.flatten().tolist(), strict=True) if target != 9]
    assert float(total) == pytest.approx(-sum(float(share[target].log()) for share, target in kept), rel=1e-5)
    assert int(count) == len(kept)
    assert total.dtype == torch.float32


@pytest.mark.parametrize(
    "targets",
    [torch.zeros(5, dtype=torch.int64), torch.zeros(6), torch.zeros(6, 5), torch.zeros(6, 1, dtype=torch.int64)],
    ids=["fewer", "real", "probabilities", "an-axis-more"],
)
def test_shapes_that_do_not_go_together_are_named(targets: torch.Tensor) -> None:
    with pytest.raises(TrainingError, match=r"cross-entropy of outputs \[6, 5\] with targets"):
        cross_entropy_sum(torch.zeros(6, 5), targets, ignore=-100)


def test_outputs_without_an_axis_of_classes_are_named() -> None:
    assert classes_of(LossSettings(), torch.zeros(6)) is None
    with pytest.raises(TrainingError, match=r"outputs \[6\]"):
        loss_of(LossSettings())(torch.zeros(6, requires_grad=True), torch.zeros(6, dtype=torch.int64))
    with pytest.raises(TrainingError, match="next-token with outputs"):
        loss_of(LossSettings(name="next-token"))(torch.zeros(6, 4), torch.zeros(6, 4, dtype=torch.int64))


@pytest.mark.parametrize("label", [3, -1])
def test_an_index_without_an_output_is_named_in_a_loop_of_ones_own(label: int) -> None:
    with pytest.raises(TrainingError, match=f"a target is class {label}, and the network has 3 outputs"):
        labelled_cross_entropy(torch.zeros(2, 3), torch.tensor([0, label]))
