"""What the advice quotes: sources, widths that devices like, families, and how paths are folded."""

from __future__ import annotations

import pytest
import timm

from narrowcast.accounting.advice import default_policy
from narrowcast.accounting.advice.items import counted, families_for, multiple_for
from narrowcast.accounting.advice.paths import folded
from narrowcast.accounting.devices import device, devices
from narrowcast.accounting.policies import policy


@pytest.mark.parametrize(
    ("name", "precision", "multiple"),
    [
        ("t4", "fp16", 8),
        ("t4", "fp32", None),
        ("h100-sxm", "bf16", 8),
        ("p100-sxm2", "fp16", None),  # no tensor cores
        ("rtx-4090", "fp8-mixed", 16),
        ("mi300x", "bf16", 16),
        ("xeon-8380", "fp32", 16),
        ("epyc-9654", "fp32", 16),
        ("epyc-7763", "fp32", 8),
        ("xeon-e5-2699-v4", "fp32", 8),
        ("raspberry-pi-5", "fp32", 4),
        ("raspberry-pi-5", "fp16", 8),
        ("tpu-v4", "bf16", 128),
        ("ascend-310", "fp16", 16),
        ("hailo-8", "fp32", None),
    ],
)
def test_widths_that_devices_like(name: str, precision: str, multiple: int | None) -> None:
    found = multiple_for(device(name), policy(precision))
    assert (found.multiple if found else None) == multiple
    assert found is None or found.source


def test_families_name_models_that_exist_and_every_gpu_and_cpu_has_some() -> None:
    seen = {family.example for known in devices(user=False) for family in families_for(known)}
    assert len(seen) >= 10
    for example in seen:
        scheme, _, name = example.partition(":")
        assert scheme == "timm"
        assert name in timm.list_models()
    for known in devices(user=False):
        assert families_for(known) or known.kind == "npu", known.name


def test_families_suit_the_device() -> None:
    names = lambda name: [family.name for family in families_for(device(name))]  # noqa: E731
    assert names("t4")[0] == "RepVGG"
    assert names("xeon-8380")[0] == "MobileNetV3"
    assert "MobileOne" in names("m2")
    assert "EfficientNet-Lite" in names("coral-edge-tpu")
    assert "EfficientNet-Lite" not in names("tpu-v5e")
    assert "MobileNetV3" not in names("jetson-agx-orin")


@pytest.mark.parametrize(
    ("name", "compute"), [("t4", "fp32"), ("tpu-v4", "bf16"), ("ascend-310", "fp16"), ("coral-edge-tpu", "int8")]
)
def test_the_precision_unless_given_is_the_widest_that_the_device_multiplies_in(name: str, compute: str) -> None:
    assert default_policy(device(name)).compute == compute


def test_paths_fold_by_their_numbers() -> None:
    blocks = [f"layer{stage}.{block}.conv2" for stage in (1, 2) for block in range(3)]
    assert folded([*blocks, "fc"]) == ["layer1-2.0-2.conv2 (6)", "fc"]
    assert folded(["h.0", "h.2", "h.3"]) == ["h.0,2-3 (3)"]
    assert folded(["stem"]) == ["stem"]
    assert folded(["fire3.expand1x1_act", "fire4.expand1x1_act", "fire4.expand3x3_act"]) == [
        "fire3-4.expand1x1_act (2)",
        "fire4.expand3x3_act",
    ]
    assert folded([]) == []


def test_counts_agree_with_their_nouns() -> None:
    assert counted(1, "layer") == "1 layer"
    assert counted(0, "layer") == "0 layers"
