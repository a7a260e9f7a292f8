"""Attention under both conventions: all pairs, and those that the mask shows, whatever way the model spells it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from narrowcast.accounting import formulas
from narrowcast.accounting.building import fake_module
from narrowcast.accounting.profile import AttentionCost, profile_module

TOKENS = 24
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 50,
    "pad_token_id": 0,
}
LATENT = {"kv_lora_rank": 12, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
CAUSAL = TOKENS * (TOKENS + 1) // 2


def _pairs(window: int) -> int:
    """Pairs that a causal window shows, one by one."""
    distance = np.arange(TOKENS)[:, None] - np.arange(TOKENS)
    return int(((distance >= 0) & (distance < window)).sum())


def _language_model(kind: str, implementation: str, options: dict[str, Any], **inputs: Any) -> AttentionCost:
    config = getattr(transformers, f"{kind}Config")(**options)
    config._attn_implementation = implementation
    auto = transformers.AutoModel if kind == "Bert" else transformers.AutoModelForCausalLM
    module, mode = fake_module(lambda: auto.from_config(config, attn_implementation=implementation))
    return profile_module(module, (torch.zeros(1, TOKENS, dtype=torch.int64),), inputs, mode=mode).attention


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("kind", "options", "shown"),
    [
        ("Llama", SMALL | {"num_key_value_heads": 2}, [CAUSAL, CAUSAL]),
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50}, [CAUSAL, CAUSAL]),
        ("Mistral", SMALL | {"num_key_value_heads": 2, "sliding_window": 5}, [_pairs(5), _pairs(5)]),
        ("Bert", SMALL, [TOKENS**2, TOKENS**2]),
    ],
)
def test_masks_of_language_models(kind: str, implementation: str, options: dict[str, Any], shown: list[int]) -> None:
    found = _language_model(kind, implementation, options)
    per_pair = 2 * 32
    assert found.calls == 2
    assert found.macs == 2 * TOKENS**2 * per_pair
    assert found.causal_macs == sum(shown) * per_pair
    assert found.masked == sum(pairs < TOKENS**2 for pairs in shown)
    assert found.unknown == 0


def test_windows_in_every_other_layer() -> None:
    options = SMALL | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5}
    assert _language_model("Gemma2", "eager", options).causal_macs == (_pairs(5) + CAUSAL) * 2 * 32


def test_sinks_beside_the_scores_are_no_pairs() -> None:
    options = SMALL | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "num_local_experts": 2}
    found = _language_model("GptOss", "eager", options | {"num_experts_per_tok": 1})
    assert (found.macs, found.causal_macs) == (2 * TOKENS**2 * 64, (_pairs(5) + CAUSAL) * 64)


@pytest.mark.parametrize("flag", [True, False], ids=["weights wanted", "fused"])
def test_multi_head_attention_of_pytorch(flag: bool) -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            return self.attention(x, x, x, attn_mask=mask, need_weights=flag)[0]

    found = profile_module(Causal(), (torch.empty(2, TOKENS, 32),)).attention
    assert (found.calls, found.macs, found.causal_macs) == (1, 2 * TOKENS**2 * 64, 2 * CAUSAL * 64)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_latent_attention_has_wider_keys_than_values(implementation: str) -> None:
    options = SMALL | LATENT | {"first_k_dense_replace": 2, "n_routed_experts": 4, "num_key_value_heads": 4}
    found = _language_model("DeepseekV3", implementation, options)
    per_pair = 4 * (12 + 8)
    assert (found.macs, found.causal_macs) == (2 * TOKENS**2 * per_pair, 2 * CAUSAL * per_pair)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_is_unknown_and_hides_nothing(implementation: str) -> None:
    padding = torch.ones(1, TOKENS, dtype=torch.int64)
    found = _language_model("Llama", implementation, SMALL, attention_mask=padding)
    assert found.unknown == found.calls == 2
    assert found.causal_macs == found.macs


def test_the_closed_form_is_the_same_for_both_conventions() -> None:
    found = _language_model("Llama", "sdpa", SMALL)
    dense, causal = (formulas.attention(32, TOKENS, heads=4, causal=causal).macs for causal in (False, True))
    assert found.hidden_macs == 2 * (dense - causal)


class Attention(nn.Module):
    """One head, by the function that it is given."""

    def __init__(self, compute: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return self.compute(query, key, value)


def _triangle(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()


def _blocks(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return torch.arange(query.shape[-2])[:, None] // 4 == torch.arange(key.shape[-2]) // 4


def _filled(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    scores = (query @ key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
    return F.dropout(scores.masked_fill(~_triangle(query, key), float("-inf")).softmax(-1), 0.1, False) @ value


def _chosen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", query, key)
    scores = torch.where(_triangle(query, key), scores, torch.finfo(scores.dtype).min)
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), value)


def _added(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(query.shape[-2], key.shape[-2]).masked_fill(~_triangle(query, key), -1e9)
    scores = torch.baddbmm(mask, query.flatten(0, 1), key.flatten(0, 1).mT)
    return scores.softmax(-1).bmm(value.flatten(0, 1))


def _in_place(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    scores = query @ key.mT
    scores += torch.full((query.shape[-2], key.shape[-2]), float("-inf")).triu_(1)
    return scores.float().softmax(-1).to(value.dtype) @ value


def _at_random(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    shown = torch.rand_like(_triangle(query, key).float()) > 0.5
    return F.scaled_dot_product_attention(query, key, value, attn_mask=shown)


def _relative(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    distance = torch.arange(query.shape[-2])[:, None] - torch.arange(key.shape[-2])
    return (query @ key.mT - 0.5 * distance.abs()).softmax(-1) @ value


SPELLINGS: dict[str, tuple[Callable[..., torch.Tensor], int]] = {
    "flag": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), CAUSAL),
    "boolean mask": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=_triangle(q, k)), CAUSAL),
    "blocks": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=_blocks(q, k)), TOKENS * 4),
    "no mask": (F.scaled_dot_product_attention, TOKENS**2),
    "masked_fill": (_filled, CAUSAL),
    "where": (_chosen, CAUSAL),
    "added by the product": (_added, CAUSAL),
    "in place": (_in_place, CAUSAL),
    "relative positions": (_relative, TOKENS**2),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_attention(spelling: str) -> None:
    compute, shown = SPELLINGS[spelling]
    tensors = tuple(torch.empty(2, 3, TOKENS, 16) for _ in range(3))
    found = profile_module(Attention(compute), tensors).attention
    assert (found.calls, found.unknown) == (1, 0)
    assert found.macs == 2 * 3 * TOKENS**2 * 32
    assert found.causal_macs == 2 * 3 * shown * 32


def test_a_random_mask_is_unknown() -> None:
    found = profile_module(Attention(_at_random), tuple(torch.empty(1, 1, TOKENS, 16) for _ in range(3))).attention
    assert (found.unknown, found.causal_macs) == (1, found.macs)


@pytest.mark.parametrize(("queries", "keys"), [(5, 9), (9, 5)])
def test_a_flag_is_aligned_at_the_first_query_and_key(queries: int, keys: int) -> None:
    tensors = torch.empty(1, 1, queries, 16), torch.empty(1, 1, keys, 16), torch.empty(1, 1, keys, 16)
    found = profile_module(Attention(SPELLINGS["flag"][0]), tensors).attention
    assert found.causal_macs == int(np.tri(queries, keys).sum()) * 32


def test_cross_attention_is_dense_and_a_decoder_s_own_is_not() -> None:
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=50)
    module, mode = fake_module(lambda: transformers.T5Model(config))
    source, target = torch.zeros(1, 11, dtype=torch.int64), torch.zeros(1, 7, dtype=torch.int64)
    found = profile_module(module, (), {"input_ids": source, "decoder_input_ids": target}, mode=mode).attention
    assert found.calls == 3
    assert found.macs == (11 * 11 + 7 * 7 + 7 * 11) * 64


def test_softmax_elsewhere_is_no_attention() -> None:
    module = nn.Sequential(nn.Linear(8, 4), nn.Softmax(-1), nn.Linear(4, 3))
    assert profile_module(module, (torch.empty(5, 8),)).attention.calls == 0


def test_masks_are_followed_without_keeping_tensors_alive() -> None:
    """A mask's numbers live beside the run: the bytes of the run are those of a run without them."""

    class Masks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                mask = torch.ones(512, 512, dtype=torch.bool).tril()
                x = x + mask[:1, : x.shape[1]]
                del mask
            return x

    found = profile_module(Masks(), (torch.empty(1, 64),))
    assert found.peak_bytes < 2 * 512 * 512 + 10 * 4 * 64
