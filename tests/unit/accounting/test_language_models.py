"""Language models by their configurations: published parameters and FLOPs, and the closed forms of their layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from narrowcast.accounting import formulas
from narrowcast.accounting.building import fake_module
from narrowcast.accounting.formulas import Cost
from narrowcast.accounting.profile import Profile, profile_module
from narrowcast.errors import ModelError

LLAMA_3 = {"vocab_size": 128_256, "num_key_value_heads": 8, "intermediate_size": 14_336}
LLAMA_3_70B = LLAMA_3 | {
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
DEEPSEEK_V2 = {
    "vocab_size": 102_400,
    "hidden_size": 5120,
    "intermediate_size": 12_288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
#: Qwen1.5-MoE-A2.7B; its 4 shared experts are one block of four times the width.
QWEN_MOE = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
}


def _profile(kind: str, options: dict[str, Any], tokens: int, experts: str | None = None, batch: int = 1) -> Profile:
    config = getattr(transformers, f"{kind}Config")(**options)
    if experts:
        config._experts_implementation = experts
    module, mode = fake_module(lambda: transformers.AutoModelForCausalLM.from_config(config))
    return profile_module(module, (torch.zeros(batch, tokens, dtype=torch.int64),), mode=mode)


@pytest.mark.parametrize(
    ("kind", "options", "parameters"),
    [
        ("GPT2", {}, 124_439_808),
        pytest.param("Llama", LLAMA_3, 8_030_261_248, marks=pytest.mark.exhaustive),
        ("Llama", LLAMA_3_70B, 70_553_706_496),
        pytest.param("Mistral", {}, 7_241_732_096, marks=pytest.mark.exhaustive),
    ],
)
def test_published_parameters(kind: str, options: dict[str, Any], parameters: int) -> None:
    assert _profile(kind, options, 16).parameters.total == parameters


def test_parameters_of_mixtral_in_all_and_met_by_a_token() -> None:
    found = _profile("Mixtral", {}, 16).parameters
    assert (found.total, found.active) == (46_702_792_704, 12_879_925_248)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("kind", "options", "total", "idle"),
    [
        ("Qwen2Moe", QWEN_MOE, 14_315_784_192, 24 * (60 - 4) * 3 * 2048 * 1408),
        ("DeepseekV2", DEEPSEEK_V2, 235_741_434_880, 59 * (160 - 6) * 3 * 5120 * 1536),
    ],
)
def test_parameters_of_many_experts_in_all_and_idle(kind: str, options: dict[str, Any], total: int, idle: int) -> None:
    found = _profile(kind, options, 16).parameters
    assert (found.total, found.total - found.active) == (total, idle)


def test_flops_of_llama_2_7b() -> None:
    found = _profile("Llama", {}, 2048)
    assert found.parameters.total == 6_738_415_616
    assert found.flops == pytest.approx(2.926161e13, rel=1e-6)
    assert found.attention.macs == 32 * 2 * 2048 * 2048 * 4096
    assert found.attention.causal_macs == 32 * 2 * (2048 * 2049 // 2) * 4096
    assert not found.uncounted


TOKENS, BATCH = 12, 2
ROWS = TOKENS * BATCH
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
}


def _decoder(attention: Cost, blocks: list[Cost], *, biased_norms: bool = False, tied: bool = False) -> Cost:
    """Return the cost of a decoder of width 64 with a vocabulary of 100: blocks of attention and what follows it."""
    norm = formulas.normalisation(64, bias=biased_norms)
    head = formulas.linear(64, 100, rows=ROWS, bias=False)
    total = norm + (Cost(0, head.macs) if tied else head) + formulas.embedding(100, 64)
    for block in blocks:
        total += norm.times(2) + attention + block
    return total


GATED = formulas.feed_forward(64, 96, rows=ROWS, gated=True, bias=False)
GROUPED = formulas.attention(64, TOKENS, heads=4, kv_heads=2, batch=BATCH, bias=False)
WIDE = formulas.attention(64, TOKENS, heads=4, kv_heads=2, head_width=24, batch=BATCH, bias=False)
LATENT = formulas.latent_attention(64, TOKENS, heads=4, rank=12, query_rank=16, head_widths=(8, 4, 8), batch=BATCH)
EXPERTS = formulas.mixture_of_experts(64, 32, experts=8, chosen=2, rows=ROWS)
GPT_2 = formulas.attention(64, TOKENS, heads=4, batch=BATCH)
SHARED = formulas.feed_forward(64, 48, rows=ROWS, gated=True, bias=False) + formulas.linear(
    64, 1, rows=ROWS, bias=False
)

MODELS: dict[str, tuple[str, dict[str, Any], Cost]] = {
    "llama": ("Llama", SMALL | {"num_key_value_heads": 2}, _decoder(GROUPED, [GATED] * 3)),
    "llama, tied": (
        "Llama",
        SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True},
        _decoder(GROUPED, [GATED] * 3, tied=True),
    ),
    "wide heads": (
        "Mistral",
        SMALL | {"num_key_value_heads": 2, "head_dim": 24, "sliding_window": 4},
        _decoder(WIDE, [GATED] * 3),
    ),
    "gpt-2": (
        "GPT2",
        {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 96, "vocab_size": 100, "n_positions": 30},
        _decoder(GPT_2, [formulas.feed_forward(64, 96, rows=ROWS)] * 3, biased_norms=True, tied=True)
        + formulas.embedding(30, 64),
    ),
    "experts": (
        "Mixtral",
        SMALL | {"intermediate_size": 32, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2},
        _decoder(GROUPED, [EXPERTS] * 3),
    ),
    "shared experts": (
        "Qwen2Moe",
        SMALL
        | {"num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"shared_expert_intermediate_size": 48, "qkv_bias": False},
        _decoder(GROUPED, [EXPERTS + SHARED] * 3),
    ),
    "latent attention, shared experts": (
        "DeepseekV2",
        SMALL
        | {"kv_lora_rank": 12, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
        | {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
        | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4},
        _decoder(LATENT, [GATED, *[EXPERTS + formulas.feed_forward(64, 32, rows=ROWS, gated=True, bias=False)] * 2]),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_cost_what_the_closed_forms_of_their_layers_say(name: str) -> None:
    kind, options, cost = MODELS[name]
    found = _profile(kind, options, TOKENS, batch=BATCH)
    assert (found.parameters.total, found.parameters.active) == (cost.parameters, cost.active_parameters)
    assert found.macs - _rotary(found) == cost.macs
    assert found.bias_adds == cost.bias_adds
    assert not found.uncounted


def _rotary(found: Profile) -> int:
    """Return the MACs of the angles of rotary positions, one product for the model, which closed forms leave out."""
    return sum(part.macs for part in found.parts if part.kind.endswith("RotaryEmbedding"))


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_experts_count_the_same_in_both_implementations(experts: str) -> None:
    kind, options, cost = MODELS["experts"]
    found = _profile(kind, options, TOKENS, experts, BATCH)
    assert (found.parameters.active, found.macs - _rotary(found)) == (cost.active_parameters, cost.macs)


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_biases_of_experts_are_biases_and_idle_with_them(experts: str) -> None:
    options = SMALL | {
        "intermediate_size": 32,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    found = _profile("GptOss", options, TOKENS, experts, BATCH)
    expert = formulas.feed_forward(64, 32, gated=True)
    assert found.parameters.total - found.parameters.active == 3 * 6 * expert.parameters
    projections = formulas.attention(64, TOKENS, heads=4, kv_heads=2, batch=BATCH).bias_adds
    assert found.bias_adds == 3 * (projections + ROWS * 8 + 2 * ROWS * expert.bias_adds)


def test_a_loop_over_experts_that_routing_decides_is_refused_with_its_layer() -> None:
    kind, options, _ = MODELS["experts"]
    with pytest.raises(ModelError, match=r"depends on numbers at layer 'model.layers.0.mlp.experts'"):
        _profile(kind, options, TOKENS, "eager")


def test_experts_that_every_token_meets_are_all_active() -> None:
    class Dense(nn.Module):
        """Every expert computes every token; weights of the router mix what they say."""

        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(16, 4, bias=False)
            self.experts = nn.Parameter(torch.empty(4, 16, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            shares = self.router(x).softmax(-1)
            return torch.einsum("te,eio,ti->to", shares, self.experts, x)

    module, mode = fake_module(Dense)
    found = profile_module(module, (torch.empty(5, 16),), mode=mode)
    assert found.parameters.active == found.parameters.total == 4 * 16 + 4 * 16 * 16


class _GatheredTwice(nn.Module):
    """Rows are repeated for each expert chosen, then sorted by expert."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        rows = x[torch.arange(2 * len(x), device=x.device) // 2]
        rows = rows[torch.randperm(len(rows), device=x.device)]
        ends = torch.linspace(0, len(rows), 9, device=x.device)[1:].to(torch.int32)
        return torch._grouped_mm(rows, self.weight, offs=ends)


def test_rows_that_are_gathered_twice_are_those_of_their_tokens() -> None:
    with torch.device("cpu"):
        found = profile_module(_GatheredTwice().bfloat16(), (torch.empty(32, 16, dtype=torch.bfloat16),))
    assert found.parameters.active == 2 * 16 * 16
