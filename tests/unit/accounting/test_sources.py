"""Where models come from: whole encoder-decoders, examples of one sample, and modules in half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from narrowcast.accounting.advice.whole import default_policy
from narrowcast.accounting.devices import device
from narrowcast.accounting.memory import memory, memory_of_module
from narrowcast.accounting.policies import own_policy
from narrowcast.accounting.profile import Profile, profile
from narrowcast.accounting.sources import Source, source
from narrowcast.errors import ModelError
from narrowcast.models.loaders import load_model

FUNCTIONS = """
import torch
from torch import nn

def alone():
    return nn.Linear(3, 5), torch.zeros(1, 3)

def half():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).half(), torch.zeros(1, 3, 8, 8)

def bfloat():
    return nn.Linear(8, 8).bfloat16(), torch.zeros(1, 8, dtype=torch.bfloat16)
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "source_functions.py").write_text(FUNCTIONS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return "py:source_functions"


def configured(folder: Path, config: Any, **given: Any) -> Profile:
    config.save_pretrained(folder)
    return profile(source(f"hf:{folder}", **given))


# Encoder and decoder --------------------------------------------------------------------------------------------------


def test_an_encoder_decoder_counts_both_sides(tmp_path: Path) -> None:
    width, inner, hidden, words, n = 32, 48, 64, 100, 10
    config = transformers.T5Config(
        vocab_size=words, d_model=width, d_kv=12, num_heads=4, d_ff=hidden, num_layers=2, num_decoder_layers=3
    )
    found = configured(tmp_path, config, tokens=n)
    assert dict(zip(found.input_names, found.inputs, strict=True)) == {"input_ids": [1, n], "decoder_input_ids": [1, n]}
    attention = 4 * n * width * inner + 2 * n * n * inner
    forward = 2 * n * width * hidden
    assert found.macs == 2 * (attention + forward) + 3 * (2 * attention + forward) + n * width * words
    assert found.attention.calls == 2 + 3 * 2


def test_speech_recognition_counts_its_encoder_on_a_whole_window(tmp_path: Path) -> None:
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2
    )
    found = configured(tmp_path, config, tokens=8, batch=2)
    assert found.parts[0].kind == "WhisperForConditionalGeneration"
    assert found.inputs == [[2, 80, 3000], [2, 8]]
    encoder = next(part for part in found.parts if part.path == "model.encoder")
    assert encoder.macs > found.macs / 2


def test_images_take_the_shape_of_their_configuration(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    assert configured(tmp_path, config, batch=3).inputs == [[3, 3, 32, 32]]


def test_a_pair_of_encoders_is_given_text_and_images(tmp_path: Path) -> None:
    width, wide, heads, layers, tokens, side, patch, shared = 64, 128, 4, 2, 32, 32, 8, 24
    own = {"hidden_size": width, "intermediate_size": wide, "num_hidden_layers": layers, "num_attention_heads": heads}
    text = own | {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    images = own | {"image_size": side, "patch_size": patch}
    config = transformers.CLIPConfig(projection_dim=shared, text_config=text, vision_config=images)
    found = configured(tmp_path, config, tokens=tokens, batch=3)
    patches = (side // patch) ** 2
    encoders = 3 * sum(
        layers * (n * (4 * width**2 + 2 * width * wide) + 2 * n * n * width) for n in (tokens, patches + 1)
    )
    embedded = 3 * (patches * 3 * patch**2 * width + 2 * width * shared)
    assert found.macs == encoders + embedded + 3 * 3 * shared  # each text with each image
    assert found.inputs[-1] == [3, 3, side, side]


def test_a_model_without_keys_and_values_takes_no_context(tmp_path: Path) -> None:
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=20, state_size=4)
    with pytest.raises(ModelError, match="keeps no keys and values"):
        configured(tmp_path, config, context=8)


def test_an_input_of_unknown_shape_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="takes input_values") as caught:
        configured(tmp_path, transformers.Wav2Vec2Config(num_hidden_layers=1))
    assert "--input input_values=" in caught.value.next_step


# A cache --------------------------------------------------------------------------------------------------------------


def test_a_context_counts_new_tokens_that_attend_to_a_cache(tmp_path: Path) -> None:
    width, hidden, words, past = 64, 96, 100, 40
    config = transformers.LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    layer = 2 * width * width + 2 * width * width // 2 + 3 * width * hidden
    for new in (1, 3):
        found = configured(tmp_path, config, context=past, tokens=new, batch=2)
        assert found.inputs == [[2, new]]
        assert found.macs == 2 * new * (2 * (layer + 2 * width * (past + new)) + width * words)


@pytest.mark.parametrize(
    ("reference", "given"),
    [("timm:resnet18", {}), ("hf:somewhere", {"inputs": ["1x8:int64"]})],
)
def test_a_context_is_for_language_models_alone(reference: str, given: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="context = 8"):
        source(reference, context=8, **given)


def test_an_encoder_decoder_takes_no_context(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="context = 8") as caught:
        configured(tmp_path, transformers.T5Config(num_layers=1), context=8)
    assert "decode alone" in caught.value.allowed


# One sample -----------------------------------------------------------------------------------------------------------


def test_an_example_of_one_sample_is_counted_and_not_exported(functions: str) -> None:
    assert profile(source(f"{functions}:alone")).macs == 15
    assert profile(source(f"{functions}:alone", batch=4)).macs == 60
    with pytest.raises(ModelError, match="has batch 1"):
        load_model(f"{functions}:alone")


# Half precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype", "own"), [("half", "float16", "fp16"), ("bfloat", "bfloat16", "bf16")])
def test_a_module_in_half_precision_is_counted_as_it_is(functions: str, name: str, dtype: str, own: str) -> None:
    origin = source(f"{functions}:{name}")
    found = profile(origin)
    assert found.parameters.dtype == dtype
    assert found.parameters.bytes == 2 * found.parameters.total
    assert own_policy(dtype).name == own
    assert isinstance(origin, Source)
    assert memory(origin, policy=own).weights >= found.parameters.bytes


@pytest.mark.parametrize("policy", ["fp32", "fp16-mixed", "int8-static"])
def test_a_policy_that_does_not_fit_the_module_is_refused(policy: str) -> None:
    with pytest.raises(ModelError, match="the module is in float16") as caught:
        memory_of_module(nn.Linear(8, 8).half(), (torch.zeros(1, 8),), policy=policy)
    assert caught.value.allowed == "fp16, fp16-master"


def test_advice_takes_the_modules_own_precision_where_the_device_has_it() -> None:
    assert default_policy(device("h100-sxm"), "bfloat16").name == "bf16"
    assert default_policy(device("t4"), "bfloat16").name == "fp32"  # it has no BF16
    assert default_policy(device("t4"), "").name == "fp32"
