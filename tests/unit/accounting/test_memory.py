"""Predicted memory beside what PyTorch's CPU allocator hands out, and beside closed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from narrowcast.accounting.memory import PARTS, Memory, memory, memory_of_module
from narrowcast.accounting.policies import POLICIES
from narrowcast.errors import FormatError, ModelError

SECOND = "second step"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Given:
    """A model and its inputs."""

    def __init__(self, build: Callable[[], nn.Module], *inputs: torch.Tensor) -> None:
        self.name = "given"
        self.build = build
        self.examples = lambda: inputs
        self.named = dict


def mlp(width: int = 256, depth: int = 4) -> nn.Sequential:
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.GELU())))


def blocks(width: int = 128, depth: int = 4) -> nn.Sequential:
    return nn.Sequential(*(mlp(width, 2) for _ in range(depth)))


def find(source: Given, **setting: Any) -> Memory:
    return memory(source, **setting)


def train(build: Callable[[], nn.Module] = mlp, width: int = 256, rows: int = 64, **setting: Any) -> Memory:
    return find(Given(build, torch.empty(rows, width)), mode="train", **setting)


# Beside the allocator -------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(96, 128, 2, batch_first=True)
        self.head = nn.Linear(128, 50)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0])


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False),
        nn.BatchNorm2d(32),
        nn.Hardswish(),
        nn.Conv2d(32, 64, 1),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, 1, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (mlp, (64, 256)),
    "convolutions": (convolutions, (8, 3, 48, 48)),
    "encoder": (encoder, (4, 96, 64)),
    "recurrent": (Recurrent, (8, 24, 96)),
}


def allocated(build: Callable[[], nn.Module], x: torch.Tensor, *, trains: bool) -> int:
    """Return the most bytes that are allocated at a time during the second run."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        module, data = build().train(trains), x.clone()
        optimizer = torch.optim.AdamW(module.parameters()) if trains else None
        for step in range(2):
            if step:
                with record_function(SECOND):
                    pass
            with torch.set_grad_enabled(trains):
                out = module(data)
            if optimizer is not None:
                loss = out.float().sum()
                loss.backward()
                del loss
                optimizer.step()
                optimizer.zero_grad()
            del out
    total = peak = 0
    profiler: Any = run.profiler
    for event in sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
        elif event.name() == SECOND:
            peak = total
    return peak


@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_the_peak_is_what_the_allocator_sees(name: str, mode: str) -> None:
    build, shape = MODELS[name]
    x = torch.randn(shape)
    found = find(Given(build, x), mode=mode, loss=lambda out: out.float().sum())
    assert found.peak == pytest.approx(allocated(build, x, trains=mode == "train"), rel=0.1)


# Parts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", POLICIES)
def test_parts_add_up_to_the_peak(name: str, device: str) -> None:
    modes = ["infer", "train"] if POLICIES[name].trains else ["infer"]
    for mode in modes:
        found = find(
            Given(mlp, torch.empty(64, 256)),
            policy=name,
            mode=mode,
            device=device,
            kv_cache=1000,
            devices=4,
            sharding="zero2",
        )
        assert sum(found.parts.values()) == found.peak
        assert found.kv_cache == 1000
        assert max(size for size, _ in found.timeline) <= found.peak
        assert all(found.most[part] >= found.parts[part] for part in PARTS)


def test_parts_of_a_step_are_those_of_the_closed_forms() -> None:
    found = train()
    weights = 4 * (4 * 256 * 256 + 4 * 256)
    assert found.data == 4 * 64 * 256
    assert found.most["weights"] == weights
    assert found.most["gradients"] == weights
    assert found.most["optimizer_state"] == 2 * weights + 8 * 4  # a step count for each tensor
    # Each layer keeps its input, which is data or a result of GELU, and GELU its own: eight in all, the output
    # and the loss among them.
    assert found.most["activations"] == pytest.approx(8 * 4 * 64 * 256, rel=0.001)
    assert {phase for _, phase in found.timeline} == {"forward", "backward", "optimizer"}


def test_the_first_step_finds_no_states() -> None:
    found = train(rows=4096)  # activations are the most, so that the peak is in backward
    assert "(backward, " in found.when
    assert found.peak - found.first_peak == found.most["optimizer_state"]


def test_inference_keeps_nothing_for_backward() -> None:
    found = find(Given(mlp, torch.empty(64, 256)))
    assert found.most["activations"] == found.most["gradients"] == found.most["optimizer_state"] == 0
    assert found.temporary == 2 * 4 * 64 * 256  # what a layer reads and what it makes


def test_a_module_that_is_there_is_left_as_it_is() -> None:
    module = mlp().eval()
    before = [one.clone() for one in module.parameters()]
    found = memory_of_module(module, (torch.empty(64, 256),), mode="train")
    assert found.peak == train().peak
    assert not module.training
    assert all(torch.equal(one, was) and one.grad is None for one, was in zip(module.parameters(), before, strict=True))


def test_tied_weights_count_once() -> None:
    def tied() -> nn.Module:
        module: Any = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
        module[1].weight = module[0].weight
        return module

    assert train(tied).most["weights"] == 4 * (256 * 256 + 2 * 256)


# Policies -------------------------------------------------------------------------------------------------------------


def test_half_precision_halves_everything() -> None:
    full, half = train(optimizer="momentum"), train(optimizer="momentum", policy="bf16")
    for part in ("data", "weights", "gradients", "optimizer_state"):
        assert half.most[part] * 2 == full.most[part]


def test_autocast_keeps_fp32_beside_copies_that_live_from_forward_to_backward() -> None:
    mixed, full = train(policy="bf16-mixed"), train()
    bias = 4 * 4 * 256
    assert mixed.most["master"] == full.most["weights"]
    assert mixed.most["weights"] == full.most["weights"] // 2
    assert mixed.most["gradients"] == full.most["gradients"]
    assert mixed.most["activations"] < 0.6 * full.most["activations"] + bias


def test_a_master_policy_keeps_half_precision_weights_and_fp32_copies() -> None:
    found, full = train(policy="bf16-master"), train()
    assert found.most["weights"] * 2 == found.most["master"] == full.most["weights"]
    assert found.most["gradients"] * 2 == full.most["gradients"]
    assert found.most["optimizer_state"] == full.most["optimizer_state"]


def test_eight_bit_products_read_copies() -> None:
    eight, half = (find(Given(mlp, torch.empty(64, 256)), policy=f"{name}-mixed") for name in ("fp8", "bf16"))
    assert eight.workspace == 64 * 256 + 256 * 256
    assert half.workspace == 0


@pytest.mark.parametrize(
    ("name", "bits"), [("int8", 8 + 32 / 4096), ("int4", 4 + 16 / 128), ("nf4", 4.5), ("nf4-double", 4.127)]
)
def test_weight_only_formats_take_their_bits_and_scales(name: str, bits: float) -> None:
    build = lambda: nn.Sequential(nn.Embedding(100, 4096), nn.Linear(4096, 1024, bias=False), nn.LayerNorm(1024))  # noqa: E731
    found = find(Given(build, torch.zeros(2, 3, dtype=torch.int64)), policy=name)
    rest = 2 * (100 * 4096 + 2 * 1024)
    assert found.weights - rest == pytest.approx(4096 * 1024 * bits / 8, rel=1e-4)


def test_static_int8_stores_activations_in_one_byte_each_and_keeps_biases() -> None:
    build = lambda: nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 128))  # noqa: E731
    wide, narrow = (find(Given(build, torch.empty(64, 256)), policy=name) for name in ("fp32", "int8-static"))
    assert narrow.data == wide.data // 4 == 64 * 256
    assert narrow.temporary == wide.temporary // 4
    assert narrow.weights == 256 * 512 + 512 * 128 + 2 * 4 * (512 + 128)  # codes; a scale and a bias for each output
    assert narrow.workspace == 0
    with pytest.raises(ModelError, match="nobody trains in int8-static"):
        find(Given(build, torch.empty(64, 256)), policy="w8a8", mode="train")


def test_a_weight_that_an_embedding_shares_is_not_packed() -> None:
    def tied() -> nn.Module:
        module: Any = nn.Sequential(nn.Embedding(512, 64), nn.Linear(64, 512, bias=False))
        module[1].weight = module[0].weight
        return module

    assert find(Given(tied, torch.zeros(2, 3, dtype=torch.int64)), policy="nf4").weights == 2 * 512 * 64


# Optimizers -----------------------------------------------------------------------------------------------------------

WEIGHTS: list[tuple[int, ...]] = [(256, 256), (256,)] * 4
STATES: dict[str, Callable[[tuple[int, ...]], int]] = {
    "sgd": lambda shape: 0,
    "momentum": lambda shape: 4 * torch.Size(shape).numel(),
    "adam": lambda shape: 8 * torch.Size(shape).numel() + 4,
    "adamw": lambda shape: 8 * torch.Size(shape).numel() + 4,
    "adafactor": lambda shape: 4 * sum(shape) + 4,
    # A byte and a share of a scale for each element of two states; small tensors keep FP32.
    "adam8bit": lambda shape: (
        8 * sum(shape) if len(shape) == 1 else 2 * (torch.Size(shape).numel() + torch.Size(shape).numel() // 256 * 4)
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_states_of_optimizers(name: str) -> None:
    shared = 2 * 256 * 4 if name == "adam8bit" else 0
    assert train(optimizer=name).most["optimizer_state"] == sum(map(STATES[name], WEIGHTS)) + shared


def test_lists_of_tensors_take_more_for_a_moment() -> None:
    # PyTorch's foreach step makes the square roots of all second moments at once.
    one, all_at_once = (train(device=device) for device in ("cpu", "cuda"))
    assert one.timeline[-1][1] == "optimizer"
    steps = [max(size for size, phase in found.timeline if phase == "optimizer") for found in (one, all_at_once)]
    assert steps[1] - all_at_once.workspace - steps[0] >= 2 * 256 * 256 * 4


# What saves memory ----------------------------------------------------------------------------------------------------


def test_checkpointed_blocks_keep_only_their_inputs() -> None:
    plain, again = (train(blocks, width=128, rows=1024, checkpoint=checkpoint) for checkpoint in (False, True))
    tensor = 4 * 1024 * 128
    assert plain.most["activations"] == pytest.approx(16 * tensor, rel=0.01)
    assert again.most["activations"] == pytest.approx(4 * tensor, rel=0.01)  # between blocks, and the output
    assert again.peak < plain.peak
    names = len(again.timeline) - len(plain.timeline)
    assert names >= 12  # four operators of each block run again, but for the last, which nothing saved asks for


def test_a_pattern_says_what_is_checkpointed() -> None:
    every, half = (train(blocks, width=128, rows=1024, checkpoint=pattern) for pattern in ("?", "[01]"))
    plain = train(blocks, width=128, rows=1024)
    assert every.most["activations"] < half.most["activations"] < plain.most["activations"]


@pytest.mark.parametrize("policy", ["bf16-mixed", "fp32"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_checkpoints_run_again_in_the_same_precision(policy: str, device: str) -> None:
    plain, again = (
        train(blocks, width=128, rows=1024, checkpoint=checkpoint, policy=policy, device=device)
        for checkpoint in (False, True)
    )
    assert again.peak < plain.peak
    assert again.most["gradients"] == plain.most["gradients"]


def test_gradients_live_through_the_next_forward_when_they_accumulate() -> None:
    one, several = train(accumulate=1), train(accumulate=8)
    gradients = one.most["gradients"]
    assert one.moments["second micro 0 forward"] == several.moments["second micro 0 forward"]
    assert several.moments["second micro 1 forward"] - one.moments["second micro 0 forward"] == gradients


# Devices --------------------------------------------------------------------------------------------------------------


def states(found: Memory) -> int:
    return sum(found.most[part] for part in ("weights", "gradients", "master", "optimizer_state"))


def test_zero_divides_what_its_paper_divides() -> None:
    # Rajbhandari et al. 2020, figure 1: 2 + 2 + 12 bytes a parameter with Adam and FP32 master weights.
    numbers, counts, devices = 4 * 256 * 257, 8 * 4, 64
    found = {
        name: states(train(policy="bf16-master", devices=devices, sharding=name))
        for name in ("replicated", "zero1", "zero2", "zero3")
    }
    assert found["replicated"] == 16 * numbers + counts
    assert found["zero1"] == pytest.approx((4 + 12 / devices) * numbers, rel=1e-4)
    assert found["zero2"] == pytest.approx((2 + 14 / devices) * numbers, rel=1e-4)
    assert found["zero3"] == pytest.approx(16 / devices * numbers, rel=1e-4)


def test_what_communication_holds() -> None:
    gradients = train().most["gradients"]
    layer = 4 * 257 * 256
    held = {
        name: train(devices=2, sharding=name).communication
        for name in ("replicated", "replicated-views", "zero1", "zero3")
    }
    assert held == {"replicated": gradients, "replicated-views": 0, "zero1": gradients, "zero3": layer}
    assert train(devices=1, sharding="replicated").communication == 0


# CUDA without a card --------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


@pytest.mark.parametrize(("capability", "kept"), [((8, 0), 8_519_680), ((9, 0), 33_554_432)])
def test_cublas_keeps_a_workspace_for_each_thread(capability: tuple[int, int], kept: int) -> None:
    source = Given(mlp, torch.empty(64, 256))
    assert find(source, device="cuda", capability=capability).workspace == kept
    assert find(source, device="cuda", capability=capability, mode="train").workspace == 2 * kept


def test_cuda_hands_out_multiples_of_512_bytes() -> None:
    found = find(Given(lambda: nn.Linear(3, 5), torch.empty(1, 3)), device="cuda")
    assert found.weights == 2 * 512
    assert found.data == 512


@pytest.mark.parametrize("masked", [False, True])
def test_attention_on_cuda_keeps_no_scores(masked: bool) -> None:
    def activations(tokens: int, capability: tuple[int, int]) -> int:
        mask = (torch.zeros(tokens, tokens, dtype=torch.bool),) if masked else ()
        source = Given(Attention, torch.empty(1, tokens, 64), *mask)
        found = find(source, mode="train", policy="bf16-mixed", device="cuda", capability=capability)
        return found.most["activations"]

    shared = 2 * 1024 * 1024 if masked else 0  # the mask as what is added to the scores, one for all heads
    assert activations(1024, (8, 0)) - shared < 5 * activations(256, (8, 0))
    assert activations(1024, (7, 0)) > 2 * 1024 * 1024 * 2  # no fused kernel takes BF16 there


# What cannot be used --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"optimizer": "lion"}, "adafactor"),
        ({"sharding": "zero4"}, "zero3"),
        ({"mode": "guess"}, "infer, train"),
        ({"device": "tpu"}, "cpu, cuda"),
        ({"accumulate": 0}, "1 or more"),
        ({"devices": 0}, "1 or more"),
        ({"policy": "int4"}, "bf16-mixed"),
        ({"checkpoint": "layers.*"}, "pattern"),
    ],
)
def test_what_cannot_be_used_is_named(setting: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        find(Given(mlp, torch.empty(64, 256)), **({"mode": "train"} | setting))


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(FormatError, match="bf16"):
        train(policy="bf17")


def test_recurrent_layers_under_autocast_on_cuda_are_named() -> None:
    source = Given(Recurrent, torch.empty(2, 3, 96))
    assert find(source, device="cuda", mode="train").peak
    with pytest.raises(ModelError, match="recurrent"):
        find(source, device="cuda", policy="bf16-mixed")


def test_inputs_that_do_not_fit_name_the_layer() -> None:
    with pytest.raises(ModelError, match="layer '0'"):
        train(rows=8, width=100)
    assert train(rows=8).peak  # and the next run is not disturbed
