"""Traced counts equal the closed forms, whatever way a model spells its arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from narrowcast.accounting import formulas
from narrowcast.accounting.formulas import Cost
from narrowcast.accounting.profile import profile_module
from narrowcast.accounting.trace import fake_module, trace
from narrowcast.errors import ModelError


def count(build: Callable[[], nn.Module], *args: torch.Tensor, train: bool = False) -> Any:
    module, mode = fake_module(build)
    return profile_module(module, args, mode=mode, train=train)


LAYERS: list[tuple[Callable[[], nn.Module], tuple[int, ...], Cost]] = [
    (lambda: nn.Linear(64, 32), (5, 64), formulas.linear(64, 32, rows=5)),
    (lambda: nn.Linear(64, 32, bias=False), (5, 64), formulas.linear(64, 32, rows=5, bias=False)),
    (lambda: nn.Conv2d(3, 16, 3), (2, 3, 10, 12), formulas.convolution(3, 16, (3, 3), (8, 10), batch=2)),
    (
        lambda: nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=4),
        (1, 16, 9, 9),
        formulas.convolution(16, 32, (3, 3), (5, 5), groups=4),
    ),
    (
        lambda: nn.Conv2d(24, 24, 5, padding=2, groups=24, bias=False),
        (1, 24, 7, 7),
        formulas.convolution(24, 24, (5, 5), (7, 7), groups=24, bias=False),
    ),
    (
        lambda: nn.Conv1d(8, 8, 3, dilation=4),
        (1, 8, 40),
        formulas.convolution(8, 8, (3,), (formulas.convolution_output(40, 3, dilation=4),)),
    ),
    (
        lambda: nn.Conv3d(2, 4, 3, bias=False),
        (1, 2, 5, 6, 7),
        formulas.convolution(2, 4, (3, 3, 3), (3, 4, 5), bias=False),
    ),
    (
        lambda: nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1, bias=False),
        (1, 8, 6, 6),
        formulas.transposed_convolution(8, 4, (4, 4), (6, 6), (12, 12), bias=False),
    ),
    (
        lambda: nn.ConvTranspose2d(8, 4, 3, groups=2),
        (2, 8, 6, 6),
        formulas.transposed_convolution(8, 4, (3, 3), (6, 6), (8, 8), groups=2, batch=2),
    ),
    (lambda: nn.RNN(128, 256), (10, 3, 128), formulas.recurrent("rnn", 128, 256, steps=10, batch=3)),
    (lambda: nn.GRU(128, 256), (10, 3, 128), formulas.recurrent("gru", 128, 256, steps=10, batch=3)),
    (lambda: nn.LSTM(128, 256), (10, 3, 128), formulas.recurrent("lstm", 128, 256, steps=10, batch=3)),
    (
        lambda: nn.LSTM(32, 16, num_layers=2, bidirectional=True),
        (4, 2, 32),
        formulas.recurrent("lstm", 32, 16, steps=4, batch=2, directions=2)
        + formulas.recurrent("lstm", 32, 16, steps=4, batch=2, directions=2),
    ),
    (
        lambda: nn.LSTM(32, 16, bias=False),
        (4, 2, 32),
        formulas.recurrent("lstm", 32, 16, steps=4, batch=2, biases=0),
    ),
    (lambda: nn.BatchNorm2d(8), (2, 8, 5, 5), formulas.normalisation(8)),
    (lambda: nn.LayerNorm(16), (2, 16), formulas.normalisation(16)),
    (lambda: nn.GroupNorm(2, 8), (2, 8, 5, 5), formulas.normalisation(8)),
    (lambda: nn.RMSNorm(16), (2, 16), formulas.normalisation(16, bias=False)),
    (
        lambda: nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)),
        (3, 5, 16),
        formulas.feed_forward(16, 64, rows=15),
    ),
]


@pytest.mark.parametrize(("build", "shape", "cost"), LAYERS)
def test_layers_cost_what_their_formula_says(
    build: Callable[[], nn.Module], shape: tuple[int, ...], cost: Cost
) -> None:
    found = count(build, torch.empty(shape))
    assert (found.parameters.total, found.macs, found.bias_adds) == (cost.parameters, cost.macs, cost.bias_adds)
    assert found.flops == 2 * cost.macs
    assert not found.uncounted


@pytest.mark.parametrize("fast_path", [True, False])
def test_a_transformer_encoder_is_not_hidden_by_its_fast_path(fast_path: bool) -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        layer = lambda: nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)  # noqa: E731
        found = count(lambda: nn.TransformerEncoder(layer(), 2), torch.empty(3, 20, 64))
        assert torch.backends.mha.get_fastpath_enabled() is fast_path
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    one = (
        formulas.attention(64, 20, heads=4, batch=3)
        + formulas.feed_forward(64, 128, rows=60)
        + formulas.normalisation(64).times(2)
    )
    cost = one.times(2)
    assert (found.parameters.total, found.macs, found.bias_adds) == (cost.parameters, cost.macs, cost.bias_adds)


class Functional(nn.Module):
    """Arithmetic without modules."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 6))
        self.kernel = nn.Parameter(torch.empty(4, 2, 3, 3))

    def forward(self, x: torch.Tensor, image: torch.Tensor) -> Any:
        a = F.linear(x, self.weight)  # [5, 8]
        b = a @ self.weight  # [5, 6]
        c = torch.einsum("ij,kj->ik", b, x)  # [5, 5]
        return c, F.conv2d(image, self.kernel)


def test_functional_calls_count() -> None:
    found = count(Functional, torch.empty(5, 6), torch.empty(1, 2, 8, 8))
    assert found.macs == 5 * 6 * 8 + 5 * 8 * 6 + 5 * 6 * 5 + 4 * 2 * 9 * 36


class Shared(nn.Module):
    """One layer under two names, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = self.first
        self.table = nn.Embedding(100, 16)
        self.head = nn.Linear(16, 100, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(self.table(tokens))))


def test_shared_modules_and_tied_weights_are_counted_once_and_work_each_time() -> None:
    found = count(Shared, torch.zeros(7, dtype=torch.int64))
    assert found.parameters.total == 16 * 16 + 16 + 1600
    assert found.macs == 7 * (2 * 256 + 1600)
    assert found.parameters.tied == {"head.weight": "table.weight"}
    assert found.parts[0].parameters == found.parameters.total


class Branching(nn.Module):
    """A branch that depends on a shape, and a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(x.shape[0]):
            x = self.layer(x)
        return x if x.shape[1] > 3 else self.layer(x)


def test_control_flow_over_shapes_is_followed() -> None:
    assert count(Branching, torch.empty(3, 4)).macs == 3 * 3 * 16


def test_a_complex_product_is_four_real_ones() -> None:
    class Product(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a @ b

    complex_ones = torch.empty(3, 4, dtype=torch.complex64), torch.empty(4, 5, dtype=torch.complex64)
    assert count(Product, *complex_ones).macs == 4 * 3 * 4 * 5


def test_a_complex_convolution_is_three_real_ones_as_pytorch_computes_it() -> None:
    found = count(lambda: nn.Conv2d(4, 8, 3, bias=False, dtype=torch.complex64), torch.empty(1, 4, 8, 8).cfloat())
    assert found.macs == 3 * formulas.convolution(4, 8, (3, 3), (6, 6), bias=False).macs


def test_a_complex_layer_adds_complex_biases() -> None:
    found = count(lambda: nn.Linear(6, 5, dtype=torch.complex64), torch.empty(3, 6, dtype=torch.complex64))
    assert (found.macs, found.bias_adds) == (4 * 3 * 6 * 5, 2 * 3 * 5)


def test_fourier_transforms_count_by_their_usual_estimate() -> None:
    class Transform(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.fft2(x)

    points = 8 * 16
    found = count(Transform, torch.empty(3, 8, 16, dtype=torch.complex64))
    assert found.other_flops == 3 * 5 * points * 7
    assert not found.uncounted


@pytest.mark.parametrize("ones", [False, True])
def test_a_triangular_system_is_solved_by_substitution(ones: bool) -> None:
    class Solve(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.linalg.solve_triangular(x, y, upper=False, unitriangular=ones)

    batch, size, columns = 3, 8, 5
    found = count(Solve, torch.empty(batch, size, size), torch.empty(batch, size, columns))
    assert found.macs == batch * columns * sum(range(size))  # unknown i needs all before it
    assert found.other_flops == (0 if ones else batch * columns * size)
    assert not found.uncounted


@pytest.mark.parametrize(
    ("kind", "axes", "terms"),
    [("nearest", 2, 0), ("linear", 1, 2), ("bilinear", 2, 4), ("bicubic", 2, 16), ("trilinear", 3, 8)],
)
def test_interpolation_is_a_weighted_sum(kind: str, axes: int, terms: int) -> None:
    found = count(lambda: nn.Upsample(scale_factor=2, mode=kind), torch.empty(1, 3, *[4] * axes))
    assert found.other_flops == 3 * 8**axes * max(2 * terms - 1, 0)
    assert not found.uncounted


def test_nested_inputs_and_outputs_are_followed_and_named() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, batch: dict[str, Any], scale: float = 1.0) -> dict[str, Any]:
            return {"out": [self.layer(batch["image"]["pixels"]), (self.layer(batch["boxes"][1]),)], "scale": scale}

    batch = {"image": {"pixels": torch.empty(2, 4)}, "boxes": (torch.empty(1), torch.empty(3, 4))}
    module, mode = fake_module(Nested)
    for train in (False, True):
        found = profile_module(module, (batch,), {"scale": 2.0}, mode=mode, train=train)
        assert found.macs == 5 * 16 * (2 if train else 1)
        assert found.inputs == [[2, 4], [1], [3, 4]]
        assert found.input_names == ["batch['image']['pixels']", "batch['boxes'][0]", "batch['boxes'][1]"]


def test_a_weight_tied_across_modules_of_different_kinds_counts_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(8, 4, bias=False)
            self.decode = nn.Linear(4, 8, bias=False)
            self.decode.weight = nn.Parameter(torch.empty(8, 4))
            self.layers = nn.ModuleList([self.encode, nn.Sequential(self.encode)])
            self.alias = self.layers

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.decode(self.alias[1](x)) @ self.encode.weight.T

    found = count(Tied, torch.empty(5, 8))
    assert found.parameters.total == 2 * 32
    assert found.macs == 5 * 3 * 32
    assert sum(part.macs for part in found.parts if part.path == "") == found.macs


def test_while_loops_and_recursion_over_shapes_are_followed() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv1d(1, 1, 2, stride=2, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            while x.shape[-1] > 1:
                x = self.layer(x)
            return x

    assert count(Halves, torch.empty(1, 1, 32)).macs == (16 + 8 + 4 + 2 + 1) * 2


@pytest.mark.parametrize("tokens", [64, 100])
def test_fused_attention_counts_as_much_as_written_out(tokens: int) -> None:
    class Fused(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    class Written(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v

    shapes = [torch.empty(2, 4, tokens, 32) for _ in range(3)]
    assert count(Fused, *shapes).macs == count(Written, *shapes).macs == 2 * 2 * 4 * tokens * tokens * 32


def test_backward_costs_twice_the_forward() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 64, bias=False), nn.ReLU(), nn.Linear(64, 8, bias=False))

    x = torch.empty(10, 32)
    once, trained = count(build, x).macs, count(build, x, train=True).macs
    assert trained == 3 * once - 10 * 32 * 64  # nobody asks for the gradient of the input


def test_gradients_belong_to_the_modules_that_they_are_of() -> None:
    build = lambda: nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))  # noqa: E731
    x = torch.empty(10, 32)
    once, trained = count(build, x), count(build, x, train=True)
    factors = [after.macs / before.macs for before, after in zip(once.parts, trained.parts, strict=True) if before.macs]
    assert factors[1:] == [2, 3]  # nobody asks for the gradient of the input
    assert trained.parts[0].macs == trained.macs
    assert {operator.name for operator in trained.operators if operator.path == "1"} == {"gelu", "gelu_backward"}
    forward = [operator for operator in trained.operators if operator.phase == "forward" and operator.path]
    assert sum(operator.work.macs for operator in forward if operator.work) == once.macs


def test_constructors_that_look_at_numbers_are_built_for_real() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(int(torch.ones(3).sum().item())))
            self.layers[1].weight = self.layers[0].weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    found = count(Looks, torch.empty(2, 4))
    assert found.macs == 3 * 2 * 16
    assert found.parameters.total == 2 * 16 + 3 * 4  # tied weights stay tied


def test_live_bytes_rise_and_fall() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(256, 1024, bias=False), nn.ReLU(), nn.Linear(1024, 16, bias=False))

    module, mode = fake_module(build)
    run = trace(module, (torch.empty(64, 256),), mode=mode)
    weights = 4 * (256 * 1024 + 1024 * 16)
    assert run.static_bytes == weights
    # The hidden layer before and after its activation is alive at once, beside weights and input.
    assert run.peak_bytes == weights + 4 * 64 * (256 + 2 * 1024)
    assert run.operators[-1].live_bytes <= weights + 4 * 64 * (256 + 1024 + 16)


def test_inputs_that_do_not_fit_name_the_layer() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(9, 2))

    with pytest.raises(ModelError, match="layer '2'"):
        count(build, torch.empty(1, 4))


def test_a_run_that_depends_on_numbers_is_refused() -> None:
    class Depends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) if x.sum().item() > 0 else x

    with pytest.raises(ModelError, match="depends on numbers"):
        count(Depends, torch.empty(1, 4))


def test_the_work_of_parts_adds_up() -> None:
    found = count(lambda: nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4), nn.ReLU())), torch.empty(3, 8))
    parts = {part.path: part for part in found.parts}
    assert parts[""].macs == found.macs == parts["0"].macs + parts["1"].macs
    assert parts["1"].macs == parts["1.0"].macs == 3 * 32
    assert parts["1.1"].other_flops == 12


def test_a_real_module_keeps_its_numbers() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found = profile_module(module, (torch.ones(2, 4),))
    assert found.macs == 2 * 16
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert torch.isfinite(module(torch.ones(2, 4))).all()


@pytest.mark.parametrize("train", [False, True])
def test_additions_are_the_macs_less_the_first_of_each_sum(train: bool) -> None:
    rows, inputs, outputs = 5, 8, 3
    found = count(lambda: nn.Sequential(nn.Linear(inputs, outputs)), torch.empty(rows, inputs), train=train)
    forward = rows * outputs * (inputs - 1) + rows * outputs  # and the bias
    weights = outputs * inputs * (rows - 1) if train else 0
    assert found.additions == forward + weights


def test_additions_of_attention_count_scores_and_results() -> None:
    class Fused(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    tokens, width = 10, 16
    found = count(Fused, *[torch.empty(1, 1, tokens, width) for _ in range(3)])
    assert found.additions == tokens * tokens * (width - 1) + tokens * width * (tokens - 1)


class OldFake(FakeTensorMode):
    """A mode that knows grouped products of BF16 alone, as PyTorch 2.11 does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            raise RuntimeError(f"Expected inputs of BF16 type but got mat_a.dtype={args[0].dtype}")
        return super().__torch_dispatch__(func, types, args, kwargs)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 16, 32))

    def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return torch._grouped_mm(x, self.weight, offs=ends)


@pytest.mark.parametrize("train", [False, True])
def test_grouped_products_are_followed_where_pytorch_refuses_their_format(train: bool) -> None:
    inputs = (torch.empty(24, 16), torch.empty(4, dtype=torch.int32))
    new, old = (
        profile_module(Experts(), inputs, mode=mode(allow_non_fake_inputs=True), train=train)
        for mode in (FakeTensorMode, OldFake)
    )
    assert (old.macs, old.bytes_moved) == (new.macs, new.bytes_moved)
    assert old.macs == 24 * 16 * 32 * (2 if train else 1)  # nobody asks for the gradient of the input


def test_grouped_products_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="do not fit"):
        profile_module(
            Experts(),
            (torch.empty(24, 17), torch.empty(4, dtype=torch.int32)),
            mode=OldFake(allow_non_fake_inputs=True),
        )


def test_a_sum_of_products_of_a_batch_and_views_in_place_are_known() -> None:
    class Sums(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.addbmm(torch.zeros(4, 5), x, y).transpose_(0, 1).unsqueeze_(0).squeeze_(0)

    found = profile_module(Sums(), (torch.empty(3, 4, 2), torch.empty(3, 2, 5)))
    assert (found.macs, found.bias_adds, found.uncounted) == (3 * 4 * 2 * 5, 20, {})
