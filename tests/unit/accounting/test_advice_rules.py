"""Each rule fires on a module built for it, not on its twin, and its gain is that of the changed module itself.

The gain is not recomputed with the rewriting under test: the module that the advice asks for is built and counted.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import nn

from narrowcast.accounting.advice import RULES, Advice, Context, advise
from narrowcast.accounting.building import fake_module
from narrowcast.accounting.devices import device
from narrowcast.accounting.policies import policy
from narrowcast.accounting.profile import Profile, profile_module

# Builders -------------------------------------------------------------------------------------------------------------


def conv(
    inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, groups: int = 1, bias: bool = False
) -> nn.Module:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)


class Parallel(nn.Module):
    """Branches of one input, added or concatenated."""

    def __init__(self, *branches: nn.Module, add: bool = True) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.add = add

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        results = [branch(x) for branch in self.branches]
        if not self.add:
            return torch.cat(results, 1)
        whole = results[0]
        for result in results[1:]:
            whole = whole + result
        return whole


class Split(nn.Module):
    """Halves of what was made go to layers that look alike."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(part) for layer, part in zip(self.layers, x.chunk(2, 1), strict=True)], 1)


class Shuffle(nn.Module):
    def __init__(self, copy: bool) -> None:
        super().__init__()
        self.copy = copy

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, *sizes = x.shape
        whole = torch.cat([x, x], 1)
        if not self.copy:
            return whole
        return whole.view(batch, 2, channels, *sizes).transpose(1, 2).reshape(batch, 2 * channels, *sizes)


def counted(module: nn.Module, *shape: int) -> Profile:
    return profile_module(module, (torch.empty(shape),))


def square_layers(width: int, layers: int) -> Profile:
    """Return large linear layers that run on one row, without allocating them."""
    build = lambda: nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])  # noqa: E731
    module, mode = fake_module(build)
    return profile_module(module, (torch.empty(1, width),), mode=mode)


def context(
    profile: Profile, name: str = "a100-80gb-sxm", precision: str = "fp32", runtime: str | None = None
) -> Context:
    return Context(profile, device(name), policy(precision), runtime)


def found(rule: str, where: Context) -> Advice | None:
    named = [item for item in advise(where) if item.rule == rule]
    assert len(named) <= 1
    return named[0] if named else None


def saves(item: Advice | None, before: Context, after: Context, *, within: float = 1e-6) -> None:
    """Check a gain against a module in which the advice was taken."""
    assert item is not None
    assert item.gain is not None
    saved = before.estimate.seconds - after.estimate.seconds
    assert saved > 0
    assert item.gain.seconds == pytest.approx(saved, rel=within)
    assert item.gain.share == pytest.approx(saved / before.estimate.seconds, rel=within)
    assert 0 <= item.gain.low <= item.gain.share <= item.gain.high < 1


# Rules ----------------------------------------------------------------------------------------------------------------


def pointwise(inputs: int, outputs: int) -> Profile:
    return counted(nn.Sequential(conv(16, inputs), conv(inputs, outputs, 1), conv(outputs, 16)), 16, 16, 256, 256)


def test_equal_widths_saves_what_equal_widths_move_less() -> None:
    before = context(pointwise(32, 128), precision="fp16")
    item = found("equal-widths", before)
    assert item is not None
    assert item.operators == ("1",)
    assert item.gain is not None
    # Per position 32 + 128 numbers go over memory, and would be 64 + 64; the weights are 32 * 128 = 64 * 64.
    time = next(time for time in before.times if before.operators[time.operator].path == "1")
    activations, weights = 16 * 256 * 256, 32 * 128
    share = activations * (160 - 128) / (activations * 160 + weights)
    assert time.bound == "memory"
    assert item.gain.seconds == pytest.approx(time.memory * share, rel=0.02)


def test_equal_widths_has_nothing_to_say_of_equal_ones_or_of_the_last_layer() -> None:
    assert found("equal-widths", context(pointwise(64, 64), precision="fp16")) is None
    assert found("equal-widths", context(counted(conv(32, 128, 1), 1, 32, 256, 256), precision="fp16")) is None


def grouped(channels: int, groups: int) -> Profile:
    return counted(nn.Sequential(conv(16, channels), conv(channels, channels, groups=groups)), 64, 16, 128, 128)


def test_groups_saves_the_memory_access_of_the_wider_tensors() -> None:
    before = context(grouped(256, 16), precision="fp16")
    item = found("groups", before)
    assert item is not None
    assert item.operators == ("1",)
    assert "16 groups" in item.seen
    # 256 channels in 16 groups have the MACs of 64 in one.
    one = context(grouped(64, 1), precision="fp16")
    assert one.operators[-1].work == before.operators[-1].work._replace(sums=one.operators[-1].work.sums)
    assert item.gain is not None
    assert item.gain.seconds == pytest.approx(before.times[-1].seconds - one.times[-1].seconds, rel=0.01)


def test_groups_has_nothing_to_say_of_one_group_or_of_depthwise_convolutions() -> None:
    assert found("groups", context(grouped(64, 1), precision="fp16")) is None
    assert found("groups", context(grouped(64, 64), precision="fp16")) is None


def rep_block() -> nn.Module:
    return Parallel(
        nn.Sequential(conv(64, 64, 3), nn.BatchNorm2d(64)),
        nn.Sequential(conv(64, 64, 1), nn.BatchNorm2d(64)),
        nn.BatchNorm2d(64),
    )


def stacked(block: nn.Module) -> Profile:
    return counted(nn.Sequential(conv(3, 64), nn.ReLU(), block, nn.ReLU()), 64, 3, 56, 56)


def test_branches_saves_all_but_one_convolution() -> None:
    before, after = context(stacked(rep_block())), context(stacked(conv(64, 64, bias=True)))
    item = found("branches", before)
    saves(item, before, after)
    assert item is not None
    assert item.effort == "exact"
    assert item.operators == ("2.branches.0.0", "2.branches.1.0")
    assert "1 sum of 3 branches" in item.seen


@pytest.mark.parametrize(
    "block",
    [
        Parallel(nn.Sequential(conv(64, 64), nn.BatchNorm2d(64), nn.ReLU()), nn.Sequential(conv(64, 64, 1), nn.ReLU())),
        Parallel(nn.Sequential(conv(64, 64), nn.ReLU(), conv(64, 64)), nn.Identity()),
        Parallel(conv(64, 64), conv(64, 64, 1), add=False),
        Parallel(conv(64, 64), conv(64, 64, groups=4)),
    ],
    ids=["nonlinear", "residual", "concatenated", "groups"],
)
def test_branches_has_nothing_to_say_where_no_one_convolution_does_the_same(block: nn.Module) -> None:
    assert found("branches", context(stacked(block))) is None


def test_batch_norm_saves_its_own_time_where_nothing_folds_it() -> None:
    norm = lambda *layers: stacked(nn.Sequential(conv(64, 64), *layers))  # noqa: E731
    before = context(norm(nn.BatchNorm2d(64)))
    saves(found("batch-norm", before), before, context(norm()))
    assert found("batch-norm", context(norm())) is None
    assert found("batch-norm", context(stacked(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(64))))) is None


def test_batch_norm_has_nothing_to_say_where_the_runtime_folds() -> None:
    model = stacked(nn.Sequential(conv(64, 64), nn.BatchNorm2d(64)))
    assert found("batch-norm", context(model, "xeon-8380")) is None


def test_batch_norms_that_branches_take_along_are_not_named_twice() -> None:
    assert found("batch-norm", context(stacked(rep_block()))) is None


def test_parallel_saves_reading_the_input_again_and_starting_kernels() -> None:
    before = context(stacked(Parallel(conv(64, 32, 1), conv(64, 96, 1), add=False)))
    item = found("parallel", before)
    saves(item, before, context(stacked(Parallel(conv(64, 128, 1), add=False))), within=1e-3)
    assert item is not None
    assert item.operators == ("2.branches.0", "2.branches.1")


def test_parallel_finds_queries_keys_and_values() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.query, self.key, self.value = (nn.Linear(256, 256) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.inner(x)
            return nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))

    item = found("parallel", context(counted(Attention(), 1, 32, 256), "h100-sxm", "bf16"))
    assert item is not None
    assert item.operators == ("query", "key", "value")


@pytest.mark.parametrize(
    "block",
    [
        Parallel(conv(64, 64, 1), conv(64, 64, 3), add=False),
        Parallel(conv(64, 64, 1), nn.Sequential(nn.ReLU(), conv(64, 64, 1)), add=False),
        Split(conv(32, 32, 1), conv(32, 32, 1)),
    ],
    ids=["kernels", "inputs", "halves"],
)
def test_parallel_has_nothing_to_say_of_layers_that_differ(block: nn.Module) -> None:
    assert found("parallel", context(stacked(block))) is None


def test_elementwise_saves_a_pass_over_memory() -> None:
    before, after = context(stacked(nn.Sequential(nn.SiLU(), conv(64, 64)))), context(stacked(conv(64, 64)))
    item = found("elementwise", before)
    assert item is not None
    assert item.gain is not None
    assert item.operators == ("1", "2.0", "3")
    # All three activations go; the twin still has two of them.
    two = found("elementwise", after)
    assert two is not None
    assert two.gain is not None
    assert item.gain.seconds - two.gain.seconds == pytest.approx(
        before.estimate.seconds - after.estimate.seconds, rel=1e-6
    )
    assert found("elementwise", context(counted(conv(3, 64), 1, 3, 64, 64))) is None


def test_copies_saves_the_second_copy() -> None:
    before = context(counted(nn.Sequential(conv(64, 64), Shuffle(copy=True)), 4, 64, 56, 56))
    item = found("copies", before)
    assert item is not None
    assert item.gain is not None
    assert item.operators == ("1:clone",)
    clone = next(time for time in before.times if before.operators[time.operator].name == "clone")
    assert item.gain.seconds >= max(clone.memory, clone.compute)
    assert found("copies", context(counted(nn.Sequential(conv(64, 64), Shuffle(copy=False)), 4, 64, 56, 56))) is None


def bottleneck(fused: bool) -> nn.Module:
    if fused:
        return nn.Sequential(conv(16, 64), nn.ReLU(), conv(64, 16, 1))
    return nn.Sequential(conv(16, 64, 1), nn.ReLU(), conv(64, 64, groups=64), nn.ReLU(), conv(64, 16, 1))


def mobile(block: nn.Module) -> Profile:
    return counted(nn.Sequential(conv(3, 16), block), 16, 3, 112, 112)


def test_depthwise_on_a_gpu_saves_what_the_fused_block_saves() -> None:
    before, after = (
        context(mobile(bottleneck(False)), precision="fp16"),
        context(mobile(bottleneck(True)), precision="fp16"),
    )
    item = found("depthwise", before)
    saves(item, before, after)
    assert item is not None
    assert item.operators == ("1.2",)


def test_depthwise_has_nothing_to_say_on_a_small_cpu_or_of_dense_blocks() -> None:
    assert found("depthwise", context(mobile(bottleneck(False)), "raspberry-pi-4")) is None
    assert found("depthwise", context(mobile(bottleneck(True)), precision="fp16")) is None


def test_depthwise_followed_by_a_projection_alone_becomes_one_convolution() -> None:
    separable = nn.Sequential(conv(16, 16, groups=16), nn.ReLU(), conv(16, 32, 1))
    before, after = (context(mobile(block), precision="fp16") for block in (separable, conv(16, 32)))
    saves(found("depthwise", before), before, after)


def test_early_layers_saves_what_patches_save() -> None:
    rest = (nn.ReLU(), conv(32, 32))
    stem = (conv(3, 32, stride=2), nn.ReLU(), conv(32, 32), nn.ReLU(), conv(32, 32, stride=2))
    before = context(counted(nn.Sequential(*stem, *rest), 1, 3, 224, 224))
    patches = nn.Conv2d(3, 32, 4, 4)
    after = context(counted(nn.Sequential(patches, *rest), 1, 3, 224, 224))
    item = found("early-layers", before)
    saves(item, before, after)
    assert item is not None
    assert item.operators == ("0", "2", "4")
    assert found("early-layers", after) is None  # it starts with patches
    small = context(counted(nn.Sequential(*stem, *rest), 1, 3, 32, 32))
    assert found("early-layers", small) is None


def test_early_layers_leaves_dense_prediction_alone() -> None:
    unet = nn.Sequential(conv(3, 16), conv(16, 16, stride=4), nn.Upsample(scale_factor=4), conv(16, 1))
    assert found("early-layers", context(counted(unet, 1, 3, 224, 224))) is None


@pytest.mark.parametrize(("kernel", "layers"), [(5, 2), (7, 3)])
def test_dense_3x3_saves_what_stacked_convolutions_save(kernel: int, layers: int) -> None:
    large = lambda *middle: counted(nn.Sequential(conv(16, 256), *middle, nn.ReLU()), 8, 16, 56, 56)  # noqa: E731
    before, after = context(large(conv(256, 256, kernel))), context(large(*[conv(256, 256) for _ in range(layers)]))
    item = found("dense-3x3", before)
    saves(item, before, after)
    assert item is not None
    assert item.operators == ("1",)
    assert found("dense-3x3", after) is None
    assert found("dense-3x3", context(large(conv(256, 256, kernel, groups=256)))) is None


def linears(*widths: int, rows: int = 4096) -> Profile:
    return counted(nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in pairwise(widths)]), rows, widths[0])


def test_multiples_saves_the_padding() -> None:
    before, padded = context(linears(1024, 1020, 1024), "t4", "fp16"), context(linears(1024, 1024, 1024), "t4", "fp16")
    item = found("multiples", before)
    assert item is not None
    assert item.gain is not None
    assert item.operators == ("0", "1")
    assert "(1020)" in item.seen
    compute = sum(time.compute for time in padded.times) - sum(time.compute for time in before.times)
    assert item.gain.seconds == pytest.approx(compute, rel=0.02)
    assert found("multiples", padded) is None


def test_multiples_depend_on_the_device_and_on_what_it_multiplies() -> None:
    model = linears(1024, 1020, 1024)
    assert found("multiples", context(model, "t4", "fp32")) is None  # no tensor cores in FP32
    assert found("multiples", context(model, "raspberry-pi-5", "fp32")) is None  # a multiple of 4
    item = found("multiples", context(model, "xeon-8380", "fp32"))
    assert item is not None
    assert item.title.endswith("multiples of 16")
    assert "oneDNN" in item.source


def test_multiples_on_a_h100_counts_with_the_slower_kernels_that_were_measured_there() -> None:
    odd, even = (
        context(linears(4096, width, 4096, rows=1 << 16), "h100-sxm", "bf16")  # so many that nothing waits for the host
        for width in (4095, 4094)
    )
    for where, factor in ((odd, 5.6), (even, 2.5)):
        item = found("multiples", where)
        assert item is not None
        assert item.gain is not None
        compute = sum(time.compute for time in where.times)
        assert item.gain.seconds == pytest.approx((factor - 1) * compute, rel=0.02)
        assert "alignment-gpu.json" in item.source


def chain(layers: int) -> Profile:
    return counted(nn.Sequential(*[nn.Conv1d(16, 16, 1) for _ in range(layers)]), 1, 16, 16)


def test_fragmentation_is_the_wait_for_the_host() -> None:
    where = context(chain(20), "h100-sxm", "bf16")
    item = found("fragmentation", where)
    assert item is not None
    assert item.gain is not None
    assert item.gain.low == 0.0
    busy = sum(max(time.compute, time.memory) for time in where.times)
    assert 0 < item.gain.seconds <= where.estimate.seconds - busy + 1e-12


def test_fragmentation_is_nothing_for_large_kernels_and_where_nothing_is_queued() -> None:
    large = found(
        "fragmentation", context(counted(nn.Sequential(*[conv(256, 256) for _ in range(4)]), 64, 256, 56, 56), "t4")
    )
    assert large is None or not large.worth_showing
    assert found("fragmentation", context(chain(20), "xeon-8380")) is None
    assert found("fragmentation", context(chain(20), "tpu-v5e", "bf16")) is None


# The whole run --------------------------------------------------------------------------------------------------------


@cache
def perceptron() -> Profile:
    return linears(4096, 4096, 4096)


def precisions(where: Context) -> dict[str, Advice]:
    return {item.rule.removeprefix("precision-"): item for item in advise(where) if item.rule.startswith("precision-")}


def test_precision_names_only_what_the_device_multiplies_in() -> None:
    assert {"fp16"} <= set(precisions(context(perceptron(), "t4"))) <= {"fp16", "int8-static", "int8", "int4"}
    assert {"tf32", "bf16", "fp8"} <= set(precisions(context(perceptron(), "h100-sxm")))
    assert precisions(context(perceptron(), "raspberry-pi-4")) == {}
    assert precisions(context(perceptron(), "m2090")) == {}


def test_precision_saves_what_the_other_precision_takes_less() -> None:
    before, after = context(perceptron(), "t4"), context(perceptron(), "t4", "fp16")
    saves(precisions(before)["fp16"], before, after)
    assert "fp16" not in precisions(after)


def test_weights_alone_are_stored_narrower_where_one_token_waits_for_them() -> None:
    found_for_token = precisions(context(square_layers(8192, 4), "h100-sxm", "bf16"))
    assert "int4" in found_for_token
    assert "int4" not in precisions(context(perceptron(), "h100-sxm", "bf16"))


def test_weights_alone_are_not_stored_narrower_where_convolutions_hold_them() -> None:
    network = counted(nn.Sequential(*[conv(256, 256, 3) for _ in range(4)]), 1, 256, 4, 4)
    assert not {"int8", "int4"} & set(precisions(context(network, "jetson-nano")))
    assert "fp16" in precisions(context(network, "jetson-nano"))


def test_memory_comes_first_and_says_what_fits() -> None:
    large = square_layers(32768, 5)
    items = advise(context(large, "t4"))  # 20 GiB in FP32, 10 in FP16, of 16
    assert items[0].rule == "memory"
    assert items[0].required
    assert "20.0 GiB" in items[0].seen
    assert "10.0 GiB" in items[0].how
    assert found("memory", context(large, "t4", "fp16")) is None
    assert found("memory", context(large, "h100-sxm")) is None


def test_a_batch_that_memory_ends_says_so() -> None:
    where = context(chain(20), "t4")
    memory = where.device.memory.model_copy(update={"size_gb": 10 * where.profile.peak_bytes / 2**30})
    item = found("batch", Context(where.profile, where.device.model_copy(update={"memory": memory}), where.policy))
    assert item is not None
    assert item.how.endswith("larger ones may bring more and do not fit the memory of NVIDIA T4")
    assert float(item.title.split()[1]) < 128


def test_batch_grows_until_throughput_does_not() -> None:
    where = context(chain(20), "t4")
    item = found("batch", where)
    assert item is not None
    assert item.gain is not None
    batch = int(item.title.split()[1].replace(",", ""))
    assert batch > 1024  # so small a model still doubles its throughput there
    assert "bring less than 11% more" in item.how
    many = context(counted(nn.Sequential(*[nn.Conv1d(16, 16, 1) for _ in range(20)]), batch, 16, 16), "t4")
    assert item.gain.seconds == pytest.approx(where.estimate.seconds - many.estimate.seconds / batch, rel=1e-3)
    busy = counted(nn.Sequential(conv(256, 256), conv(256, 256)), 256, 256, 56, 56)
    assert found("batch", context(busy, "t4")) is None


def test_families_are_for_image_classifiers_and_by_device() -> None:
    classifier = nn.Sequential(conv(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    images = counted(classifier, 1, 3, 64, 64)
    gpu, cpu = found("family", context(images, "t4")), found("family", context(images, "raspberry-pi-5"))
    assert gpu is not None
    assert cpu is not None
    assert "RepVGG" in gpu.title
    assert "MobileNetV3" in cpu.title
    assert "RepVGG" not in cpu.title
    assert found("family", context(perceptron(), "t4")) is None
    assert found("family", context(counted(conv(3, 8), 1, 3, 64, 64), "t4")) is None


# All of them ----------------------------------------------------------------------------------------------------------


def test_nothing_is_said_of_a_model_of_nothing() -> None:
    assert advise(context(counted(nn.Identity(), 1, 4))) == ()


def test_items_are_ordered_by_what_they_save_and_have_sources() -> None:
    items = advise(context(stacked(rep_block()), "t4"))
    gains = [item.gain.seconds for item in items if item.gain]
    assert gains == sorted(gains, reverse=True)
    assert all(gain > 0 for gain in gains)
    assert [item.gain is None for item in items] == sorted(item.gain is None for item in items)
    assert all(item.source and item.how and item.limits and item.seen for item in items)
    assert len(RULES) == len(set(RULES))
