"""Parameters of timm's models against the table that timm publishes; only this test reads it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import timm
import torch

from narrowcast.accounting.building import fake_module
from narrowcast.accounting.profile import profile_module

TABLE = Path(__file__).parent / "data" / "timm_parameters.csv"
PUBLISHED = {
    row["model"]: row["millions"]
    for row in csv.DictReader(line for line in TABLE.read_text().splitlines() if not line.startswith("#"))
}
#: Convolutions, attention, both, mixers, recurrent scans, re-parameterised branches; one of each make.
QUICK = (
    "resnet50",
    "mobilenetv3_small_100",
    "repvgg_a0",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "mixer_b16_224",
    "swin_tiny_patch4_window7_224",
    "xcit_nano_12_p16_224",
    "lambda_resnet26t",
)


def _named(architecture: str) -> str:
    return next(name for name in PUBLISHED if name.split(".")[0] == architecture)


def _check(name: str) -> None:
    module, mode = fake_module(lambda: timm.create_model(name, pretrained=False))
    found = profile_module(module, (torch.empty(1, *module.pretrained_cfg["input_size"]),), mode=mode)
    assert f"{found.parameters.total / 1e6:.2f}" == PUBLISHED[name]
    assert not found.uncounted


@pytest.mark.parametrize("architecture", QUICK)
def test_parameters_of_one_model_of_each_make(architecture: str) -> None:
    _check(_named(architecture))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.split(".")[0] not in QUICK])
def test_parameters_of_all_others(name: str) -> None:
    _check(name)
