"""Steps beside hand-written loops: the same bits, the same order of operations, nothing that waits for the device."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from narrowcast.training import DynamicScale, Loss, Trainer, precision
from narrowcast.training.fused import FusedAdamW

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "adamw-foreach": lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=True),
    "adamw-fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "adamw-own": lambda params: FusedAdamW(params, lr=1e-2),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-3),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 3))


def batches(count: int, size: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    made = []
    for _ in range(count):
        inputs = torch.randn(size, 8, generator=generator)
        made.append((inputs, inputs[:, :3].argmax(1)))
    return made


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [one.detach().clone() for one in model.parameters()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def by_hand(model, optimizer, data, *, cast=None, clip=None, scaler=None, accumulate=1, schedule=None):
    losses = []
    for number, (inputs, targets) in enumerate(data, 1):
        with torch.autocast("cpu", cast) if cast else nullcontext():
            loss = cross_entropy(model(inputs), targets)
        losses.append(float(loss.detach()))
        part = loss / accumulate
        (scaler.scale(part) if scaler else part).backward()
        if number % accumulate:
            continue
        if scaler:
            scaler.unscale_(optimizer)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()
        if schedule:
            schedule.step()
    return losses


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw-own"])
@pytest.mark.parametrize("policy", ["fp32", "bf16-mixed"])
def test_it_takes_the_very_steps_of_a_hand_written_loop(name, policy):
    cast = torch.bfloat16 if policy == "bf16-mixed" else None
    model, data = network(), batches(6)
    expected = by_hand(model, OPTIMIZERS[name](model.parameters()), data, cast=cast)
    ours = network()
    trainer = Trainer(ours, OPTIMIZERS[name](ours.parameters()), cross_entropy, precision=policy)
    assert [trainer.step(batch).loss for batch in data] == expected
    assert same(weights(ours), weights(model))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_clipping_and_accumulation_agree_with_a_hand_written_loop(name, accumulate):
    model, data = network(), batches(6)
    theirs = OPTIMIZERS["adamw" if name == "adamw-own" else name]
    by_hand(model, theirs(model.parameters()), data, clip=0.1, accumulate=accumulate)
    ours = network()
    trainer = Trainer(ours, OPTIMIZERS[name](ours.parameters()), cross_entropy, clip_norm=0.1, accumulate=accumulate)
    infos = [trainer.step(batch) for batch in data]
    assert [info.updated for info in infos] == [number % accumulate == 0 for number in range(1, 7)]
    for left, right in zip(weights(ours), weights(model), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw", "adamw-fused", "adamw-own"])
def test_fp16_agrees_with_pytorchs_own_scaler(name):
    model, data = network(), batches(12)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
    theirs = OPTIMIZERS["adamw" if name == "adamw-own" else name]
    by_hand(model, theirs(model.parameters()), data, cast=torch.float16, scaler=scaler, clip=1.0)
    ours = network()
    policy = precision("fp16-mixed", loss_scale=DynamicScale(initial=2.0**10, interval=5))
    trainer = Trainer(ours, OPTIMIZERS[name](ours.parameters()), cross_entropy, precision=policy, clip_norm=1.0)
    for batch in data:
        trainer.step(batch)
    assert trainer.scale == scaler.get_scale() == 2.0**12
    for left, right in zip(weights(ours), weights(model), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adamw-fused", "adamw-own"])
def test_the_norm_is_unscaled_and_taken_before_clipping(name):
    (inputs, targets) = batches(1)[0]
    model = network()
    cross_entropy(model(inputs), targets).backward()
    expected = torch.cat([one.grad.flatten() for one in model.parameters()]).norm()
    ours = network()
    policy = precision("fp16-mixed", loss_scale=256.0, overrides={"*": "fp32"})
    trainer = Trainer(ours, OPTIMIZERS[name](ours.parameters()), cross_entropy, precision=policy, clip_norm=1e-3)
    assert trainer.step((inputs, targets)).grad_norm == pytest.approx(float(expected), rel=1e-4)


def test_a_schedule_moves_after_each_update_and_the_info_tells_the_rate_of_the_step():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    trainer = Trainer(model, optimizer, cross_entropy, schedule=schedule, accumulate=2)
    assert [trainer.step(batch).lr for batch in batches(6)] == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    assert trainer.steps == 3


def test_a_rate_in_a_tensor_is_told_as_it_was():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    trainer = Trainer(model, optimizer, cross_entropy, schedule=schedule)
    infos = [trainer.step(batch) for batch in batches(3)]
    assert [info.lr for info in infos] == [0.5, 0.25, 0.125]


def gradient_of(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    cross_entropy(model(inputs), targets).backward()
    return torch.cat([one.grad.flatten() for one in model.parameters()])


def step_of(model: nn.Module, before: list[torch.Tensor]) -> torch.Tensor:
    """Return what plain gradient descent with a rate of 1 took from the weights: the gradient."""
    return torch.cat([(old - new).flatten() for old, new in zip(before, weights(model), strict=True)])


@pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (8, 8, 8, 3), (2, 16, 5, 1)], ids=str)
def test_a_window_has_the_gradient_of_all_its_samples_together(sizes):
    (inputs, targets) = batches(1, size=sum(sizes))[0]
    model = network()
    expected = gradient_of(model, inputs, targets)
    before = weights(model)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=1.0), cross_entropy, accumulate=4)
    model.zero_grad()
    for batch in zip(inputs.split(sizes), targets.split(sizes), strict=True):
        info = trainer.step(batch)
    torch.testing.assert_close(step_of(model, before), expected, rtol=1e-4, atol=1e-6)
    assert info.loss == pytest.approx(float(cross_entropy(before_model(before)(inputs), targets).detach()), rel=1e-5)


def before_model(saved: list[torch.Tensor]) -> nn.Module:
    model = network()
    with torch.no_grad():
        for one, values in zip(model.parameters(), saved, strict=True):
            one.copy_(values)
    return model


@pytest.mark.parametrize("policy", ["fp32", "fp16-mixed"])
def test_an_uneven_last_window_is_normalised_by_what_it_holds(policy):
    (inputs, targets) = batches(1, size=24)[0]
    model = network()
    expected = gradient_of(model, inputs, targets)
    before = weights(model)
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        cross_entropy,
        accumulate=8,
        precision=precision(policy, overrides={"*": "fp32"} if policy != "fp32" else {}),
    )
    model.zero_grad()
    for batch in zip(inputs.split(8), targets.split(8), strict=True):
        assert not trainer.step(batch).updated
    info = trainer.flush()
    assert info is not None
    assert info.updated
    assert trainer.flush() is None
    torch.testing.assert_close(step_of(model, before), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("on_device", [False, True], ids=["number", "tensor"])
def test_tokens_that_count_weigh_alike_whatever_batch_they_are_in(on_device):
    """A mean of means would give the few tokens of a padded batch too much weight."""
    (inputs, targets) = batches(1, size=32)[0]
    ignored = targets.clone()
    ignored[3:16] = -100

    def loss(outputs, wanted):
        count = (wanted != -100).sum()
        return Loss(cross_entropy(outputs, wanted, reduction="sum"), count if on_device else int(count))

    model = network()
    expected = gradient_of(model, inputs, ignored)
    before = weights(model)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=1.0), loss, accumulate=2)
    model.zero_grad()
    trainer.step((inputs[:16], ignored[:16]))
    info = trainer.step((inputs[16:], ignored[16:]))
    torch.testing.assert_close(step_of(model, before), expected, rtol=1e-4, atol=1e-6)
    assert info.loss == pytest.approx(float(cross_entropy(before_model(before)(inputs), ignored).detach()), rel=1e-5)


def test_a_micro_batch_of_padding_alone_counts_for_nothing():
    (inputs, targets) = batches(1)[0]

    def loss(outputs, wanted):
        return Loss(cross_entropy(outputs, wanted, reduction="sum"), int((wanted != -100).sum()))

    model = network()
    expected = gradient_of(model, inputs, targets)
    before = weights(model)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=1.0), loss, accumulate=2)
    model.zero_grad()
    trainer.step((inputs, targets))
    trainer.step((inputs, torch.full_like(targets, -100)))
    torch.testing.assert_close(step_of(model, before), expected, rtol=1e-4, atol=1e-6)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 6),
    st.sampled_from([None, 8.0]),
    st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_windows_of_any_sizes_have_the_gradient_of_their_samples(sizes, accumulate, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(sum(sizes), 8, generator=generator)
    targets = inputs[:, :3].argmax(1)
    model = network()
    policy = precision("fp32") if scale is None else precision("fp16-mixed", loss_scale=scale, overrides={"*": "fp32"})
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), lr=1.0), cross_entropy, precision=policy, accumulate=accumulate
    )
    pieces = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
    for first in range(0, len(pieces), accumulate):
        held = pieces[first : first + accumulate]
        before = weights(model)
        expected = gradient_of(before_model(before), *(torch.cat(parts) for parts in zip(*held, strict=True)))
        infos = [trainer.step(batch) for batch in held]
        info = infos[-1] if infos[-1].updated else trainer.flush()
        torch.testing.assert_close(step_of(model, before), expected, rtol=1e-3, atol=1e-5)
        assert info.grad_norm == pytest.approx(float(expected.norm()), rel=1e-3)


def test_discard_drops_a_window():
    model = network()
    before = weights(model)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=1.0), cross_entropy, accumulate=2)
    trainer.step(batches(1)[0])
    trainer.discard()
    assert trainer.flush() is None
    assert same(weights(model), before)
    assert all(one.grad is None for one in model.parameters())


class Synchronisations(TorchDispatchMode):
    """Counts what brings a number of a tensor to the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("policy", "most"), [("fp32", 0), ("bf16-mixed", 0), ("bf16-true", 0), ("fp16-mixed", 1)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_waits_for_the_device_no_more_often_than_it_must(policy, most, accumulate):
    model = network()
    # SGD, as Adam reads its own step counter, which it keeps on the host
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, cross_entropy, precision=policy, clip_norm=1.0, accumulate=accumulate)
    data = batches(4)
    with Synchronisations() as seen:
        for batch in data:
            trainer.step(batch)
    assert seen.count <= most * 4 // accumulate


def test_inputs_may_be_arguments_or_arguments_by_name():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 3)

        def forward(self, left, right):
            return self.linear(left - right)

    (inputs, targets) = batches(1)[0]
    losses = []
    for form in ((inputs, inputs * 0.5), [inputs, inputs * 0.5], {"right": inputs * 0.5, "left": inputs}):
        torch.manual_seed(0)
        model = Sum()
        trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), cross_entropy)
        losses.append(trainer.step((form, targets)).loss)
    assert losses[0] == losses[1] == losses[2]


def test_a_loss_may_have_parameters_of_its_own():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

        def forward(self, outputs, targets):
            return cross_entropy(outputs / self.temperature, targets)

    model, loss = network(), Scaled()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    trainer = Trainer(model, optimizer, loss)
    trainer.step(batches(1)[0])
    assert loss.temperature.item() != 1.0
    assert "temperature" in trainer.state_dict()["loss"]


def test_sparse_gradients_are_scaled_and_clipped_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = Trainer(
        model, optimizer, cross_entropy, precision=precision("fp16-mixed", loss_scale=8.0), clip_norm=1e-3
    )
    info = trainer.step((torch.tensor([[1, 1], [2, 3]]), torch.tensor([0, 1])))
    assert info.updated
    assert float(step_of(model, before).norm()) == pytest.approx(1e-3, rel=2e-2)


@pytest.mark.parametrize(
    ("policy", "overrides"), [("bf16-mixed", {}), ("fp16-mixed", {"0": "fp32"}), ("bf16-true", {"3": "fp32"})], ids=str
)
def test_a_compiled_model_takes_the_steps_of_the_plain_one(policy, overrides):
    losses = []
    for compiled in (False, True):
        model = network()
        called = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = torch.optim.AdamW(called.parameters(), lr=1e-2)
        trainer = Trainer(called, optimizer, cross_entropy, precision=precision(policy, overrides=overrides))
        losses.append([trainer.step(batch).loss for batch in batches(1) * 5])
        assert list(trainer.state_dict()["model"]) == list(model.state_dict())
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[1][-1] < losses[1][0]


@pytest.mark.parametrize("counted", [11, torch.tensor(11)], ids=["number", "tensor"])
def test_the_rate_is_of_what_the_losses_weigh_too(counted):
    def loss(outputs, targets):
        return Loss(cross_entropy(outputs, targets, reduction="sum"), counted)

    model = network()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, accumulate=2)
    infos = [trainer.step(batch) for batch in batches(4)]
    assert infos[0].tokens_or_samples_per_s is infos[1].samples_per_s is None
    for info, micro in zip(infos[2:], (1, 2), strict=True):
        assert info.samples_per_s * info.seconds == pytest.approx(16 * micro)
        assert info.tokens_or_samples_per_s * info.seconds == pytest.approx(11 * micro)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), cross_entropy)
    info = [trainer.step(batch) for batch in batches(2)][1]
    assert info.tokens_or_samples_per_s == info.samples_per_s > 0
