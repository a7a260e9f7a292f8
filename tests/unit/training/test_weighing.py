"""The unit that losses are weighed in: it stays where micro-batches weigh alike, and follows their average elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from narrowcast.training import Loss, Trainer, precision
from narrowcast.training.weighing import Unit

CPU = torch.device("cpu")
TOKENS = [1, 64, 48, 64, 0, 64, 64, 32]  # that count, of 64, by micro-batch


def weighed(unit: Unit, weights: list[float], *, tensor: bool) -> list[float]:
    """Return the share of each micro-batch, each a window of its own."""
    shares: list[float] = []
    for weight in weights:
        given = torch.tensor(int(weight)) if tensor else weight
        _, share = unit.share(torch.ones(()), given, False)
        unit.closed(share, 1)
        shares.append(float(share))
    return shares


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_what_weighs_alike_is_weighed_as_it_is(tensor: bool) -> None:
    assert weighed(Unit(CPU, None), [7.0] * 20, tensor=tensor) == [1.0] * 20
    assert weighed(Unit(CPU, None), [6.0, 8.0, 5.0, 9.0] * 5, tensor=tensor)[:2] == [1.0, pytest.approx(8 / 6)]


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("first", [1.0, 4096.0])
def test_a_first_micro_batch_unlike_the_others_decides_for_a_few_windows_alone(first: float, tensor: bool) -> None:
    shares = weighed(Unit(CPU, None), [first] + [64.0] * 400, tensor=tensor)
    assert shares[1] == 64 / first
    assert 0.5 <= shares[-1] <= 2.0


def test_what_weighs_nothing_moves_no_unit() -> None:
    shares = weighed(Unit(CPU, None), [0.0, 0.0, 64.0, 64.0], tensor=False)
    assert shares == [0.0, 0.0, 1.0, 1.0]


def trainer_of(seen: list[float], *, on_device: bool) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

    def loss(outputs: Tensor, targets: Tensor) -> Loss:
        outputs.register_hook(lambda grad: seen.append(float(grad.abs().sum())))
        count = (targets != -100).sum()
        return Loss(cross_entropy(outputs.float(), targets, reduction="sum"), count if on_device else int(count))

    policy = precision("fp16-mixed", loss_scale=1024.0)
    return Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, precision=policy, accumulate=2)


def fed(trainer: Trainer, number: int) -> float:
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(64, 8, generator=generator)
    targets = inputs[:, :3].argmax(1)
    targets[TOKENS[number % len(TOKENS)] :] = -100
    return trainer.step((inputs, targets)).loss


@pytest.mark.parametrize("on_device", [False, True], ids=["number", "tensor"])
def test_a_static_scale_scales_means_whatever_the_first_micro_batch_weighed(on_device: bool) -> None:
    """A first micro-batch of one token made all later gradients 64 times as large as their scale says."""
    seen: list[float] = []
    trainer = trainer_of(seen, on_device=on_device)
    for number in range(8):
        fed(trainer, number)
    assert seen[1] > 20_000  # 63 tokens more, in units of one
    assert trainer.skipped == 0
    assert 0 < max(seen[2:]) < 4_000


@pytest.mark.parametrize("on_device", [False, True], ids=["number", "tensor"])
def test_the_unit_is_part_of_the_state(on_device: bool) -> None:
    straight = trainer_of([], on_device=on_device)
    for number in range(4):
        fed(straight, number)
    saved = copy.deepcopy(straight.state_dict())
    again = trainer_of([], on_device=on_device)
    again.load_state_dict(saved)
    for number in range(4, 12):
        assert str(fed(again, number)) == str(fed(straight, number))  # one that weighs nothing has no mean
    for mine, theirs in zip(again.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
