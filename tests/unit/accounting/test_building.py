"""Building modules without memory, whatever their constructors look at."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from narrowcast.accounting.building import fake_module
from narrowcast.errors import ModelError


class Counting:
    """Counts how often a module is built."""

    def __init__(self, build: type[nn.Module]) -> None:
        self.build = build
        self.calls = 0

    def __call__(self) -> nn.Module:
        self.calls += 1
        return self.build()


class Rates(nn.Module):
    """Looks at small numbers, as stochastic depth does, and has a weight of 4 TB."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 0.2, 3)]
        self.cuts = (torch.arange(6).view(2, 3) * 2).sum(1).tolist()
        self.weight = nn.Parameter(torch.empty(10**6, 10**6))
        self.scale = nn.Parameter(torch.ones(5))
        self.register_buffer("table", torch.tensor([1.0, 2.0]))


class Looks(nn.Module):
    """Looks at a number of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        nn.init.ones_(self.layer.weight)
        self.size = int(self.layer.weight.sum().item())


class Writes(nn.Module):
    """Writes a weight's numbers, which are not known, over known ones, and looks at them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)
        nn.init.constant_(self.layer.weight, 2.0)
        known = torch.zeros(3)
        known.copy_(self.layer.weight.detach()[0])
        self.size = int(known.sum().item())


def test_small_numbers_are_known_and_weights_take_no_memory() -> None:
    build = Counting(Rates)
    module, _ = fake_module(build)
    assert build.calls == 1
    assert module.rates == pytest.approx([0, 0.1, 0.2])
    assert module.cuts == [6, 24]
    assert all(isinstance(tensor, FakeTensor) for tensor in (*module.parameters(), *module.buffers()))
    assert [tuple(tensor.shape) for tensor in module.parameters()] == [(10**6, 10**6), (5,)]
    assert isinstance(module.scale, nn.Parameter)
    assert module.scale.requires_grad


@pytest.mark.parametrize(("build", "size"), [(Looks, 9), (Writes, 6)])
def test_what_depends_on_weights_is_built_for_real(build: type[nn.Module], size: int) -> None:
    counting = Counting(build)
    module, _ = fake_module(counting)
    assert counting.calls == 2
    assert module.size == size
    assert isinstance(module.layer.weight, FakeTensor)


def test_copies_of_layers_live_in_the_same_mode() -> None:
    encoder = lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)  # noqa: E731
    module, mode = fake_module(encoder)
    assert {tensor.fake_mode for tensor in module.parameters()} == {mode}


def test_what_a_constructor_says_comes_through() -> None:
    def refuse() -> nn.Module:
        raise ModelError("there is no such model")

    with pytest.raises(ModelError, match="no such model"):
        fake_module(refuse)
    with pytest.raises(ModelError, match=r"cannot be built: ValueError: .*divisible"):
        fake_module(lambda: nn.Conv2d(3, 4, 1, groups=2))


def test_the_default_dtype_reaches_the_weights() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        module, _ = fake_module(lambda: nn.Linear(4, 4))
    finally:
        torch.set_default_dtype(before)
    assert module.weight.dtype is torch.bfloat16
