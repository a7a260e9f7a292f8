"""The cache of keys and values: against the tensors that transformers caches, and against published sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from narrowcast.accounting.kv_cache import CachedLayer, CacheFormat, KVCache, kv_cache
from narrowcast.errors import FormatError, ModelError

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 50,
    "pad_token_id": 0,
}
LATENT = {"kv_lora_rank": 12, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_group": 1, "topk_group": 1}

#: Small models of the same make as the ones that people run.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "multi-head": ("Llama", SMALL),
    "grouped-query": ("Llama", SMALL | {"num_key_value_heads": 2}),
    "grouped-query, wide heads": ("Qwen3", SMALL | {"num_key_value_heads": 2, "head_dim": 24}),
    "window": ("Mistral", SMALL | {"num_key_value_heads": 2, "sliding_window": 6}),
    "window in every other layer": ("Gemma2", SMALL | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6}),
    "window in five of six layers": (
        "Gemma3Text",
        SMALL | {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 6, "num_hidden_layers": 7},
    ),
    "multi-query": ("Falcon", SMALL | {"multi_query": True, "new_decoder_architecture": False}),
    "gpt-2": ("GPT2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 50}),
    "experts": ("Mixtral", SMALL | {"num_key_value_heads": 2, "num_local_experts": 4}),
    "latent, v2": ("DeepseekV2", SMALL | LATENT | EXPERTS),
    "latent, v3": ("DeepseekV3", SMALL | LATENT | EXPERTS | {"num_key_value_heads": 4}),
}


def _model(name: str) -> Any:
    kind, options = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**options)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def _tensor_bytes(cache: Any) -> int:
    layers = [layer for layer in cache.layers if layer.is_initialized]
    return sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in (layer.keys, layer.values))


@pytest.mark.parametrize("name", MODELS)
def test_bytes_equal_the_tensors_that_transformers_caches(name: str) -> None:
    model = _model(name)
    counted = kv_cache(model.config, format="fp32")
    for tokens, batch in ((4, 1), (11, 3)):
        cache = transformers.StaticCache(model.config, max_cache_len=tokens)
        with torch.no_grad():
            model(torch.ones(batch, tokens, dtype=torch.int64), past_key_values=cache)
        assert counted.bytes(tokens, batch) == _tensor_bytes(cache)


def test_cross_attention_keeps_the_source() -> None:
    options = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
    config = transformers.T5Config(**options, vocab_size=50)
    model = transformers.T5ForConditionalGeneration(config).eval()
    source, target = torch.ones(2, 9, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)
    with torch.no_grad():
        cache = model(source, decoder_input_ids=target, use_cache=True).past_key_values
    found = _tensor_bytes(cache.self_attention_cache) + _tensor_bytes(cache.cross_attention_cache)
    assert kv_cache(config, format="fp32").bytes(5, 2, source_tokens=9) == found


@pytest.mark.parametrize(
    ("kind", "options", "numbers"),
    [
        ("Llama", {}, 2 * 32 * 4096),
        ("Llama", {"num_key_value_heads": 8, "intermediate_size": 14_336}, 2 * 32 * 8 * 128),
        (
            "Llama",
            {"num_key_value_heads": 8, "num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64},
            2 * 80 * 8 * 128,
        ),
        ("Mistral", {}, 2 * 32 * 8 * 128),
        ("Mixtral", {}, 2 * 32 * 8 * 128),
        ("Falcon", {"hidden_size": 4544, "num_attention_heads": 71}, 2 * 32 * 64),
        (
            "Falcon",
            {
                "hidden_size": 8192,
                "num_attention_heads": 128,
                "num_hidden_layers": 60,
                "new_decoder_architecture": True,
                "num_kv_heads": 8,
            },
            2 * 60 * 8 * 64,
        ),
        ("GPT2", {}, 2 * 12 * 768),
        ("DeepseekV2", {"num_hidden_layers": 60}, 60 * (512 + 64)),
        ("DeepseekV3", {}, 61 * (512 + 64)),
    ],
)
def test_numbers_for_each_token_of_models_in_their_published_sizes(
    kind: str, options: dict[str, Any], numbers: int
) -> None:
    config = getattr(transformers, f"{kind}Config")(**options)
    assert kv_cache(config).per_token == 2 * numbers


def test_a_window_ends_the_growth() -> None:
    mistral = kv_cache(transformers.MistralConfig(sliding_window=4096))
    assert mistral.bytes(4096) == mistral.bytes(100_000) == 4096 * mistral.per_token
    gemma = kv_cache(transformers.Gemma2Config(num_hidden_layers=26))
    assert gemma.bytes(8192) == (4096 + 8192) * gemma.per_token // 2


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (CacheFormat("fp16"), 256),
        (CacheFormat("e4m3fn"), 128),
        (CacheFormat("int8", group=128), 128 + 2),
        (CacheFormat("int4", group=32, zero_point=True), 64 + 4 * 2 + 2),
        (CacheFormat("int4", group=64, scale="fp32"), 64 + 2 * 4),
        (CacheFormat("mxfp8_e4m3"), 128 + 4),
        (CacheFormat("nvfp4"), 64 + 8),
        (CacheFormat("nf4", group=64), 64 + 4),
    ],
)
def test_formats_bring_their_scales(stored: CacheFormat, expected: int) -> None:
    assert stored.vector_bytes(128) == expected
    assert KVCache.uniform(10, heads=2, width=128, format=stored).bytes(7, 3) == 10 * 2 * 2 * 7 * 3 * expected


def test_pages_round_up() -> None:
    cache = KVCache.uniform(2, heads=1, width=64, window=40, page=16)
    assert [cache.bytes(tokens) // cache.per_token for tokens in (1, 16, 17, 40, 1000)] == [16, 16, 32, 48, 48]


def test_sequences_that_fit() -> None:
    llama = kv_cache(transformers.LlamaConfig())
    assert llama.sequences(4096, 80 * 10**9) == 80 * 10**9 // (4096 * 524_288) == 37


def test_layers_that_share_or_keep_a_state_of_fixed_size_keep_nothing() -> None:
    sharing = transformers.Gemma3nTextConfig()
    assert len(kv_cache(sharing).layers) == sharing.num_hidden_layers - sharing.num_kv_shared_layers
    hybrid = transformers.Qwen3NextConfig()
    assert len(kv_cache(hybrid).layers) == hybrid.layer_types.count("full_attention") < hybrid.num_hidden_layers


def test_layers_by_numbers() -> None:
    assert CachedLayer.of_heads(2, 192, values=128).vectors == (192, 192, 128, 128)
    assert CachedLayer.latent(512, 64).kept(100) == 100


def test_what_cannot_be_used_is_said() -> None:
    with pytest.raises(FormatError, match="fp7"):
        kv_cache(transformers.LlamaConfig(), format="fp7")
    with pytest.raises(FormatError, match="group"):
        CacheFormat("mxfp4", group=16)
    with pytest.raises(FormatError, match="group"):
        CacheFormat("int4", group=-1)
    with pytest.raises(FormatError, match="scales"):
        CacheFormat("int4", group=32, scale="mxfp4")
    with pytest.raises(ModelError, match="layers"):
        kv_cache(transformers.ResNetConfig())
    with pytest.raises(ModelError, match="page"):
        KVCache((), page=0)


def test_numbers_that_mean_nothing_are_refused() -> None:
    cache = KVCache.uniform(2, heads=1, width=64)
    for call in (lambda: cache.bytes(-1), lambda: cache.bytes(5, -2), lambda: cache.sequences(0, 1 << 30)):
        with pytest.raises(ModelError, match=r"= (-1|-2|0)"):
            call()
