"""BF16 weights: what plain rounding loses, and what stochastic rounding and Kahan summation keep."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from narrowcast.errors import TrainingError
from narrowcast.training import Trainer, precision
from narrowcast.training.rounding import WideUpdate, accumulate_in_fp32, round_stochastically_


def drifted(method: str, step: float, steps: int = 1000, count: int = 256) -> float:
    """Return how far weights of 1 have moved after many equal steps downwards."""
    weight = nn.Parameter(torch.ones(count, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=step)
    wide = WideUpdate([weight], method)
    for number in range(steps):
        weight.grad = torch.ones_like(weight)
        with wide.widened(number):
            wide.begin(None)
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        weight.grad = None
    return float((1 - weight.detach().float()).mean())


@pytest.mark.parametrize(("step", "moves"), [(2**-10, False), (2**-9 * 1.1, True)], ids=["below", "above"])
def test_plain_bf16_loses_updates_below_half_its_spacing(step, moves):
    """Below 1 numbers of BF16 are 2^-8 apart: a step of less than 2^-9 is rounded away, each time."""
    assert (drifted("plain", step, steps=100) > 0) == moves


@pytest.mark.parametrize("method", ["stochastic", "kahan"])
def test_small_updates_arrive_where_plain_bf16_loses_every_one(method):
    assert drifted("plain", 1e-4) == 0
    assert drifted(method, 1e-4) == pytest.approx(0.1, rel=0.05)


def test_pytorchs_own_bf16_update_loses_them_too():
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=1e-4)
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert torch.equal(weight, torch.ones_like(weight))


@pytest.mark.parametrize("value", [1 + 2**-10, -3.3, 1e-30, 2.0**-133 * 1.37, 65000.5])
def test_stochastic_rounding_is_exact_on_average_and_goes_to_a_neighbour(value):
    drawn = round_stochastically_(torch.full((200_000,), value), torch.Generator().manual_seed(0))
    exact = float(torch.tensor(value))
    lower, upper = sorted({float(x) for x in drawn.unique()})
    assert lower < exact < upper
    assert torch.equal(drawn, drawn.bfloat16().float())
    spread = upper - lower
    assert float(drawn.double().mean()) == pytest.approx(exact, abs=5 * spread / 2 / 200_000**0.5)


def test_stochastic_rounding_keeps_what_bf16_holds():
    words = torch.arange(1 << 16, dtype=torch.int32) << 16
    every = words.view(torch.float32)
    rounded = round_stochastically_(every.clone(), torch.Generator().manual_seed(0))
    assert torch.equal(rounded.view(torch.int32), words)


def test_stochastic_rounding_keeps_every_nan_a_nan():
    payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1, -8388607], dtype=torch.int32)
    assert round_stochastically_(payloads.view(torch.float32), torch.Generator().manual_seed(0)).isnan().all()


def test_kahan_keeps_about_16_bits_of_a_weight():
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    wide = WideUpdate([weight], "kahan")
    with wide.widened(0):
        wide.begin(None)
        weight.grad = torch.full((1,), 2.0**-15)
        optimizer.step()
    assert float(weight.detach()) == 1.0
    assert float(wide.state_dict()["lost"][0]) == -(2.0**-15)


def test_an_exception_leaves_the_weights_as_they_were():
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    address = weight.data_ptr()

    def fail() -> None:
        wide = WideUpdate([weight], "stochastic")
        with wide.widened(0):
            wide.begin(None)
            weight.data.zero_()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(weight, torch.ones(4, dtype=torch.bfloat16))
    assert weight.data_ptr() == address


def test_weights_of_other_dtypes_are_left_alone():
    narrow, full = nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), nn.Parameter(torch.full((2,), 1.0001))
    wide = WideUpdate([narrow, full], "stochastic")
    with wide.widened(0):
        wide.begin(None)
        assert narrow.dtype == torch.float32
        full.data.add_(1e-6)
    assert narrow.dtype == torch.bfloat16
    assert not torch.equal(full, full.bfloat16().float())


def test_gradients_of_bf16_weights_add_up_in_fp32():
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    accumulate_in_fp32([weight])
    for factor in (1.0, 2**-9, 2**-9):  # BF16 would round each small one away
        (weight * factor).sum().backward()
    assert weight.grad.dtype == torch.float32
    assert float(weight.grad) == 1.0 + 2**-8


def fit(update: str, rate: float = 2e-4) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 16, generator=generator)
    targets = inputs[:, :4].argmax(1)
    policy = precision("fp32") if update == "fp32" else precision("bf16-true", update=update)
    trainer = Trainer(model, torch.optim.AdamW(model.parameters(), lr=rate), cross_entropy, precision=policy)
    return [trainer.step((inputs, targets)).loss for _ in range(300)]


def test_networks_train_as_in_fp32_where_plain_bf16_stalls():
    exact = fit("fp32")
    gained = exact[0] - exact[-1]
    behind = {update: (fit(update)[-1] - exact[-1]) / gained for update in ("plain", "stochastic", "kahan")}
    assert behind["plain"] > 0.15
    assert abs(behind["stochastic"]) < 0.05
    assert abs(behind["kahan"]) < 0.05


@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD"])
@pytest.mark.parametrize("update", ["stochastic", "kahan"])
def test_any_optimizer_may_move_bf16_weights(name, update):
    torch.manual_seed(0)
    model = nn.Linear(8, 2)
    optimizer = getattr(torch.optim, name)(model.parameters())
    trainer = Trainer(model, optimizer, cross_entropy, precision=precision("bf16-true", update=update), clip_norm=1.0)
    for _ in range(3):
        info = trainer.step((torch.ones(4, 8), torch.tensor([0, 1, 0, 0])))
    assert info.updated
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    floating = [
        one
        for state in optimizer.state.values()
        for one in state.values()
        if isinstance(one, torch.Tensor) and one.dim()
    ]
    assert all(one.dtype == torch.float32 for one in floating)


def test_an_optimizer_that_rounds_by_itself_must_agree_with_the_precision():
    from narrowcast.training.fused import FusedAdamW

    model = nn.Linear(8, 2)
    with pytest.raises(
        TrainingError, match="rounds BF16 weights 'nearest', and the precision's update is 'stochastic'"
    ):
        Trainer(model, FusedAdamW(model.parameters()), cross_entropy, precision="bf16-true")
    model = nn.Linear(8, 2)
    optimizer = FusedAdamW(model.parameters(), rounding="stochastic")
    trainer = Trainer(model, optimizer, cross_entropy, precision="bf16-true")
    assert trainer.step((torch.ones(4, 8), torch.tensor([0, 1, 0, 0]))).updated


@pytest.mark.parametrize("left_out", [None, 0.0, 1.0], ids=["not-begun", "made", "left-out"])
def test_what_rounding_cut_off_moves_a_weight_only_with_an_update(left_out):
    """Half the spacing of a weight, a tie: added and rounded again it goes to the even neighbour."""
    weight = nn.Parameter(torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16))
    wide = WideUpdate([weight], "kahan")
    lost = torch.tensor([2**-8, 2**-8], dtype=torch.bfloat16)
    wide.load_state_dict({**wide.state_dict(), "lost": [lost]})
    before = weight.detach().clone()
    with wide.widened(0):
        if left_out is not None:
            wide.begin(torch.tensor(left_out))
    moved = left_out == 0.0
    assert torch.equal(weight, torch.tensor([1.0, 1.015625], dtype=torch.bfloat16) if moved else before)
    assert torch.equal(wide.state_dict()["lost"][0], torch.tensor([2**-8, -(2**-8)]).bfloat16() if moved else lost)
