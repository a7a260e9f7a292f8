"""FP8 products through torchao, emulated on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from narrowcast.errors import FormatError, ModelError
from narrowcast.training import Trainer, precision
from narrowcast.training.float8 import Float8

pytest.importorskip("torchao")
from torchao.float8.float8_linear import Float8Linear

EMULATED = Float8(emulate=True)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)
    )


def converted(model: nn.Module) -> set[str]:
    return {name for name, part in model.named_modules() if isinstance(part, Float8Linear)}


def prepared(float8: Float8 = EMULATED, **settings) -> nn.Module:
    return precision("fp8-mixed", float8=float8, **settings).prepare(network())


def test_the_first_and_the_last_layer_stay_as_they_are():
    assert converted(prepared()) == {"2", "4"}


def test_sizes_that_are_no_multiple_of_16_stay_as_they_are():
    model = prepared(Float8(keep_ends=False, emulate=True))
    assert converted(model) == {"2", "4"}


@pytest.mark.parametrize("format", ["bf16", "fp32"])
def test_an_override_keeps_a_layer_out(format):
    assert converted(prepared(overrides={"2": format})) == {"4"}


def test_an_override_may_ask_for_fp8_at_an_end():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 16))
    precision("fp8-mixed", float8=EMULATED, overrides={"0": "fp8"}).prepare(model)
    assert converted(model) == {"0", "2"}


def test_parameters_stay_the_same_objects():
    model = network()
    before = [id(one) for one in model.parameters()]
    precision("fp8-mixed", float8=EMULATED).prepare(model)
    assert [id(one) for one in model.parameters()] == before


def test_a_copy_of_a_converted_model_trains_as_it_is():
    copied = copy.deepcopy(prepared())
    precision("fp8-mixed", float8=EMULATED).prepare(copied)
    assert converted(copied) == {"2", "4"}


def test_a_model_without_such_layers_is_refused():
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 3))
    with pytest.raises(ModelError, match="no linear layer to convert among 2"):
        precision("fp8-mixed", float8=EMULATED).prepare(model)


@pytest.mark.parametrize(
    ("float8", "granularity", "gradients", "powers"),
    [
        (Float8(), "tensorwise", torch.float8_e5m2, False),
        (Float8(gradients="e4m3"), "tensorwise", torch.float8_e4m3fn, False),
        (Float8("rowwise"), "axiswise", torch.float8_e4m3fn, True),
        (Float8("rowwise", gradients="e5m2"), "axiswise", torch.float8_e5m2, True),
    ],
    ids=["tensorwise", "tensorwise-e4m3", "rowwise", "rowwise-e5m2"],
)
def test_scaling_and_formats_reach_torchao(float8, granularity, gradients, powers):
    model = prepared(Float8(float8.scaling, float8.gradients, emulate=True))
    config = model[2].config
    for cast in (config.cast_config_input, config.cast_config_weight, config.cast_config_grad_output):
        assert cast.scaling_granularity.value == granularity
    assert config.cast_config_input.target_dtype == config.cast_config_weight.target_dtype == torch.float8_e4m3fn
    assert config.cast_config_grad_output.target_dtype == gradients
    assert config.round_scales_to_power_of_2 == powers
    assert config.emulate


@pytest.mark.parametrize("settings", [{"scaling": "blockwise"}, {"gradients": "e3m4"}], ids=str)
def test_unknown_settings_are_refused(settings):
    with pytest.raises(FormatError, match="FP8"):
        Float8(**settings)


def losses(policy, steps: int = 60) -> list[float]:
    model = network()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 8, generator=generator)
    targets = inputs[:, :3].argmax(1)
    trainer = Trainer(model, torch.optim.AdamW(model.parameters(), lr=1e-2), cross_entropy, precision=policy)
    return [trainer.step((inputs, targets)).loss for _ in range(steps)]


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_it_trains_beside_fp32_but_not_with_its_numbers(scaling):
    exact = losses("fp32")
    ours = losses(precision("fp8-mixed", float8=Float8(scaling, emulate=True)))
    assert ours != exact
    assert ours[-1] < 0.35 * ours[0]
    assert ours[-1] == pytest.approx(exact[-1], abs=0.1)


def test_it_resumes_bit_for_bit():
    def trainer_of():
        model = network()
        policy = precision("fp8-mixed", float8=EMULATED)
        return Trainer(model, torch.optim.AdamW(model.parameters(), lr=1e-2), cross_entropy, precision=policy)

    batch = (torch.linspace(-1, 1, 128).reshape(16, 8), torch.arange(16) % 3)
    whole = trainer_of()
    for _ in range(3):
        whole.step(batch)
    saved = copy.deepcopy(whole.state_dict())
    expected = [whole.step(batch).loss for _ in range(3)]
    resumed = trainer_of()
    resumed.load_state_dict(saved)
    assert [resumed.step(batch).loss for _ in range(3)] == expected
