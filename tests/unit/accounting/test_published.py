"""Counts against published ones, from architectures and configurations alone: no weights, and no table is read to answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
import transformers
from torchvision.models import get_model_weights, list_models

from narrowcast.accounting.profile import profile_module
from narrowcast.accounting.trace import fake_module

NAMES = list_models(module=torchvision.models)
QUICK = [
    "resnet18",
    "vgg11",
    "mobilenet_v3_small",
    "squeezenet1_1",
    "shufflenet_v2_x1_0",
    "regnet_y_400mf",
    "vit_b_16",
    "convnext_tiny",
]


def _check(name: str) -> None:
    for entry in get_model_weights(name):
        side = entry.transforms().crop_size[0]
        options: dict[str, Any] = {"image_size": side} if name.startswith("vit") else {}
        if name in ("googlenet", "inception_v3"):
            options = {"init_weights": False, "aux_logits": True}
        module, mode = fake_module(lambda o=options: getattr(torchvision.models, name)(weights=None, **o))
        found = profile_module(module, (torch.empty(1, 3, side, side),), mode=mode)
        parameters = found.parameters.total
        if name == "googlenet":  # its table leaves the heads that only training uses out
            parameters -= sum(part.parameters for part in found.parts if part.path in ("aux1", "aux2"))
        assert parameters == entry.meta["num_params"], entry
        assert found.macs / 1e9 == pytest.approx(entry.meta["_ops"], abs=1e-3), entry
        assert not found.uncounted


@pytest.mark.parametrize("name", QUICK)
def test_torchvision_s_table(name: str) -> None:
    _check(name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in NAMES if name not in QUICK])
def test_the_rest_of_torchvision_s_table(name: str) -> None:
    _check(name)


LLAMA_3 = {"vocab_size": 128_256, "num_key_value_heads": 8, "intermediate_size": 14_336}
LLAMA_3_70B = LLAMA_3 | {
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


def _language_model(kind: str, options: dict[str, Any], tokens: int) -> Any:
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")
    module, mode = fake_module(lambda: model(config))
    return profile_module(module, (torch.zeros(1, tokens, dtype=torch.int64),), mode=mode)


@pytest.mark.parametrize(
    ("kind", "options", "parameters"),
    [
        ("GPT2", {}, 124_439_808),
        ("Llama", {}, 6_738_415_616),
        ("Llama", LLAMA_3, 8_030_261_248),
        ("Llama", LLAMA_3_70B, 70_553_706_496),
    ],
)
def test_parameters_of_language_models(kind: str, options: dict[str, Any], parameters: int) -> None:
    assert _language_model(kind, options, 16).parameters.total == parameters


def test_flops_of_llama_2_7b() -> None:
    found = _language_model("Llama", {}, 2048)
    assert found.flops == pytest.approx(2.926161e13, rel=1e-6)
    assert not found.uncounted


def test_parameters_of_mixtral_in_all_and_met_by_a_token() -> None:
    found = _language_model("Mixtral", {}, 64)
    assert found.parameters.total == 46_702_792_704
    assert found.parameters.active == 12_879_925_248


def test_gpt_2_by_its_closed_form() -> None:
    tokens, width, layers, vocabulary = 128, 768, 12, 50_257
    found = _language_model("GPT2", {}, tokens)
    per_layer = tokens * 12 * width * width + 2 * tokens * tokens * width
    assert found.macs == layers * per_layer + tokens * width * vocabulary
    assert list(found.parameters.tied.values()) == ["transformer.wte.weight"]
