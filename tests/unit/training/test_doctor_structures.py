"""The doctor on models of every shape, compiled ones too; and replays that leave no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from doctor_models import SmallConvolutions, Stretched, healthy, squares, watched
from torch import nn
from torch.utils.checkpoint import checkpoint

from narrowcast.errors import TrainingError
from narrowcast.training.doctor.cause import first_cause
from narrowcast.training.doctor.sampling import targets
from narrowcast.training.doctor.values import Part
from narrowcast.training.doctor.whatif import shares


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


class Shared(nn.Module):
    """One module under two names, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.again(torch.relu(self.first(self.first(x)))))


class Branches(nn.Module):
    """Tuples and dictionaries as outputs, None among them."""

    class Split(nn.Linear):
        def forward(self, x):
            return {"left": super().forward(x), "right": (x, None, [x.sum()])}

    def __init__(self) -> None:
        super().__init__()
        self.split = Branches.Split(8, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        parts = self.split(x)
        return self.out(parts["left"] + parts["right"][0])


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.first(x).mul_(0.5).add_(1.0).relu_())


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.out = nn.Linear(8, 2)
        self.reentrant = reentrant

    def forward(self, x):
        return self.out(checkpoint(self.block, x.requires_grad_(), use_reentrant=self.reentrant))


def frozen():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    return model


MODELS = {
    "shared": Shared,
    "branches": Branches,
    "in place": InPlace,
    "frozen": frozen,
    "checkpointed": lambda: Checkpointed(False),
    "checkpointed, reentrant": lambda: Checkpointed(True),
}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_watched_models_train_as_others_do(name):
    model = MODELS[name]()
    twin = copy.deepcopy(model)
    batches = [(torch.randn(4, 8), torch.randn(4, 2)) for _ in range(6)]
    trainer, doctor = watched(model, squares, level="deep", every=2)
    other, _ = watched(twin, squares)
    other.watch = None
    for batch in batches:
        trainer.step(batch)
        other.step(batch)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), twin.parameters(), strict=True))
    assert doctor.close().verdict.healthy
    assert not any(part._forward_hooks for part in model.modules())


def test_a_shared_module_counts_each_call_once():
    model = Shared()
    assert [one.name for one in targets(model)] == ["first", "out"]
    trainer, doctor = watched(model, squares, level="deep", every=1)
    trainer.step((torch.randn(4, 8), torch.randn(4, 2)))
    doctor.close()
    assert int(doctor.record().of("first", Part.FORWARD).total.sum()) == 3 * 4 * 8
    assert int(doctor.record().of("first", Part.BACKWARD).total.sum()) == 3 * 4 * 8


def test_large_tensors_are_sampled_and_their_largest_is_exact():
    spike = torch.zeros(1000, 600)
    spike[0, 1] = 7e4  # beside the first number of the sample

    class Spiked(nn.Linear):
        def forward(self, x):
            return super().forward(x) + spike

    model = nn.Sequential(Spiked(1, 600), nn.ReLU(inplace=True))
    batch = torch.rand(1000, 1), torch.zeros(1000, 600)
    expected = model[0](batch[0]).detach().abs().max()
    trainer, doctor = watched(model, squares, level="deep", every=1)
    trainer.step(batch)
    doctor.close()
    for layer, part in (("0", Part.FORWARD), ("1", Part.FORWARD), ("1", Part.BACKWARD)):
        series = doctor.record().of(layer, part)
        assert series.numbers == 600_000
        assert series.sampled
        assert series.total.sum() <= (1 << 18) + 2
    series = doctor.record().of("0", Part.FORWARD)
    assert series.largest.tolist() == [float(expected)]
    assert shares(series.total, "fp16", largest=float(expected)).overflow.low == 1 / series.total.sum()
    weights = doctor.record().of("0", Part.WEIGHT)
    assert weights.numbers == weights.total.sum() == 1200


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_block_that_is_computed_again_counts_once(reentrant):
    trainer, doctor = watched(Checkpointed(reentrant), squares, level="deep", every=1)
    trainer.step((torch.randn(4, 8), torch.randn(4, 2)))
    doctor.close()
    assert int(doctor.record().of("block.2", Part.FORWARD).total.sum()) == 4 * 8
    assert int(doctor.record().of("block.2", Part.BACKWARD).total.sum()) == 4 * 8


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_fault_is_named_in_any_structure(name):
    model = MODELS[name]()
    with torch.no_grad():
        model.get_submodule("2" if name == "frozen" else "out").bias[1] = 3e38
    cause = first_cause(model, lambda out, target: (out * 10).sum() ** 2, (torch.randn(4, 8), None))
    assert (cause.layer, cause.operator, cause.kind) == ("loss", "aten.mul", "inf")


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_fault_in_the_backward_pass_of_a_checkpointed_block_is_named(reentrant):
    model = Checkpointed(reentrant)
    model.block[1] = Root()
    cause = first_cause(model, squares, (torch.randn(4, 8), torch.randn(4, 2)))
    assert (cause.layer, cause.part) == ("block.1", Part.BACKWARD)


class Root(nn.Module):
    def forward(self, x):
        return (x * 0).sqrt()


def test_infinities_that_are_asked_for_are_no_faults():
    class Masked(nn.Linear):
        def forward(self, x):
            scores = super().forward(x).masked_fill(x > 0, -torch.inf)
            return scores.softmax(-1)

    model = Masked(8, 8)
    batch = torch.randn(4, 8)
    batch[:, 0] = -1.0
    assert first_cause(model, lambda out, target: out.square().mean(), (batch, None)) is None
    batch[2] = 1.0  # nothing is left of this row
    cause = first_cause(model, lambda out, target: out.square().mean(), (batch, None))
    assert (cause.operator, cause.kind) == ("aten._softmax", "nan")


def test_an_infinity_that_does_no_harm_is_passed_over():
    class Gate(nn.Linear):
        def forward(self, x):
            open_ = 1 / (1 + (x * 1e3).exp())  # infinity below the line is a plain zero
            return super().forward(open_.detach()).relu().log()

    cause = first_cause(Gate(8, 8), lambda out, target: out.mean(), (torch.randn(4, 8).abs() + 1, None))
    assert cause.operator == "aten.log"


def test_a_replay_leaves_no_trace():
    model = nn.Sequential(SmallConvolutions(), nn.Dropout(0.5), nn.Linear(4, 4))
    nn.init.constant_(model[2].weight, 3e38)
    batch = (torch.randn(8, 1, 8, 8), torch.randint(0, 4, (8,)))
    model(batch[0]).sum().backward()
    before = copy.deepcopy(model.state_dict()), [one.grad for one in model.parameters()], torch.get_rng_state()
    kinds = [type(part) for part in model.modules()]
    cause = first_cause(model, torch.nn.functional.cross_entropy, batch, "bf16-mixed")
    assert cause.layer == "2"
    state, grads, generator = before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(one.grad is grad for one, grad in zip(model.parameters(), grads, strict=True))
    assert torch.equal(generator, torch.get_rng_state())
    assert [type(part) for part in model.modules()] == kinds
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_a_replay_draws_the_same_random_numbers():
    class Unlucky(nn.Module):
        """Divides by zero when a coin says so."""

        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 2)
            self.coins: list[bool] = []

        def forward(self, x):
            coin = bool(torch.rand(()) < 0.3)
            self.coins.append(coin)
            return self.out(x / (x * 0 if coin else 1))

    model = Unlucky()
    trainer, doctor = watched(model, squares)

    def train():
        for _ in range(40):
            trainer.step((torch.randn(4, 8), torch.randn(4, 2)))

    with pytest.raises(TrainingError):
        train()
    cause = doctor.events[0].cause
    assert (cause.layer, cause.operator) == ("", "aten.div")
    assert all(model.coins[cause.step :])
    assert "epsilon" in {remedy.kind for remedy in cause.mends}


def test_weights_that_are_broken_already_are_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    cause = first_cause(model, squares, (torch.randn(4, 8), torch.randn(4, 2)))
    assert (cause.layer, cause.part, cause.operator) == ("1", Part.UPDATE, "parameters")


def test_a_window_of_micro_batches_is_searched_for_the_one_that_broke():
    model = Stretched(1.0)
    trainer, doctor = watched(model, squares, policy="bf16-mixed", accumulate=3)
    good, bad = (torch.randn(4, 8), torch.randn(4, 2)), (torch.full((4, 8), torch.nan), torch.randn(4, 2))
    trainer.step(good)
    trainer.step(bad)
    with pytest.raises(TrainingError):
        trainer.step(good)
    assert doctor.events[0].cause.operator == "data"


@pytest.mark.slow
@pytest.mark.parametrize("level", ["cheap", "deep"])
def test_a_compiled_model_trains_with_the_doctor(level):
    model, loss, batch = healthy("cnn")
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    trainer, doctor = watched(compiled, loss, level=level, every=3)
    other, _ = watched(twin, loss)
    for _ in range(7):
        info, expected = trainer.step(batch), other.step(batch)
        assert info.loss == pytest.approx(expected.loss, rel=1e-5)
    assert doctor.close().verdict.healthy
    setting = doctor.record().setting
    assert setting.compiled
    assert "head" in {layer.name for layer in setting.layers}
    seen = doctor.record().of("head", Part.FORWARD)
    assert (seen is None) == (level == "cheap")
    assert torch.compiler.is_compiling() is False
