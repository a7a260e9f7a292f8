"""Counts against torchvision's published ones, from architectures alone: no weights, and no table is read to answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
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
